"""Several configurations in one table: the same protocol, data and seeds for every method."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.config import RunConfig, load_config, read_yaml
from vlprompt.errors import ConfigError, VLPromptError
from vlprompt.evaluation import tables
from vlprompt.evaluation.cells import Cell
from vlprompt.evaluation.gains import paired_gains
from vlprompt.evaluation.side_by_side import side_by_side
from vlprompt.evaluation.statistics import Summary
from vlprompt.files import write_text
from vlprompt.signature import describe_problems
from vlprompt.training.run import Outcome, run

__all__ = ["Comparison", "ComparisonOutcome", "compare"]

log = logging.getLogger("vlprompt.compare")


class Comparison(BaseModel):
    """Options of :func:`compare`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("comparison", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    runs: dict[str, str] = Field(
        min_length=1,
        description="row name to a configuration and its own overrides, for example "
        "{vpt: vpt_tiny.yaml, shallow: vpt_tiny.yaml learner.visual_depth=1}",
    )
    shared: list[str] = Field(default_factory=list, description="overrides of all runs")
    baseline: str | None = Field(None, description="row that the others' paired gains are over")

    @classmethod
    def read(cls, cfg: str | Path, overrides: Sequence[str] = ()) -> Comparison:
        """Read a configuration file; ``overrides`` are overrides of all its runs.

        Raises:
            ConfigError: With every mistake at once.
            UnknownNameError: If there is no such file.
        """
        raw = read_yaml(cfg, tool="compare")
        try:
            found = cls.model_validate({**raw, "shared": [*raw.get("shared", []), *overrides]})
        except ValidationError as error:
            raise ConfigError(describe_problems(error, cls), str(cfg)) from error
        if found.baseline is not None and found.baseline not in found.runs:
            raise ConfigError(
                [f"baseline: {found.baseline!r} is none of the runs: {', '.join(found.runs)}."], str(cfg)
            )
        return found

    def configs(self) -> dict[str, RunConfig]:
        """Return the resolved configuration of every run.

        Raises:
            ConfigError: With the mistakes of all runs.
        """
        found: dict[str, RunConfig] = {}
        problems: list[str] = []
        folder = f"output={Path(self.output) / self.name}"
        for label, words in self.runs.items():
            cfg, *own = shlex.split(words)
            try:
                found[label] = load_config(cfg, [*own, *self.shared, folder])
            except ConfigError as error:
                problems += [f"{label}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(problems, f"runs of {self.name}")
        return found


@dataclass(frozen=True)
class ComparisonOutcome:
    """What a comparison produced.

    Attributes:
        folder: Holds ``comparison.md``, ``.csv``, ``.tex`` and a folder per run.
        text: The Markdown table.
        failures: One sentence per run or cell that failed.
    """

    folder: Path
    text: str
    failures: list[str]


def compare(comparison: Comparison, resume: bool = False) -> ComparisonOutcome:
    """Run every configuration; one that fails is reported at the end, and the others go on.

    Args:
        comparison: What to run.
        resume: Keep what finished before.

    Raises:
        ConfigError: If any configuration is wrong, before the first one runs.
        VLPromptError: If no run finished.
    """
    finished: dict[str, Outcome] = {}
    failures: list[str] = []
    for label, config in comparison.configs().items():
        log.info("--- %s", label)
        try:
            finished[label] = run(config, resume)
            failures += [f"{label}: {failure}" for failure in finished[label].failures]
        except VLPromptError as error:
            failures.append(f"{label}: {error}")
    if not finished:
        raise VLPromptError(f"no run of {comparison.name} finished: {'; '.join(failures)}")
    folder = Path(comparison.output) / comparison.name
    shown = [{**outcome.metrics, "learner": label} for label, outcome in finished.items()]
    gains = _gains(finished, comparison.baseline)
    for form, suffix in (("markdown", "md"), ("csv", "csv"), ("latex", "tex")):
        table = side_by_side(shown, form)  # type: ignore[arg-type]  # the literal's values
        write_text(
            folder / f"comparison.{suffix}", table + (f"\n{gains}" if gains and form == "markdown" else "")
        )
    return ComparisonOutcome(folder, (folder / "comparison.md").read_text(encoding="utf-8"), failures)


def _gains(finished: Mapping[str, Outcome], baseline: str | None) -> str:
    """Return a table of paired gains over the baseline, in points, with intervals over seeds and over tasks."""
    if baseline is None or baseline not in finished:
        return ""
    theirs = _cells(finished[baseline])
    rows = []
    for label, outcome in finished.items():
        if label == baseline:
            continue
        metric = "accuracy" if outcome.headline.endswith("accuracy") else outcome.headline
        flat = paired_gains(_cells(outcome), theirs, metric)
        values = {
            f"{key.split('/')[1].removeprefix('shots')}-shot {metric}, {what}": Summary(
                flat[key], None, flat.get(f"{key}_ci95"), 0
            )
            for key in flat
            for kind, what in (("gain", "seeds"), ("gain_over_tasks", "tasks"))
            if key.startswith(f"{kind}/shots") and key.endswith(metric)
        }
        rows.append(tables.Row(label, dict(values)))
    title = f"Gain over {baseline} in points, paired, with 95 % intervals over seeds and over tasks:"
    return f"{title}\n\n{tables.to_markdown(rows, best=False)}"


def _cells(outcome: Outcome) -> dict[Cell, dict[str, Any]]:
    record = json.loads((outcome.folder / "cells.json").read_text(encoding="utf-8"))
    return {Cell(c["dataset"], c["shots"], c["seed"]): c["metrics"] for c in record["cells"]}
