"""The loop: what it finds, when it stops, and the transcript that it can be repeated and continued from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.text_search.conftest import CLASSES, ToyScorer
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, VLPromptError
from vlprompt.text_search.loop import Outcome, Settings, search
from vlprompt.text_search.proposers import create_proposer
from vlprompt.text_search.proposers.base import Proposal, Proposer, Request
from vlprompt.text_search.proposers.grammar import Grammar
from vlprompt.text_search.templates import Rules
from vlprompt.text_search.transcript import preference_pairs, read_transcript

WORTH = {"sketch": 2.0, "on paper": 2.0, "the ": 0.5, "blurry": -1.0}
SETTINGS = Settings(steps=12, proposals=8, patience=12)


@pytest.fixture
def rules(backbone: Backbone) -> Rules:
    return Rules(backbone, CLASSES)


class Scripted(Proposer):
    """Proposes what it was told to, step by step; may be killed."""

    identity = "scripted"

    def __init__(self, *steps: Sequence[str], killed_at: int = 0) -> None:
        self.steps = steps
        self.killed_at = killed_at
        self.asked: list[int] = []

    def propose(self, request: Request) -> Proposal:
        self.asked.append(request.step)
        if request.step == self.killed_at:
            raise KeyboardInterrupt
        return Proposal(self.steps[request.step - 1], exhausted=request.step == len(self.steps))


def _run(
    rules: Rules,
    proposer: Proposer,
    path: Path | None = None,
    settings: Settings = SETTINGS,
    worth: dict[str, float] = WORTH,
    resume: bool = False,
) -> Outcome:
    outcome, transcript = search(
        ToyScorer(worth), proposer, rules, ["a photo of a {}."], settings, transcript=path, resume=resume
    )
    transcript.result({"templates": [outcome.candidates[0].template]})
    return outcome


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_grammar_finds_a_planted_phrase(seed: int, rules: Rules) -> None:
    outcome = _run(rules, Grammar(), settings=Settings(steps=40, proposals=8, patience=40, seed=seed))
    best = outcome.candidates[0].template
    assert "sketch" in best
    assert "on paper" in best
    assert len(outcome.candidates) <= 1 + 40 * 8
    assert [c.score.cross_entropy for c in outcome.candidates] == sorted(
        c.score.cross_entropy for c in outcome.candidates
    )


def test_the_same_seed_writes_the_same_transcript(rules: Rules, tmp_path: Path) -> None:
    for name in ("a", "b"):
        _run(rules, Grammar(), tmp_path / name)
    _run(rules, Grammar(), tmp_path / "c", Settings(steps=12, proposals=8, patience=12, seed=2))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_proposals_are_checked_and_counted(rules: Rules, tmp_path: Path) -> None:
    texts = [
        "<CLASS> sketch",
        "A PHOTO of a {}.",
        "<CLASS> sketch.",
        "nothing",
        "a dog and a {}.",
        "x" * 500 + "{}",
    ]
    outcome = _run(rules, Scripted(texts), tmp_path / "t")
    assert [c.template for c in outcome.candidates] == ["{} sketch.", "a photo of a {}."]
    assert outcome.stopped == "the proposer has nothing left"
    _, steps, _ = read_transcript(tmp_path / "t")
    reasons = dict(steps[1].rejected)
    assert reasons["A PHOTO of a {}."] == reasons["<CLASS> sketch."] == "duplicate"
    assert "missing" in reasons["nothing"]
    assert "class name 'dog'" in reasons["a dog and a {}."]
    assert "longer than" in reasons["x" * 500 + "{}"]


def test_it_stops_where_nothing_gets_better(rules: Rules) -> None:
    steps = [["a sketch of {}."], ["a {} here."], ["a {} there."], ["a {} now."]]
    outcome = _run(rules, Scripted(*steps, ["never"]), settings=Settings(steps=9, patience=2))
    assert (outcome.steps, outcome.stopped) == (3, "2 steps brought nothing better")
    outcome = _run(rules, Scripted(*steps, ["never"]), settings=Settings(steps=2, patience=5))
    assert (outcome.steps, outcome.stopped) == (2, "2 steps were made")


def test_a_proposer_without_one_template_is_an_error(rules: Rules) -> None:
    with pytest.raises(VLPromptError, match="scripted: in 2 steps there was not one template"):
        _run(rules, Scripted(["no"], ["neither"]))


@pytest.mark.parametrize("kill", [1, 5, 12])
def test_a_killed_search_goes_on_to_the_same_bytes(kill: int, rules: Rules, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    outcome = _run(rules, Grammar(), whole)

    lines = whole.read_bytes().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(lines[: kill + 1]) + lines[kill + 1][:20])  # in the middle of a line
    again = _run(rules, Grammar(), part, resume=True)
    assert part.read_bytes() == whole.read_bytes()
    assert again == outcome

    assert _run(rules, Grammar(), part, resume=True) == outcome  # a finished one does nothing
    assert part.read_bytes() == whole.read_bytes()


def test_what_was_asked_before_a_kill_is_not_asked_again(rules: Rules, tmp_path: Path) -> None:
    steps = [["a sketch of {}."], ["a {} on paper."], ["the {}."]]
    with pytest.raises(KeyboardInterrupt):
        _run(rules, Scripted(*steps, killed_at=3), tmp_path / "t")
    proposer = Scripted(*steps)
    outcome = _run(rules, proposer, tmp_path / "t", resume=True)
    assert proposer.asked == [3]
    assert len(outcome.candidates) == 4


def test_a_new_search_keeps_the_old_transcript(rules: Rules, tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    _run(rules, Scripted(["a sketch of {}."]), path)
    old = path.read_bytes()
    _run(rules, Scripted(["the {}."]), path)
    assert (tmp_path / "transcript-1.jsonl").read_bytes() == old
    assert path.read_bytes() != old


def test_a_search_goes_on_only_where_it_is_the_same(rules: Rules, tmp_path: Path) -> None:
    _run(rules, Grammar(), tmp_path / "t")
    with pytest.raises(CheckpointError, match="transcript of another search: settings is"):
        _run(rules, Grammar(), tmp_path / "t", Settings(steps=3), resume=True)
    with pytest.raises(CheckpointError, match="another search: scorer is"):
        _run(rules, Grammar(), tmp_path / "t", worth={"x": 1.0}, resume=True)


def test_a_replay_is_the_same_search_without_its_proposer(rules: Rules, tmp_path: Path) -> None:
    outcome = _run(rules, Grammar(), tmp_path / "t")
    replay = create_proposer("replay", {"path": str(tmp_path / "t")})
    again = _run(rules, replay, tmp_path / "copy")
    assert again.candidates == outcome.candidates
    assert read_transcript(tmp_path / "copy")[1] == read_transcript(tmp_path / "t")[1]

    other = {"photo": 1.0, "sketch": -1.0}
    with pytest.raises(CheckpointError, match=r"another scorer.*rescore=true"):
        _run(rules, create_proposer("replay", {"path": str(tmp_path / "t")}), worth=other)
    rescored = _run(
        rules, create_proposer("replay", {"path": str(tmp_path / "t"), "rescore": True}), worth=other
    )
    assert {c.template for c in rescored.candidates} == {c.template for c in outcome.candidates}
    assert "photo" in rescored.candidates[0].template


@pytest.mark.parametrize("change", ["score", "order", "removed"])
def test_a_changed_transcript_is_refused(change: str, rules: Rules, tmp_path: Path) -> None:
    path = tmp_path / "t"
    _run(rules, Grammar(), path)
    lines = path.read_text().splitlines(keepends=True)
    if change == "score":
        record = json.loads(lines[3])
        record["scores"][0][1]["accuracy"] = 1.0
        lines[3] = json.dumps(record) + "\n"
    elif change == "order":
        lines[3], lines[4] = lines[4], lines[3]
    else:
        del lines[3]
    path.write_text("".join(lines))
    with pytest.raises(CheckpointError, match="line 4: the transcript was changed after it was written"):
        create_proposer("replay", {"path": str(path)})
    with pytest.raises(CheckpointError, match="was changed"):
        _run(rules, Grammar(), path, resume=True)


def test_a_search_that_did_not_end_is_no_replay(rules: Rules, tmp_path: Path) -> None:
    path = tmp_path / "t"
    _run(rules, Grammar(), path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(CheckpointError, match="did not end"):
        create_proposer("replay", {"path": str(path)})
    path.write_text("not json\n")
    with pytest.raises(CheckpointError, match="line 1: this is no line of a transcript"):
        create_proposer("replay", {"path": str(path)})
    with pytest.raises(CheckpointError, match="there is no transcript"):
        create_proposer("replay", {"path": str(tmp_path / "none")})


def test_pairs_for_preference_training(rules: Rules, tmp_path: Path) -> None:
    texts = ["a sketch of {}.", "a sketch of {} on paper.", "a {} seen."]
    _run(rules, Scripted(texts), tmp_path / "t")
    pairs = preference_pairs(read_transcript(tmp_path / "t")[1])
    assert pairs[0]["better"] == "a sketch of {}."
    assert all(pair["margin"] == pytest.approx(0.2) for pair in pairs)
    assert {pair["worse"] for pair in pairs} == {"a photo of a {}.", "a {} seen.", "a sketch of {}."}
