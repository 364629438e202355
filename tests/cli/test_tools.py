"""The programs of tools/ are faces: they hand their arguments to the command, and nothing else."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.commands import Command

TOOLS = Path(__file__).parents[2] / "tools"
FACES = {
    "evaluate": "evaluate",
    "masks": "masks",
    "poison": "poison",
    "predict": "predict",
    "prepare": "data prepare",
    "report": "report",
    "scan": "scan",
    "segment": "segment",
    "train": "run",
}


def run_tool(name: str, *arguments: str) -> int:
    sys.argv[1:] = arguments
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", FACES)
def test_a_face_is_its_command(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    page = command(*FACES[name].split(), "--help").out
    assert run_tool(name, "--help") == 0
    assert capsys.readouterr().out == page


def test_train_does_exactly_what_run_does(
    command: Command, toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    answer = command("run", toy, "fail=[one_a_seed1]")
    files = {
        path.name: path.read_bytes()
        for path in Path("runs").glob("toy/*/*")
        if path.suffix in (".html", ".jsonl")
    }
    assert run_tool("train", "--cfg", toy, "fail=[one_a_seed1]", "--restart") == answer.status == 1
    out, err = capsys.readouterr()
    assert out == answer.out
    assert err.splitlines()[-1] == answer.err.splitlines()[-1]
    again = {
        path.name: path.read_bytes() for path in Path("runs").glob("toy/????????/*") if path.name in files
    }
    assert again == files


def test_nothing_else_lies_there() -> None:
    names = {path.stem for path in TOOLS.glob("*.py")}
    assert names == {*FACES, "bench", "pretrain"}
