"""Writing: what a path may lead to, what a kill leaves behind, names that are no UTF-8."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vlprompt.core.csv_text import csv_text
from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import write_atomic, write_json, write_text

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and devices of POSIX")


@posix
def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "real.csv"
    real.parent.mkdir()
    real.write_text("old")
    link = tmp_path / "link.csv"
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"

    dangling = tmp_path / "dangling.csv"
    dangling.symlink_to(tmp_path / "elsewhere" / "later.csv")
    write_text(dangling, "made")
    assert dangling.is_symlink()
    assert (tmp_path / "elsewhere" / "later.csv").read_text() == "made"
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


@posix
def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    with pytest.raises(CheckpointError, match=r"could not write .*loop.csv"):
        write_text(loop, "x")
    assert loop.is_symlink()


@posix
def test_a_pipe_is_written_through_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="could not write"):
        write_text(pipe, "nobody reads")  # an error, not a wait

    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    big = "line\n" * 50_000
    for _ in range(200):
        try:
            write_text(pipe, big)
            break
        except CheckpointError:  # the reader has not opened its end yet
            threading.Event().wait(0.01)
    reader.join(5)
    assert received == [big]
    assert pipe.is_fifo()


@posix
def test_a_device_is_written_through_and_stays_a_device(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    if Path("/dev/full").exists():
        with pytest.raises(CheckpointError, match="No space left"):
            write_text(Path("/dev/full"), "x")
        assert Path("/dev/full").is_char_device()
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    write_text(link, "gone")
    assert link.is_symlink()


@posix
def test_standard_output_can_be_named(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from vlprompt.core.files import write_text; "
        "write_text(Path('/dev/stdout'), 'said')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, env=environment, check=True).stdout == b"said"
    with (tmp_path / "out.txt").open("wb") as file:
        subprocess.run(command, stdout=file, env=environment, check=True)
    assert (tmp_path / "out.txt").read_bytes() == b"said"


@posix
def test_folders_and_sockets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="it is a folder"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(CheckpointError, match="could not write"):
        write_text(Path("/"), "x")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s"))
        with pytest.raises(CheckpointError, match="could not write"):
            write_text(tmp_path / "s", "x")
    with pytest.raises(CheckpointError, match="could not write"):
        write_text(tmp_path / "a\0b", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not write"):
        write_text(tmp_path / "file" / "inside", "x")


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".csv")
    write_text(path, "x")
    assert path.read_text() == "x"


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path: Path) -> None:
    write_text(tmp_path / "before.txt", "the folder is known to this process")
    program = (
        "import os, signal, sys; from pathlib import Path; from vlprompt.core.files import write_atomic\n"
        "def half(path):\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(Path(sys.argv[1]), half)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.txt")], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".")]) == 1

    (tmp_path / ".hidden").write_text("the user's")
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "a.txt", "before.txt"]


def test_what_another_write_of_this_moment_fills_is_not_removed(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("outer")
        write_text(tmp_path / "inner.txt", "inner")

    write_atomic(tmp_path / "outer.txt", write)
    assert (tmp_path / "outer.txt").read_text() == "outer"


def test_names_that_are_no_utf_8_are_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_json(tmp_path / "a.json", {"name": name, "other": "café"})
    assert json.loads((tmp_path / "a.json").read_text())["name"] == name
    write_text(tmp_path / "a.txt", name)
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9.png"
    write_text(tmp_path / "b.txt", "\ud800")
    assert (tmp_path / "b.txt").read_bytes() == b"?"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=cmd()", "'=cmd()"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@x", "'@x"),
        (" =x", "' =x"),
        ("\t=x", "'\\t=x"),
        ("a\rb", "a\\rb"),
        ("a\nb", "a\\nb"),
        ("a\x1bb", "a\\x1bb"),
        ("a\u2028b", "a\\u2028b"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("café, 1", '"café, 1"'),
        ("a-b", "a-b"),
    ],
)
def test_cells_run_nothing_and_a_row_is_a_line(text: str, cell: str) -> None:
    assert csv_text(["name", "score"], [[text, -1.5]]) == f"name,score\n{cell},-1.5\n"
