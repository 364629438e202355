"""The record of a search, line by line as it happens: what was asked, what came back, what was scored.

A line is JSON with a ``seal``, the hash of the line and of the seal before it, so that a line that was changed, moved
or taken out is noticed. A line is on the disk before the next request is sent, and a last line that a kill cut short
is left out when the search goes on. No key is ever in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlprompt.core.errors import CheckpointError
from vlprompt.text_search.budget import Usage
from vlprompt.text_search.scorer import Score

__all__ = ["Exchange", "Step", "Transcript", "preference_pairs", "read_transcript"]

FORMAT = 1
"""Of the file; a newer one is refused."""


@dataclass(frozen=True)
class Exchange:
    """A request and what came back.

    Attributes:
        step: The step that it belongs to; -1 for a description of an image.
        request: What was sent; images as their hashes.
        reply: What came back, raw; empty if nothing did.
        usage: What it cost.
        error: Why nothing came back, or empty.
    """

    step: int
    request: str
    reply: str
    usage: Usage
    error: str = ""

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "kind": "exchange",
            "step": self.step,
            "request": self.request,
            "reply": self.reply,
            "usage": self.usage.record(),
            "error": self.error,
        }


@dataclass(frozen=True)
class Step:
    """One round of a search.

    Attributes:
        number: From 0; the start is 0.
        scores: Template to score, in the order of the proposals.
        rejected: (proposal, why) of those that were not scored.
        exhausted: Whether the proposer had nothing left.
    """

    number: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    rejected: tuple[tuple[str, str], ...] = ()
    exhausted: bool = False

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "kind": "step",
            "step": self.number,
            "scores": [[template, score.record()] for template, score in self.scores.items()],
            "rejected": [list(pair) for pair in self.rejected],
            "exhausted": self.exhausted,
        }


@dataclass(frozen=True)
class _Content:
    """What a transcript holds.

    Attributes:
        header: Scorer, proposer and settings.
        exchanges: All, in order.
        steps: All that were finished, in order.
        result: What was found; None if the search did not end.
        seal: Of the last line.
        size: Bytes of all whole lines.
    """

    header: Mapping[str, Any]
    exchanges: tuple[Exchange, ...]
    steps: tuple[Step, ...]
    result: Mapping[str, Any] | None
    seal: str
    size: int


class Transcript:
    """A transcript that is being written; without a path it is held in memory alone.

    Args:
        path: The file; None writes none.
        header: What the search is: a search that goes on must be the same.
        resume: Whether to go on with the file that is there. Otherwise an older file is kept under another name.

    Attributes:
        steps: Those of the file that it goes on with.
        exchanges: Those of the file that it goes on with.

    Raises:
        CheckpointError: If the file was changed, or is of another search; names the difference.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], resume: bool = False) -> None:
        self.path = path
        self.steps: tuple[Step, ...] = ()
        self.exchanges: tuple[Exchange, ...] = ()
        self._seal = ""
        self._is_done = False
        content = {"kind": "header", "format": FORMAT, **header}

        if path is not None and path.is_file():
            if resume and self._continues(path, content):
                return
            if not resume:
                _set_aside(path)

        self._write(content)

    def exchange(self, exchange: Exchange) -> None:
        """Write a request and its reply."""
        self._write(exchange.record())

    def step(self, step: Step) -> None:
        """Write a finished step."""
        self._write(step.record())

    def result(self, record: Mapping[str, Any]) -> None:
        """Write what was found; once."""
        if not self._is_done:
            self._write({"kind": "result", **record})

    def _continues(self, path: Path, header: Mapping[str, Any]) -> bool:
        """Take over what a file holds; False if not even its header is whole."""
        content = _read(path)
        if content is None:
            path.unlink()
            return False

        plain = json.loads(_line(header))
        differs = [key for key in plain if content.header.get(key) != plain[key]]
        if differs:
            key = differs[0]
            raise CheckpointError(
                f"{path} is the transcript of another search: {key} is {content.header.get(key)!r} there and "
                f"{plain[key]!r} here. Move it away, or write to another folder."
            )

        with path.open("r+b") as file:  # what a kill left of a last line
            file.truncate(content.size)
        self.steps = content.steps
        self.exchanges = content.exchanges
        self._seal = content.seal
        self._is_done = content.result is not None
        return True

    def _write(self, record: Mapping[str, Any]) -> None:
        line = _line(record)
        self._seal = _seal(self._seal, line)
        if self.path is None:
            return

        sealed = json.dumps({**json.loads(line), "seal": self._seal}, ensure_ascii=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{sealed}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"could not write {self.path}: {error.strerror or error}.") from error


def read_transcript(path: Path) -> tuple[Mapping[str, Any], tuple[Step, ...], Mapping[str, Any]]:
    """Return header, steps and result of a search that ended.

    Raises:
        CheckpointError: If the file is missing, was changed, or its search did not end.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no transcript {str(path)!r}.")
    content = _read(path)
    if content is None or content.result is None:
        raise CheckpointError(
            f"{path}: the search did not end. The command that began it goes on where it stopped."
        )
    return content.header, content.steps, content.result


def preference_pairs(steps: Sequence[Step], margin: float = 0.01) -> list[dict[str, Any]]:
    """Return (worse, better) templates of a transcript, for whoever trains a language model on preferences.

    Templates are ranked by accuracy; each is paired with the next one that is better by the margin at least.

    Args:
        steps: See :func:`read_transcript`.
        margin: The least difference of accuracy, a fraction.

    Returns:
        ``{"worse", "better", "margin"}`` each, the largest margin first.
    """
    scores = {template: score.accuracy for step in steps for template, score in step.scores.items()}
    ranked = sorted(scores, key=lambda template: (scores[template], template))
    pairs = []

    for place, worse in enumerate(ranked):
        better = next((t for t in ranked[place + 1 :] if scores[t] - scores[worse] >= margin), None)
        if better is not None:
            pairs.append({"worse": worse, "better": better, "margin": scores[better] - scores[worse]})

    return sorted(pairs, key=lambda pair: (-pair["margin"], pair["worse"]))


def _read(path: Path) -> _Content | None:
    """Return what a file holds; None if not even its first line is whole."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}.") from error

    records: list[dict[str, Any]] = []
    seal = ""
    size = 0
    for number, raw in enumerate(data.splitlines(keepends=True), 1):
        if not raw.endswith(b"\n"):  # only the last line can be cut short
            break
        record = _unsealed(path, number, raw)
        seal = _seal(seal, _line({key: value for key, value in record.items() if key != "seal"}))
        if record.pop("seal", None) != seal:
            raise CheckpointError(
                f"{path}, line {number}: the transcript was changed after it was written, so it proves nothing."
            )
        records.append(record)
        size += len(raw)

    if not records:
        return None
    return _content(path, records, seal, size)


def _unsealed(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}, line {number}: this is no line of a transcript: {error}.") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}, line {number}: this is no line of a transcript.")
    return record


def _content(path: Path, records: Sequence[dict[str, Any]], seal: str, size: int) -> _Content:
    try:
        if records[0]["kind"] != "header":
            raise KeyError("header")
        if records[0]["format"] > FORMAT:
            raise CheckpointError(f"{path} was written by a newer vlprompt.")

        exchanges = [_exchange(record) for record in records if record["kind"] == "exchange"]
        steps = [_step(record) for record in records if record["kind"] == "step"]
        results = [record for record in records if record["kind"] == "result"]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no transcript of a search: {error}.") from error

    return _Content(records[0], tuple(exchanges), tuple(steps), results[0] if results else None, seal, size)


def _exchange(record: Mapping[str, Any]) -> Exchange:
    return Exchange(
        record["step"],
        record["request"],
        record["reply"],
        Usage.from_record(record["usage"]),
        record["error"],
    )


def _step(record: Mapping[str, Any]) -> Step:
    scores = {template: Score.from_record(score) for template, score in record["scores"]}
    rejected = tuple((text, reason) for text, reason in record["rejected"])
    return Step(record["step"], scores, rejected, record["exhausted"])


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, ensure_ascii=True)


def _seal(before: str, line: str) -> str:
    return hashlib.sha256(f"{before}\n{line}".encode()).hexdigest()[:32]


def _set_aside(path: Path) -> None:
    """Rename an older transcript, which may have cost money, to the first free ``name-1.jsonl``."""
    number = 1
    while (other := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(other)
