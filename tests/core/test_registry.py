"""Names: found by walking a package and by entry points, never listed; clashes and misses are said by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.learners import LEARNERS, list_learners

PACKAGE = "widgets_of_a_test"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writer of modules of a package that can be imported during the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def add(module: str, text: str = "") -> None:
        path = tmp_path / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    add(
        f"{PACKAGE}/__init__.py",
        f"from vlprompt.core.registry import Registry\nR = Registry('widget', {PACKAGE!r})\n",
    )
    yield add
    for name in set(sys.modules) - before:
        if name.split(".")[0] in (PACKAGE, "plug_in", "broken_plug_in"):
            del sys.modules[name]


def registry() -> Registry[Any]:
    module = __import__(PACKAGE)
    return module.R


def entry(name: str, extra: str = "") -> str:
    """A module that registers one function."""
    arguments = f"{name!r}, summary='a {name}', paper='0000.00000'{extra}"
    return f"from {PACKAGE} import R\n@R.register({arguments})\ndef f(): pass\n"


def install(write: Callable[[str, str], None], module: str, text: str) -> None:
    """What pip leaves behind for a package with an entry point."""
    write(f"{module}.py", text)
    write(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    write(f"{module}-1.0.dist-info/entry_points.txt", f"[vlprompt.widgets]\nany = {module}\n")


def test_modules_are_found_on_first_use_and_private_ones_left_alone(
    write: Callable[[str, str], None],
) -> None:
    write(f"{PACKAGE}/wheel.py", entry("wheel", extra=", needs=('text',), colour='red'"))
    write(f"{PACKAGE}/bolt.py", entry("bolt"))
    write(f"{PACKAGE}/_shared.py", "raise RuntimeError('nobody asked for this')\n")
    widgets = registry()
    assert f"{PACKAGE}.wheel" not in sys.modules
    assert widgets.names() == ["bolt", "wheel"]
    assert widgets.names("w*") == ["wheel"]
    assert [e.name for e in widgets] == ["bolt", "wheel"]
    assert "wheel" in widgets
    assert "whee" not in widgets
    wheel = widgets.get("wheel")
    assert (wheel.summary, wheel.paper, wheel.needs) == ("a wheel", "0000.00000", ("text",))
    assert (wheel.extra, wheel.owner) == ({"colour": "red"}, f"{PACKAGE}.wheel")


def test_an_unknown_name_is_answered_with_the_nearest(write: Callable[[str, str], None]) -> None:
    write(f"{PACKAGE}/wheel.py", entry("wheel") + entry("bolt").replace("def f", "def g"))
    widgets = registry()
    with pytest.raises(
        UnknownNameError, match=r"unknown widget 'whel'\. Did you mean 'wheel'\? Known: bolt, wheel"
    ):
        widgets.get("whel")
    with pytest.raises(UnknownNameError, match=r"unknown widget 'zzz'\. Known: bolt, wheel"):
        widgets.get("zzz")


def test_a_name_taken_twice_names_both_owners(write: Callable[[str, str], None]) -> None:
    write(f"{PACKAGE}/first.py", entry("wheel"))
    write(f"{PACKAGE}/second.py", entry("wheel"))
    with pytest.raises(
        VLPromptError, match=r"widget 'wheel' is registered twice: by .*\.first and by .*\.second"
    ):
        registry().names()


def test_a_module_that_is_run_again_is_no_clash(write: Callable[[str, str], None]) -> None:
    write(f"{PACKAGE}/wheel.py", entry("wheel"))
    widgets = registry()
    old = widgets.get("wheel").target
    del sys.modules[f"{PACKAGE}.wheel"]
    __import__(f"{PACKAGE}.wheel")
    assert widgets.names() == ["wheel"]
    assert widgets.get("wheel").target is not old


def test_an_installed_plug_in_is_found_by_its_entry_point(write: Callable[[str, str], None]) -> None:
    write(f"{PACKAGE}/wheel.py", entry("wheel"))
    install(write, "plug_in", entry("spring"))
    widgets = registry()
    assert widgets.names() == ["spring", "wheel"]
    assert widgets.get("spring").owner == "plug_in"


def test_a_broken_plug_in_is_named_and_takes_nothing_down(write: Callable[[str, str], None]) -> None:
    write(f"{PACKAGE}/wheel.py", entry("wheel"))
    install(write, "broken_plug_in", "import a_package_nobody_has\n")
    widgets = registry()
    with pytest.warns(UserWarning, match=r"plug-in 'any' \(broken_plug_in\) failed to load: No module named"):
        assert widgets.names() == ["wheel"]


def test_learners_are_sorted_and_belong_to_their_files() -> None:
    assert {"coop", "linear_probe", "zero_shot"} <= set(list_learners())
    assert list_learners() == sorted(list_learners())
    for found in LEARNERS:
        package, _, file = found.owner.rpartition(".")
        assert package == "vlprompt.learners"
        assert not file.startswith("_"), "files with an underscore hold what methods share"
        assert found.target.__module__ == found.owner


def takes(*, size: int = 4, mode: str = "a", ratio: float = 0.5) -> None:
    """A constructor's stand-in: three options with types and defaults."""


def test_options_are_checked_against_the_signature_all_at_once() -> None:
    assert check_options(takes, {"size": "8", "ratio": 1}, "here") == {"size": 8, "ratio": 1.0}
    assert check_options(takes, {}, "here") == {}
    with pytest.raises(ConfigError) as caught:
        check_options(takes, {"sise": 8, "mode": 3, "ratio": "much"}, "here")
    message = str(caught.value)
    assert message.startswith("here: 3 problems")
    assert "sise: unknown key; did you mean 'size'? Known: mode, ratio, size." in message
    assert "mode: input should be a valid string, got 3." in message
    assert "ratio: input should be a valid number" in message


def test_a_huge_value_makes_no_huge_message() -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(takes, {"size": "9" * 10_000_000, "mode": list(range(1_000_000))}, "here")
    assert len(str(caught.value)) < 1000
