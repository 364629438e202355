"""``vlprompt search``: read what a configuration leaves open, let workers run trials, write the best configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.files import write_jsonl, write_text
from vlprompt.core.processes import process_state
from vlprompt.experiments.apart import run_apart
from vlprompt.experiments.cell import Cell, CellResult, Failure
from vlprompt.experiments.config import ExperimentConfig, config_path
from vlprompt.experiments.executors import check_executor
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.folder import RunFolder, yaml_text
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.search.options import SearchOptions
from vlprompt.experiments.search.study import Attempt, Study, TrialRecord, best_first, import_optuna
from vlprompt.experiments.search.trials import Trials
from vlprompt.experiments.tables import Row, Table
from vlprompt.experiments.tasks import read_experiment

__all__ = ["SearchOutcome", "search"]

log = logging.getLogger("vlprompt.run")

_SHOWN = 5  # trials in the table
_EXAMPLE = "search: {objective: accuracy, space: {train.lr: {low: 0.001, high: 0.1, log: true}}}"


@dataclass(frozen=True)
class SearchOutcome:
    """What a search left behind.

    Attributes:
        folder: Holds ``best.yaml``, ``trials.jsonl``, ``trials/`` with the run of every trial, and ``study.db`` unless
            another storage was named.
        best: The best configuration, which ``vlprompt run`` takes.
        objective: Name of the figure that was searched by.
        value: The best trial's.
        params: Dotted key to the best trial's value.
        trials: What became of every trial, in order.
    """

    folder: Path
    best: Path
    objective: str
    value: float
    params: dict[str, Any]
    trials: list[TrialRecord] = field(repr=False)
    direction: str = "maximize"

    def table(self) -> Table:
        """Return the best trials as a table."""
        ranked = best_first(self.trials, self.direction)[:_SHOWN]
        rows = []
        for record in ranked:
            shown = ", ".join(f"{key}={_short(value)}" for key, value in record.params.items())
            if record.value is not None:
                rows.append(Row(f"trial {record.place}: {shown}", {self.objective: record.value}))
        formats = {self.objective: ".4f"}
        return Table(rows, title="The best trials, on validation data", best=False, formats=formats)


def search(
    cfg: str | Path, overrides: Sequence[str] = (), *, on: str = "serial", storage: str | None = None
) -> SearchOutcome:
    """Search what the ``search:`` section of a configuration leaves open; ``vlprompt search`` does the same.

    A search that was stopped continues; one that is finished is returned as it is. Any number of processes, on any
    number of machines that reach the storage, may search the same configuration at the same time; what is tried does
    not depend on it. No trial scores anything on test data.

    Args:
        cfg: A path, or the name of a shipped file.
        overrides: ``dotted.key=value`` strings.
        on: Where workers run, each a trial at a time: ``"serial"``, ``"processes:N"`` or another executor.
        storage: A database, for example ``"postgresql+psycopg://user@host/name"``; None for SQLite in the search's
            folder.

    Raises:
        ConfigError: With every mistake at once: no ``search:`` section, keys that the configuration doesn't have,
            values that they don't take, an objective that is measured on test data.
        UnknownNameError: If there is no such file, figure or executor.
        VLPromptError: If optuna isn't installed, the database can't be used, or no trial finished.
    """
    if process_state().num_processes > 1:
        raise VLPromptError(
            "vlprompt search runs without torchrun: start it several times, or add --on processes:N."
        )
    import_optuna()
    check_executor(on)

    path = str(config_path(cfg).resolve())
    plain = read_experiment(path, overrides)
    options = plain.config.search
    if options is None:
        raise ConfigError(
            [f"search: this file says nothing of what is searched. An example: {_EXAMPLE}"], str(cfg)
        )

    trials = Trials(path, list(overrides), options, Path())
    _check(trials, plain, str(cfg))

    folder = _folder(plain, options)
    trials = Trials(path, list(overrides), options, folder / "trials")
    folder.mkdir(parents=True, exist_ok=True)
    work = SearchWork(
        task=SearchWork.expected_task,
        cfg=path,
        overrides=list(overrides),
        search=options,
        folder=str(folder),
        study=f"{plain.config.name}-{folder.name}",
        storage=storage or f"sqlite:///{folder / 'study.db'}",
    )
    study = work.open()
    _run_workers(work, study, on)
    return _conclude(trials, study, folder)


class SearchWork(ExperimentConfig):
    """What a worker needs to know."""

    expected_task: ClassVar[str] = "search"

    cfg: str
    overrides: list[str]
    folder: str
    study: str
    storage: str

    def open(self) -> Study:
        """Return the study."""
        assert self.search is not None
        return Study(self.storage, self.study, self.search)


class SearchWorkers(Experiment):
    """The workers of a search as cells, so that executors run them: each runs trials until there are none."""

    config: SearchWork

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`."""
        return [Cell.at(worker=0)]

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        work = self.config
        assert work.search is not None
        trials = Trials(work.cfg, work.overrides, work.search, Path(work.folder) / "trials")

        def attempt(one: Attempt) -> float:
            shown = ", ".join(f"{key}={_short(value)}" for key, value in one.params.items())
            log.info("trial %d of %d: %s", one.place, trials.options.trials, shown)
            return trials.run(one)

        work.open().work(attempt)
        return CellResult()

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        return Layout("")


def _run_workers(work: SearchWork, study: Study, on: str) -> None:
    """Run as many workers as a round has trials; one that is lost costs nothing while another goes on."""
    assert work.search is not None
    cells = [Cell.at(worker=number) for number in range(work.search.together)]
    failures: list[Failure] = []
    for cell, answer in run_apart(on, SearchWorkers(work), cells, Path(work.folder) / "workers"):
        if isinstance(answer, Failure):
            failures.append(answer)
            log.error("%s of the search ended: %s", cell.name, answer.message)

    if failures and len(study.records()) < study.options.trials:
        raise failures[0].exception()


def _conclude(trials: Trials, study: Study, folder: Path) -> SearchOutcome:
    """Write what all trials say together."""
    records = study.records()
    best = study.best()
    assert best.value is not None
    objective = trials.options.objective

    name = f"best_{read_experiment(trials.cfg, trials.overrides).config.name}"
    config = trials.best_experiment(best.params, f"name={name}").config
    head = (
        f"# The best of {len(records)} trials of {Path(trials.cfg).name}: {objective} {best.value:.6g} on validation "
        f"data (trial {best.place}).\n#   vlprompt run best.yaml\n"
    )
    write_text(folder / "best.yaml", head + yaml_text(config, frozenset({"search", "expect"})))
    write_jsonl(folder / "trials.jsonl", [record.record() for record in records])

    return SearchOutcome(
        folder,
        folder / "best.yaml",
        objective,
        best.value,
        dict(best.params),
        records,
        trials.options.direction,
    )


def _folder(plain: Experiment, options: SearchOptions) -> Path:
    """Return where a search writes: a hash of the configuration, of what is searched and of the data is in its name."""
    searched = options.model_dump_json(exclude={"trials"})
    run = RunFolder(plain.config, {**plain.sources(), "search": searched})
    return (run.parent / f"search-{run.path.name}").absolute()


def _check(trials: Trials, plain: Experiment, source: str) -> None:
    """Refuse, before anything runs, what no trial could do.

    Raises:
        ConfigError: With every mistake at once.
    """
    problems: list[str] = []
    for key, dimension in trials.options.space.items():
        for value in dimension.extremes():
            try:
                trials.best_experiment({key: value})
            except ConfigError as error:
                problems += [f"search.space.{key}: {problem}" for problem in error.problems]
            except VLPromptError as error:
                problems.append(f"search.space.{key}: {error}")

    try:
        experiment = trials.experiment({})
    except ConfigError as error:
        problems += [f"search.changes: {problem}" for problem in error.problems]
    else:
        problems += _objective_problems(trials.options.objective, plain, experiment)

    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), source)


def _objective_problems(objective: str, plain: Experiment, experiment: Experiment) -> list[str]:
    """Return why a figure can't be searched by."""
    of_training = (
        "train/val/" in objective
    )  # the configuration does not foretell what a training says of itself
    if not plain.on_validation and "val" not in objective.split("/"):
        task = plain.config.task
        return [
            f"search.objective: {objective!r} of a {task!r} is measured on test data, which nothing is ever chosen by; "
            "only figures with a part val, such as train/val/loss, are of validation data."
        ]

    figures = experiment.figures()
    if objective not in figures and not of_training:
        return [f"search.objective: {UnknownNameError('figure', objective, figures)}"]
    return []


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
