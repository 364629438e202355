"""What no command foresees ends in one sentence and status 2: closed pipes, full disks, deep files, foreign names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Command
from tests.data.folders import fill, tree
from vlprompt.cli._errors import exit_status
from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import write_text

ROOT = Path(__file__).parent.parent.parent


def _raise(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device", "table.csv"), "error: table.csv: No space left on device.\n"),
        (PermissionError(13, "Permission denied"), "error: Permission denied.\n"),
        (
            MemoryError(),
            "error: there is not enough memory. Use fewer or smaller images, or a smaller batch.\n",
        ),
        (
            RecursionError(),
            "error: something is nested too deeply, for example a file of brackets in brackets.\n",
        ),
        (
            BrokenPipeError(32, "Broken pipe"),
            "error: standard output was closed before everything was written.\n",
        ),
        (OSError("two\nlines"), "error: two\\nlines.\n"),
    ],
)
def test_one_sentence(error: BaseException, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(_raise(error)) == 2
    assert capsys.readouterr().err == sentence


def test_a_text_that_can_not_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: len("\udcff".encode())) == 2
    assert capsys.readouterr().err.startswith("error: a text can't be read or written: ")


def test_a_mistake_in_vlprompt_itself_stays_a_stack() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(_raise(ZeroDivisionError()))


def _run(output: int, *words: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "vlprompt", *words]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, cwd=ROOT, check=False, timeout=120)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("words", [("list", "configs"), ("--help",), ("--version",)])
def test_full_standard_output(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = _run(full.fileno(), *words)
    assert (ended.returncode, ended.stderr) == (2, b"error: No space left on device.\n")


def test_a_closed_pipe() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = _run(writing, "list", "configs")
    finally:
        os.close(writing)
    assert ended.returncode == 2
    assert ended.stderr == b"error: standard output was closed before everything was written.\n"


# --- data check


def test_data_check_tells_before_anything_trains(command: Command, tmp_path: Path) -> None:
    tree(tmp_path / "photos", "train/cat", "train/dog", "testing/cat", "testing/dog", count=5)
    photos = tmp_path / "photos"
    (photos / "testing" / "dog" / "copy.png").write_bytes((photos / "train" / "cat" / "000.png").read_bytes())
    (photos / "train" / "cat" / "broken.jpg").write_bytes(b"no image")
    (photos / "train" / "cat" / "notes.txt").write_text("x")
    os.mkfifo(photos / "train" / "cat" / "pipe.jpg")
    fill(photos / "extra", 2)

    answer = command("data", "check", photos)
    assert answer.status == 1
    for line in (
        f"folder:{photos}: 3 problems",
        "  2 classes: 'cat', 'dog'",
        "  splits: folders ['test', 'train']; val is 20 % of train per class, 2 of its 11 images, seed 0",
        "  train: 9 images (cat 5, dog 4)",
        "  val: 2 images (cat 1, dog 1)",
        "  test: 11 images (cat 5, dog 6)",
        "  left out: 1, no image by its ending: 'train/cat/notes.txt'",
        "  left out: 1, a named pipe: 'train/cat/pipe.jpg'",
        f"  {photos}: 'extra' (2 images) beside testing, train: left out.",
    ):
        assert line in answer.out.splitlines(), answer.out
    problems = [line for line in answer.out.splitlines() if line.startswith("  problem: ")]
    assert any("can't be read: train/cat/broken.jpg" in line for line in problems)
    assert any(
        "and test share 1 images, for example train/cat/000.png = testing/dog/copy.png" in p for p in problems
    )
    assert any("1 images occur with several labels" in line for line in problems)


def test_data_check_of_a_sound_folder_and_table(command: Command, tmp_path: Path) -> None:
    name = tree(tmp_path / "photos", "cat", "dog", count=5)
    assert command("data", "check", name).out.startswith(f"{name}: ready\n  2 classes")
    rows = [f"photos/{c}/{i:03d}.png;{c}\n" for c in ("cat", "dog") for i in range(5)]
    (tmp_path / "t.csv").write_text("file;class\n" + "".join(rows))
    answer = command("data", "check", tmp_path / "t.csv")
    assert answer.status == 0
    assert "  table: separated by semicolons" in answer.out.splitlines()


def test_data_check_of_what_is_none(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        (("folder:nowhere",), "there is no folder 'nowhere'"),
        (("empty",), "no images in class folders"),
        (("nowhere",), "unknown data set 'nowhere'"),
    ):
        answer = command("data", "check", *words)
        assert answer.status == 2
        assert message in answer.err


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("words", "status"),
    [("--help", 0), ("data check nowhere", 2), pytest.param("list learners", 0, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "2>&-"])
def test_output_that_a_shell_closed(words: str, status: int, closed: str) -> None:
    command = f"{sys.executable} -m vlprompt {words} {closed}"
    ended = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT, check=False, timeout=120)
    assert ended.returncode == status
    assert b"Traceback" not in ended.stderr + ended.stdout


def test_a_folder_in_place_of_a_file_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_text(tmp_path, "x")
    assert str(caught.value).count("could not write") == 1
