"""What an import may do, what the lists promise, and what a wheel carries."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

import vlprompt

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


def test_a_wheel_carries_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlprompt"}


@pytest.mark.slow
def test_an_installed_wheel_does_the_quickstart_in_a_folder_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Install the wheel beside the packages of this environment; nothing is written outside the folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip("--python", python, "install", "--no-deps", wheel)
    (site_packages,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (site_packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (site_packages / "sitecustomize.py").write_text(f"import atexit{WATCH}{TO_FILE}atexit.register(report)\n")

    folder = tmp_path / "folder"
    (folder / "home").mkdir(parents=True)

    def vlprompt_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tmp_path / "venv" / "bin" / "vlprompt", *arguments],
            cwd=folder,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(folder / "home"),
                "TMPDIR": str(folder / "home"),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )

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

    records = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    events = [event for record in records for event in record]
    assert [event for event in events if event[0] in ("socket.connect", "socket.getaddrinfo")] == []
    written = [Path(folder, event[1]) for event in events if event[0] == "open"]
    assert len(written) > 20
    assert [str(path) for path in written if not path.is_relative_to(folder)] == []
