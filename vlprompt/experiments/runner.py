"""The one way to run an experiment: its cells, wherever they run, then tables, figures and the report.

The runner owns the run's folder. A cell that fails stops no other. Running the same configuration on the same data
again keeps what is finished and continues the rest; a finished run says so and stays as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprompt.core.errors import CheckpointError, VLPromptError
from vlprompt.core.files import write_json, write_text
from vlprompt.core.processes import fix_products, meet, process_state
from vlprompt.experiments.cell import Cell, CellResult, Failure
from vlprompt.experiments.executors import EXECUTORS, check_executor, compute_cell, create_executor
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.folder import RunFolder, environment, yaml_text
from vlprompt.experiments.jobs import queued_on
from vlprompt.experiments.report import RunRecord, write_report
from vlprompt.experiments.results import Results
from vlprompt.experiments.schedule import Progress, Schedule
from vlprompt.experiments.tables import Table, write_tables
from vlprompt.training.callbacks import Callback, check_callbacks
from vlprompt.training.trackers import check_trackers, missing_trackers

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RunOutcome", "describe_plan", "run_experiment", "what_is_missing"]

log = logging.getLogger("vlprompt.run")


@dataclass(frozen=True)
class RunOutcome:
    """What a run produced.

    Attributes:
        folder: Holds ``config.yaml``, ``results.jsonl``, ``metrics.json``, ``table.md``, ``.csv``, ``.tex``,
            ``report.html`` and ``cells/``.
        metrics: The content of ``metrics.json``.
        headline: Key of the figure to say first.
        results: The long table.
        tables: Of the results, for people.
        failures: One sentence per reason for which cells failed.
        finished_before: Whether an earlier command had done everything already.
    """

    folder: Path
    metrics: dict[str, Any]
    headline: str
    results: Results = field(repr=False)
    tables: list[Table] = field(repr=False, default_factory=list)
    failures: list[str] = field(default_factory=list)
    finished_before: bool = False

    @property
    def exit_code(self) -> int:
        """0 if every cell finished, else 1."""
        return 1 if self.failures else 0

    @property
    def text(self) -> str:
        """The tables as Markdown."""
        return "\n".join(table.markdown() for table in self.tables)

    def frame(self) -> pd.DataFrame:
        """Return the long table as a data frame: a line per cell and metric, coordinates as columns."""
        return self.results.frame()


def run_experiment(
    experiment: Experiment,
    *,
    on: str = "serial",
    restart: bool = False,
    resume: bool = False,
    join: bool = False,
    attach: bool = False,
    command: str = "",
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunOutcome:
    """Run every cell that is not finished yet, and write what they say together.

    Args:
        experiment: What to run.
        on: The executor: ``"serial"``, ``"processes:N"``, ``"ray"`` or ``"slurm"``, with its options.
        restart: Move an earlier run of the same configuration and data aside, and begin anew.
        resume: Fail if there is nothing to continue.
        join: Work beside other commands that write the same run, here or on other machines.
        attach: Wait for jobs that an earlier command left in a queue, and write what they come to; ``on`` is not used.
        command: What repeats the run, for the report and ``metrics.json``.
        progress: Called with (name of the run, cells done, cells).
        callbacks: Take part in every training (see :class:`Callback`). In other processes there are copies of
            them; only :meth:`Callback.on_cell` is called on those that were passed.

    Raises:
        ConfigError: If a tracker isn't installed, or an option of ``on`` is none.
        UnknownNameError: For an unknown executor.
        CheckpointError: If another process is writing this run, ``resume`` finds nothing, which says what differs, or
            ``attach`` finds no jobs.
        VLPromptError: If no cell finished, for one reason.
    """
    check_trackers(experiment.config.tracking.trackers)
    check_callbacks(callbacks)
    if not attach:
        check_executor(on)
    experiment.callbacks = tuple(callbacks)
    fix_products()
    folder = RunFolder(experiment.config, experiment.sources())
    cells = _plan(experiment)
    state = process_state()
    if not state.is_main_process:
        return _follow(experiment, folder, cells)

    if restart and (resume or join or attach):
        raise VLPromptError("restart begins anew; resume, join and attach continue: give one of them.")
    if attach and on != "serial" and not EXECUTORS.get(on.partition(":")[0]).target.outlives_command:
        raise VLPromptError(f"--attach waits for the jobs that an earlier command left: leave out --on {on}.")
    with folder.held(join=join, restart=restart):
        if resume and not folder.exists:
            raise CheckpointError(
                f"there is nothing to continue for this configuration: {folder.difference()}"
            )
        if restart and (moved := folder.move_aside()) is not None:
            log.info("the earlier run is now %s", moved)
        if folder.finished:
            meet()
            return _finished(experiment, folder, cells)

        # Built before the folder, so that a mistake in ``on`` leaves no empty run behind.
        with create_executor(queued_on(folder.path) if attach else on, experiment, attach) as executor:
            folder.start()
            finished = _finished_cells(folder, cells)
            if finished:
                log.info("%s: %d of %d cells are finished already", folder.path, len(finished), len(cells))
            meet()
            failures = Schedule(executor, folder, cells, finished, progress, callbacks).run()
        return _conclude(experiment, folder, cells, finished, failures, command)


def describe_plan(experiment: Experiment) -> str:
    """Return what a run would do, as lines: its cells, what they need, what is finished, and what is missing."""
    folder = RunFolder(experiment.config, experiment.sources())
    cells = _plan(experiment)
    lines = [f"{folder.path}: {len(cells)} cells"]

    for cell in cells:
        finished = " (finished)" if folder.cell(cell).result() is not None else ""
        needs = f"  needs {', '.join(cell.needs)}" if cell.needs else ""
        lines.append(f"  {cell.name}{finished}{needs}")

    missing = what_is_missing(experiment)
    lines += [f"missing: {sentence}" for sentence in missing]
    lines.append("nothing is missing" if not missing else f"{len(missing)} things are missing")

    return "\n".join(lines)


def what_is_missing(experiment: Experiment) -> list[str]:
    """Return what must be fetched, made or installed before a run, a sentence each."""
    return [*experiment.missing(), *missing_trackers(experiment.config.tracking.trackers)]


def _plan(experiment: Experiment) -> list[Cell]:
    """Return the cells; two that would share a folder are a mistake in the configuration."""
    cells = experiment.cells()
    names: dict[str, Cell] = {}

    for cell in cells:
        other = names.setdefault(cell.name.casefold(), cell)
        if other is not cell:
            raise VLPromptError(
                f"two cells of {experiment.config.name} would share the folder {cell.name!r}: {other.where} and "
                f"{cell.where}. Give them labels that differ in letters or numbers."
            )

    return cells


def _conclude(
    experiment: Experiment,
    folder: RunFolder,
    cells: Sequence[Cell],
    finished: dict[Cell, CellResult],
    failures: dict[Cell, Failure],
    command: str,
) -> RunOutcome:
    """Write the files of the whole run."""
    messages = {failure.message for failure in failures.values()}
    causes = [failure for failure in failures.values() if not failure.message.startswith("it needs ")]
    if not finished and (len(messages) == 1 or len(causes) == 1):
        raise causes[0].exception()

    failures = {cell: failures[cell] for cell in cells if cell in failures}
    ordered = {cell: finished[cell] for cell in cells if cell in finished}
    results = Results.of(ordered)
    sentences = _sentences(failures)
    layout = experiment.layout()
    facts: dict[str, Any] = {}

    for result in ordered.values():
        facts |= result.facts

    metrics = {
        "runs": float(len(cells)),
        "runs_failed": float(len(failures)),
        **experiment.summary(results),
        **experiment.facts(),
        **facts,
        **environment(),
        "command": command,
    }
    write_text(folder.path / "results.jsonl", results.text())
    write_json(folder.path / "metrics.json", metrics)
    tables = experiment.tables(results)
    write_tables(folder.path, tables)
    experiment.write_files(results, folder.path)

    record = RunRecord(
        title=folder.parent.name,
        metrics=_numbers(metrics),
        tables=tables,
        failures=sentences,
        config=yaml_text(experiment.config, frozenset({"output"})),  # the same page in any folder
        command=command,
        environment=environment(),
    )
    experiment.page(record, results, folder.path)
    write_report(folder.path / "report.html", record)

    if not failures:
        folder.finish(layout.headline)
    return RunOutcome(folder.path, metrics, layout.headline, results, tables, sentences)


def _finished(experiment: Experiment, folder: RunFolder, cells: Sequence[Cell]) -> RunOutcome:
    """Return what a complete run holds, without changing anything."""
    results = Results.of(_finished_cells(folder, cells))
    metrics = json.loads((folder.path / "metrics.json").read_text(encoding="utf-8"))
    headline = experiment.layout().headline
    return RunOutcome(
        folder.path, metrics, headline, results, experiment.tables(results), finished_before=True
    )


def _follow(experiment: Experiment, folder: RunFolder, cells: Sequence[Cell]) -> RunOutcome:
    """Take part in a run as one of several processes of a ``torchrun``; the main process writes and says everything."""
    meet()
    finished = _finished_cells(folder, cells)
    failures: dict[Cell, Failure] = {}

    if not folder.finished:
        for cell in cells:
            if cell not in finished:
                answer = compute_cell(experiment, folder.cell(cell))
                if isinstance(answer, Failure):
                    failures[cell] = answer
                else:
                    finished[cell] = answer

    results = Results.of(finished)
    return RunOutcome(folder.path, {}, experiment.layout().headline, results, failures=_sentences(failures))


def _finished_cells(folder: RunFolder, cells: Sequence[Cell]) -> dict[Cell, CellResult]:
    """Return the results of the cells that an earlier command finished."""
    results = {cell: folder.cell(cell).result() for cell in cells}
    return {cell: result for cell, result in results.items() if result is not None}


def _sentences(failures: dict[Cell, Failure]) -> list[str]:
    """Return one sentence per reason: what stops all cells of a data set is said once."""
    stopped: dict[str, list[str]] = {}
    for cell, failure in failures.items():
        stopped.setdefault(failure.message, []).append(cell.name)

    sentences = []

    for message, names in stopped.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        sentences.append(f"{names[0]}{others}: {message}")

    return sentences


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
