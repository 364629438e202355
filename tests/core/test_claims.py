"""Claims: never two owners of one thing, and what the dead had is free again."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlprompt.core.claims import Claims
from vlprompt.core.files import write_json
from vlprompt.core.process_marks import ProcessMark

ROUNDS = 25


def elsewhere(folder: Path, keys: list[str], name: str = "0" * 16) -> Path:
    """Write the claim of a process of another machine, which nobody here can look at."""
    mark = ProcessMark("node7", "node7/boot/1", 4711, "99")
    path = folder / f".{name}.claim"
    write_json(path, {**mark.record(), "since": "2026-01-01 00:00:00", "keys": keys})
    return path


def test_what_is_claimed_is_not_given_again_until_it_is_let_go_of(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "new")
    claim = claims.take(["a", "b"])
    assert claim is not None
    assert Claims(tmp_path / "new").take(["b", "c"]) is None
    assert str(claims.holder(["b"])).startswith(f"process {os.getpid()} on ")
    assert claims.holder(["c"]) is None
    with claims.take(["c"]) or pytest.fail("nobody has c"):
        assert claims.take(["c"]) is None
    claim.release()
    assert claims.take(["b"]) is not None


def test_a_claim_may_exclude_more_than_it_names(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    first, second = claims.take(["joined"], ["restart"]), claims.take(["joined"], ["restart"])
    assert first is not None
    assert second is not None
    assert claims.take(["restart"], ["joined", "restart"]) is None
    first.release()
    second.release()
    assert claims.take(["restart"], ["joined", "restart"]) is not None
    assert claims.take(["joined"], ["restart"]) is None


def test_the_claim_of_a_killed_process_is_free_at_once_on_its_machine(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from vlprompt.core.claims import Claims\n"
        "claim = Claims(Path(sys.argv[1])).take(); print('mine', flush=True); time.sleep(60)"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "mine\n"
        assert Claims(tmp_path).take() is None
    finally:
        running.send_signal(signal.SIGKILL)
    while ProcessMark.of(
        running.pid
    ).begin:  # it may take a moment to die; it stays a zombie, which nobody waits for
        time.sleep(0.01)
    assert Claims(tmp_path).take() is not None
    running.wait()


def test_a_number_that_was_given_again_is_another_process() -> None:
    mark = ProcessMark.here()
    assert mark.runs()
    assert ProcessMark.from_record({**mark.record(), "begin": "1"}).runs() is False
    assert ProcessMark.from_record({**mark.record(), "machine": "another"}).runs() is None


def test_another_machine_is_judged_by_its_beat_alone(tmp_path: Path) -> None:
    path = elsewhere(tmp_path, ["a"])
    os.utime(path, (0, 0))  # half a century by the clocks; nobody compares clocks
    claims = Claims(tmp_path, silent=0.2)
    assert claims.take(["a"]) is None
    time.sleep(0.15)
    os.utime(path)  # it beats
    assert claims.take(["a"]) is None
    time.sleep(0.15)
    assert claims.take(["a"]) is None  # 0.15 s since the beat was seen
    assert path.exists()
    time.sleep(0.1)
    assert claims.take(["a"]) is not None
    assert not path.exists()


def test_an_owner_beats_and_learns_that_it_was_thought_dead(tmp_path: Path) -> None:
    claim = Claims(tmp_path, beat=0.02).take()
    assert claim is not None
    os.utime(claim.path, (0, 0))
    deadline = time.monotonic() + 20
    while claim.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert claim.path.stat().st_mtime > 0
    assert not claim.lost

    claim.path.unlink()  # as somebody does who saw no beat
    assert claim.lost
    successor = Claims(tmp_path).take()
    assert successor is not None
    claim.release()  # of the late riser: the successor's stays
    assert not successor.lost


def test_a_file_that_is_no_claim_stands_in_nobodys_way(tmp_path: Path) -> None:
    for number, text in enumerate(["", "{", "[]", json.dumps({"host": "x"})]):
        (tmp_path / f".{number:016x}.claim").write_text(text)
    assert Claims(tmp_path).take() is not None


def _contend(folder: str, start: float, out: str) -> None:
    """Take the same thing again and again; write down when it was ours."""
    time.sleep(max(0.0, start - time.time()))
    claims, spans = Claims(Path(folder)), []
    while len(spans) < ROUNDS:
        claim = claims.take(["x"])
        if claim is not None:
            begin = time.monotonic()
            time.sleep(0.001)
            spans.append((begin, time.monotonic()))
            claim.release()
    Path(out).write_text(json.dumps(spans))


def test_of_several_that_want_the_same_never_two_have_it(tmp_path: Path) -> None:
    """Three processes: no span of ownership (by the clock that all of a machine share) overlaps another."""
    context = multiprocessing.get_context("fork")
    outs = [tmp_path / f"{number}.json" for number in range(3)]
    start = time.time() + 0.2
    processes = [
        context.Process(target=_contend, args=(str(tmp_path / "claims"), start, str(out))) for out in outs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0

    spans = sorted(tuple(span) for out in outs for span in json.loads(out.read_text()))
    assert len(spans) == 3 * ROUNDS
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert not list((tmp_path / "claims").iterdir())
