"""What an import may do, what the lists promise, and what a wheel carries."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import vlprompt
from tests.pages import DOCS, script_of

ROOT = Path(__file__).parent.parent
LISTS = sorted(name for name in vlprompt.__all__ if name.startswith("list_"))

# Audit hooks see every socket and every file opened for writing, whatever library does it.
WATCH = """
import json, os, sys
events = []
def watch(event, args):
    if event.startswith(("socket.", "urllib.")) or event in ("os.mkdir", "os.rename"):
        if "torchinductor" not in str(args[:1]):  # PyTorch makes that one itself, in the temporary directory
            events.append([event, str(args[:2])])
    elif event == "open" and isinstance(args[0], str):
        writes = set(args[1] or "") & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and args[0] != os.devnull:
            events.append([event, args[0]])
sys.dont_write_bytecode = True
sys.addaudithook(watch)
"""
REPORT = "\nprint(json.dumps(events))\n"
TO_FILE = """
def report():
    with open("events.jsonl", "a") as file:
        file.write(json.dumps(events) + "\\n")
"""


def run_watched(code: str, folder: Path) -> list[list[str]]:
    """Run code in a fresh interpreter with an empty home; return what it wrote and where it connected to."""
    environment = {**os.environ, "HOME": str(folder), "MPLCONFIGDIR": str(folder), "PYTHONPATH": str(ROOT)}
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", WATCH + code + REPORT],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_writes_nothing_and_connects_to_nothing(tmp_path: Path) -> None:
    code = "before = dict(os.environ)\nimport vlprompt\nassert dict(os.environ) == before"
    assert run_watched(code, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_listing_connects_to_nothing_and_makes_no_cache(tmp_path: Path) -> None:
    calls = "\n".join(f"vlprompt.{name}()" for name in LISTS)
    events = run_watched(f"import vlprompt\n{calls}\n", tmp_path)
    assert [e for e in events if e[0].startswith(("socket", "urllib"))] == []
    assert not (tmp_path / ".cache" / "torch").exists()
    assert not (tmp_path / ".cache" / "huggingface").exists()


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_sorted_and_free_of_duplicates(name: str) -> None:
    names = getattr(vlprompt, name)()
    assert names == sorted(set(names))
    assert names, f"{name}() is empty"


def test_the_notice_names_every_weights_file_and_no_other() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    named = set(re.findall(r"^vlprompt/\S+\.(?:safetensors|gz)$", notice, re.MULTILINE))
    assert named == {
        str(path.relative_to(ROOT))
        for kind in ("safetensors", "gz")
        for path in (ROOT / "vlprompt").rglob(f"*.{kind}")
    }


def test_the_notice_says_the_origin_and_the_licence_of_every_weights_file() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert re.search(r"Weights that are part of the package.*\n.*Apache License, Version 2\.0", notice)

    entries = re.findall(r"((?:^vlprompt/\S+\n)+)((?:^ {4}.*\n)+)", notice, re.MULTILINE)
    files = [name for names, _ in entries for name in names.split()]
    assert files, "no entry was found"
    assert sorted(files) == sorted(re.findall(r"^vlprompt/\S+$", notice, re.MULTILINE))
    for names, text in entries:
        words = " ".join(text.split())
        assert re.search(r"\b(Trained|Made)\b.* by |on top of|Trained on", words), names  # from what it comes
        assert re.search(r"No image or text of others|WordNet|EfficientNet-Lite0 \(below\)", words), names
        for path in re.findall(r"\b(?:tools|vlprompt)/[\w/]+\.py", words):
            assert (ROOT / path).is_file(), path
        for config in re.findall(r"--cfg (\S+\.yaml)", words):
            assert list((ROOT / "configs").rglob(config)), config


def test_the_citation_has_the_package_s_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == vlprompt.__version__
    assert citation["license"] == "Apache-2.0"


def test_every_extra_of_dev_is_one_that_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    asked = {name for line in extras["dev"] for name in re.findall(r"vlprompt\[(\w+)\]", line)}
    assert asked == extras.keys() - {"dev"}

    # What an error tells people to install exists.
    advised = {
        name
        for path in (ROOT / "vlprompt").rglob("*.py")
        for name in re.findall(r"vlprompt\[(\w+)\]'", path.read_text(encoding="utf-8"))
    }
    assert advised <= extras.keys()


def test_the_public_contract_is_importable() -> None:
    assert vlprompt.__all__ == sorted(vlprompt.__all__)
    assert all(getattr(vlprompt, name) is not None for name in vlprompt.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, because setuptools leaves a build folder where it works
    for name in ("vlprompt", "datasets", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)

    pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    return next(folder.glob("vlprompt-*.whl"))


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def test_a_wheel_carries_cards_configurations_weights_and_types(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"vlprompt/py.typed", "vlprompt/experiments/report.html.j2"} <= inside
    for folder, installed in (("datasets", "vlprompt/cards"), ("configs", "vlprompt/configs")):
        files = {p.relative_to(ROOT / folder).as_posix() for p in (ROOT / folder).rglob("*.yaml")}
        assert {f"{installed}/{f}" for f in files} <= inside
    data = [p for s in ("py", "json", "gz", "safetensors") for p in (ROOT / "vlprompt").rglob(f"*.{s}")]
    assert {p.relative_to(ROOT).as_posix() for p in data} <= inside
    assert {name.rpartition("/")[2] for name in inside if ".dist-info/licenses/" in name} == {
        "LICENSE",
        "NOTICE",
    }


def test_a_wheel_passes_the_checks_of_twine_and_check_wheel_contents(wheel: Path) -> None:
    for command in (["twine", "check", "--strict"], ["check_wheel_contents"]):
        pytest.importorskip(command[0])
        done = subprocess.run(
            [sys.executable, "-m", *command, wheel], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_has_the_size_that_the_readme_says(wheel: Path) -> None:
    said = re.search(r"(\d+) MB, weights included", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said is not None
    assert wheel.stat().st_size / 1e6 == pytest.approx(float(said[1]), rel=0.1)


def test_a_wheel_carries_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlprompt"}


@pytest.fixture(scope="module")
def newcomer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and, of the packages here, those that the wheel asks for; its bin folder."""
    folder = tmp_path_factory.mktemp("newcomer")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    commands = folder / "venv" / "bin"
    (site_packages,) = (folder / "venv" / "lib").glob("*/site-packages")
    for package in required(wheel):
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(Path(str(package.locate_file(top))))

    pip("--python", commands / "python", "install", "--no-deps", "--no-index", wheel)
    pip("--python", commands / "python", "check")
    (site_packages / "sitecustomize.py").write_text(f"import atexit{WATCH}{TO_FILE}atexit.register(report)\n")
    return commands


def required(wheel: Path) -> list[Distribution]:
    """Return what is installed here of everything that a wheel needs, directly or not, without its extras."""
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    waiting = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)]
    waiting = [need for need in waiting if need.marker is None or need.marker.evaluate({"extra": ""})]

    found: dict[tuple[str, str], Distribution] = {}
    while waiting:
        need = waiting.pop()
        for extra in ("", *need.extras):
            key = (canonicalize_name(need.name), extra)
            if key in found:
                continue
            found[key] = distribution(need.name)
            further = map(Requirement, found[key].requires or ())
            waiting += [
                more for more in further if more.marker is None or more.marker.evaluate({"extra": extra})
            ]
    return list(found.values())


def in_environment(commands: Path, folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with an empty home and the environment's programs alone before the system's."""
    (folder / "home").mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        command,
        cwd=folder,
        env={
            "PATH": f"{commands}{os.pathsep}{os.defpath}",
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def assert_kept_to_itself(folder: Path) -> None:
    """Nothing was written outside the folder, and nothing was connected to."""
    records = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    events = [event for record in records for event in record]
    assert [event for event in events if event[0] in ("socket.connect", "socket.getaddrinfo")] == []
    written = [Path(folder, event[1]) for event in events if event[0] == "open"]
    assert len(written) > 20
    assert [str(path) for path in written if not path.is_relative_to(folder)] == []


@pytest.mark.slow
def test_a_newcomer_can_do_all_of_the_first_page(newcomer: Path, tmp_path: Path) -> None:
    done = in_environment(newcomer, tmp_path, "bash", "-c", script_of(DOCS / "index.md"))
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    before, after = (
        float(re.search(rf"^{word}: (\S+)$", done.stdout, re.M)[1]) for word in ("before", "after")
    )
    assert after > before + 0.2
    assert (tmp_path / "digits-gda" / "prompt.safetensors").is_file()
    assert_kept_to_itself(tmp_path)


@pytest.mark.slow
def test_an_installed_wheel_does_the_quickstart_in_a_folder_of_its_own(
    newcomer: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"

    def vlprompt_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return in_environment(newcomer, folder, newcomer / "vlprompt", *arguments)

    done = vlprompt_command("run", "quickstart.yaml")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"runs/quickstart/[0-9a-f]{8}/metrics\.json: accuracy 7\d\.\d %", last)
    run_folder = Path(last.partition(": ")[0]).parent

    Image.new("RGB", (32, 32)).save(folder / "image.png")
    done = vlprompt_command("predict", run_folder, "image.png", "--topk", "1")
    assert done.returncode == 0, done.stderr
    assert "image.png" in done.stdout

    done = vlprompt_command("report", run_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / run_folder / "table.md").read_text()

    again = vlprompt_command("run", "quickstart.yaml")
    assert f"finished before: nothing was left to run; the results are in {run_folder}" in again.stdout
    assert again.stdout.splitlines()[-1] == last

    assert_kept_to_itself(folder)
