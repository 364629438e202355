"""Searching training options, prompt depth and a method's own options on validation data, as TuneVLSeg does.

Every model, method and data set has a study of its own, ``study.db`` (SQLite) in the folder of its cell. The least
validation loss wins, and nothing is ever scored on test data. A killed search continues behind its last finished
trial; the trial that was killed runs again. What a trial tries depends on the seed and the trials before it alone, not
on how often it was killed.

Paper: TuneVLSeg, ACCV 2024, 2410.05239 (TPE, 10 random of 20 trials, one objective).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlprompt.core.errors import VLPromptError
from vlprompt.core.files import write_text
from vlprompt.core.options import options_model
from vlprompt.core.seeding import derive_seed
from vlprompt.experiments.cell import Cell, CellResult, Coordinate
from vlprompt.experiments.folder import yaml_text
from vlprompt.experiments.layout import Layout, label
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.tables import Row, Table
from vlprompt.segmentation import SEGMENTERS, STRATEGIES
from vlprompt.segmentation.config import Dimension, SearchConfig, SegmentationConfig
from vlprompt.segmentation.protocols.base import SegmentationExperiment
from vlprompt.training.callbacks import Callback, TrainingView

__all__ = ["SearchExperiment"]

log = logging.getLogger("vlprompt.run")

_TRAIN = "train."
_STUDY = "study"  # the name inside the SQLite file
_MOST_FAILURES = 3  # of the first trials; then all would fail
_ROW = ("model", "method")
_COLUMNS = {"loss": ".4f", "trials": ".0f", "pruned": ".0f"}


class SearchExperiment(SegmentationExperiment):
    """A cell is a study: all trials of one method of one model on one data set.

    It leaves ``study.db`` and ``best.yaml``, the configuration of a benchmark with the best trial's options.
    """

    config_type: ClassVar[type[SegmentationConfig]] = SearchConfig
    config: SearchConfig

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`.

        Raises:
            VLPromptError: If nothing can be varied.
        """
        cells = []
        protocol = self.config.protocol

        for data in self.config.data.names:
            for model, method in self.config.pairs():
                if not self._space(model, method):
                    continue
                for images in protocol.images:
                    cells.append(
                        Cell.at(model=model, method=method, data=data, images=images, seed=protocol.seeds[0])
                    )

        if not cells:
            raise VLPromptError(
                "there is nothing to search: no method learns, or none has an option of search.space."
            )

        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        study = _Study(self, cell, folder, self._bounded_space(cell))
        study.run()
        best = study.best()
        self._write_best(cell, folder, best.params)

        result = CellResult()
        result.facts[f"backbone/{cell['model']}"] = self.backbone(cell["model"]).fingerprint
        result.facts[f"{self._key(cell.where)}/params"] = best.params
        result.add({"loss": best.value, "trials": study.finished(), "pruned": study.pruned()})
        return result

    def sketch(self, cell: Cell) -> CellResult:
        """See :meth:`Experiment.sketch`."""
        result = CellResult()
        result.sketch(tuple(_COLUMNS))
        return result

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        headline = f"{self._key(self.cells()[-1].where)}/loss"
        return Layout(headline, metric="loss", rows=self._rows, average="")

    def summary(self, results: Results) -> dict[str, float]:
        """See :meth:`Experiment.summary`: the least validation loss of every study, and how many trials it took."""
        figures = {}
        for line in results.lines:
            figures[f"{self._key(line.where)}/{line.metric}"] = line.value
        return figures

    def tables(self, results: Results) -> list[Table]:
        """See :meth:`Experiment.tables`: one for each data set."""
        tables = []
        for (data,), lines in results.by("data").items():
            rows = []
            for key, group in lines.by(*self._rows).items():
                values = {name: group.select(name).values()[0] for name in _COLUMNS}
                rows.append(Row(label(self._rows, key), dict(values)))
            tables.append(Table(rows, title=f"Least validation loss on {data}", best=False, formats=_COLUMNS))

        return tables

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`."""
        options = self.config.search
        record.title = f"Search on {', '.join(self.config.data.names)}"
        record.summary = (
            f"{options.trials} trials, {options.startup} of them random; validation loss, nothing is scored on test "
            "data. best.yaml in the folder of each cell is the configuration with the best options."
        )

    @property
    def _rows(self) -> tuple[str, ...]:
        return (*_ROW, "images") if len(self.config.protocol.images) > 1 else _ROW

    def _key(self, where: Mapping[str, Coordinate]) -> str:
        """Return the beginning of a study's keys in ``metrics.json``."""
        key = f"{where['model']}/{where['method']}"
        if len(self.config.protocol.images) > 1:
            key += f"/images{where.get('images') or 'all'}"
        return f"{key}/{where['data']}"

    def _space(self, model: str, method: str) -> dict[str, Dimension]:
        """Return the dimensions that a model and a method have; empty if nothing learns."""
        strategy = STRATEGIES.get(self.config.method(method).name).target
        if strategy.tunes == "nothing":
            return {}

        segmenter = SEGMENTERS.get(self.config.model(model).name).target
        options = {*options_model(strategy).model_fields, *options_model(segmenter).model_fields}
        wanted = {**self.config.search.space, **self.config.search.own.get(method, {})}
        return {key: wanted[key] for key in wanted if key.startswith(_TRAIN) or key in options}

    def _bounded_space(self, cell: Cell) -> dict[str, Dimension]:
        """Return a cell's dimensions, the depth never beyond the layers of the towers."""
        space = self._space(cell["model"], cell["method"])
        depth = space.get("depth")
        if depth is None or depth.high is None:
            return space

        strategy = STRATEGIES.get(self.config.method(cell["method"]).name).target
        backbone = self.backbone(cell["model"])
        layers = [depth.high]

        if strategy.prompts_text:
            layers.append(float(backbone.text.layers))
        if strategy.prompts_vision:
            layers.append(float(backbone.vision.layers))
        return {**space, "depth": depth.model_copy(update={"high": min(layers)})}

    def _write_best(self, cell: Cell, folder: Path, params: Mapping[str, Any]) -> None:
        """Write the configuration of a benchmark: the method with its best options, beside the baseline."""
        model = cell["model"]
        method = cell["method"]
        options = {key: value for key, value in params.items() if not key.startswith(_TRAIN)}
        train = {key.removeprefix(_TRAIN): value for key, value in params.items() if key.startswith(_TRAIN)}

        whole = self.config.model_dump(mode="json", exclude={"search"})
        whole["name"] = f"best_{self.config.name}"
        whole["models"] = {model: {k: v for k, v in self.config.models[model].items() if k != "methods"}}
        best = {**self.config.methods[method], **options}
        best["train"] = {**self.config.method(method).train, **train}
        whole["methods"] = {**self._baseline(method), method: best}
        whole["data"]["name"] = cell["data"]
        whole["protocol"] |= {"name": "benchmark", "images": [cell.get("images")]}
        config = SegmentationConfig.parse(whole, {}, str(folder / "best.yaml"))
        write_text(folder / "best.yaml", f"# vlprompt run best.yaml\n{yaml_text(config)}")

    def _baseline(self, method: str) -> dict[str, dict[str, Any]]:
        """Return the method that gains are counted from, if it is another one."""
        baseline = self.config.protocol.baseline
        if baseline is None or baseline == method:
            return {}
        return {baseline: self.config.methods.get(baseline, {})}


class _Study:
    """The trials of one cell.

    Args:
        experiment: Builds and trains.
        cell: What is varied.
        folder: The cell's.
        space: Option to its dimension.

    Raises:
        VLPromptError: If optuna isn't installed.
    """

    def __init__(
        self, experiment: SearchExperiment, cell: Cell, folder: Path, space: Mapping[str, Dimension]
    ) -> None:
        self.experiment = experiment
        self.cell = cell
        self.space = space
        self.options = experiment.config.search
        self.optuna = _import_optuna()
        folder.mkdir(parents=True, exist_ok=True)
        self.study = self.optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name=_STUDY,
            direction="minimize",
            pruner=self._pruner(),
            load_if_exists=True,
        )

    def run(self) -> None:
        """Run the trials that are missing.

        Raises:
            VLPromptError: If the first trials failed all.
        """
        states = self.optuna.trial.TrialState
        # What was running when the search was killed counts as failed: it runs again, as if it had never begun.
        for trial in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            self.study.tell(trial.number, state=states.FAIL)

        while self.finished() < self.options.trials:
            self.study.sampler = self._sampler()
            self._trial()

    def finished(self) -> int:
        """Return the number of trials that taught something, a mistake included.

        Raises:
            VLPromptError: If there are only mistakes.
        """
        states = self.optuna.trial.TrialState
        done = len(self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))
        trials = self.study.get_trials(deepcopy=False)

        errors = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
        if not done and len(errors) >= _MOST_FAILURES:
            raise VLPromptError(f"{self.cell.name}: the first trials failed, the last one with: {errors[-1]}")
        return done + len(errors)

    def pruned(self) -> int:
        """Return the number of trials that were ended early."""
        return len(self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.PRUNED,)))

    def best(self) -> Any:
        """Return the trial with the least validation loss; it has ``value`` and ``params``.

        Raises:
            VLPromptError: If none finished.
        """
        try:
            return self.study.best_trial
        except ValueError:
            raise VLPromptError(f"{self.cell.name}: no trial finished.") from None

    def _pruner(self) -> Any:
        if not self.options.pruned:
            return self.optuna.pruners.NopPruner()
        warmup = self.experiment.config.train.min_epochs
        return self.optuna.pruners.MedianPruner(n_startup_trials=self.options.startup, n_warmup_steps=warmup)

    def _sampler(self) -> Any:
        """Return the sampler of the next trial: seeded by how many there were, so that a kill changes nothing."""
        seed = derive_seed(self.options.seed, "search", self.finished()) % 2**32
        return self.optuna.samplers.TPESampler(
            multivariate=True,
            n_startup_trials=self.options.startup,
            seed=seed,
            warn_independent_sampling=False,
        )

    def _trial(self) -> None:
        """Run one trial and tell the study its lowest validation loss."""
        states = self.optuna.trial.TrialState
        trial = self.study.ask()
        values = {key: _suggest(trial, key, dimension) for key, dimension in self.space.items()}
        train = {key.removeprefix(_TRAIN): value for key, value in values.items() if key.startswith(_TRAIN)}
        options = {key: value for key, value in values.items() if not key.startswith(_TRAIN)}
        watch = _Watch(self.optuna, trial)

        name = f"{self.cell.name}, trial {trial.number}"
        try:
            segmenter = self.experiment.segmenter(self.cell, **options)
            self.experiment.train(self.cell, segmenter, None, [watch], **train)
        except self.optuna.TrialPruned:
            self.study.tell(trial, state=states.PRUNED)
            log.info("%s: pruned after epoch %d, %s", name, watch.epoch, values)
        except VLPromptError as error:  # for example a rate at which the loss is no longer finite
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=states.FAIL)
            log.warning("%s failed: %s", name, error)
        else:
            self.study.tell(trial, watch.best)
            log.info("%s: loss %.4f, %s", name, watch.best, values)


class _Watch(Callback):
    """Tells a trial each epoch's validation loss, and ends it where the pruner says so."""

    def __init__(self, optuna: Any, trial: Any) -> None:
        self.optuna = optuna
        self.trial = trial
        self.best = float("inf")
        self.epoch = 0

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """See :meth:`Callback.on_epoch`."""
        self.epoch = record["epoch"]
        if "val/loss" not in record:
            return

        self.best = min(self.best, record["val/loss"])
        self.trial.report(record["val/loss"], self.epoch)

        if self.trial.should_prune():
            raise self.optuna.TrialPruned


def _import_optuna() -> Any:
    try:
        import optuna  # an extra of the package, and nothing else needs it
    except ImportError:
        raise VLPromptError("the search needs optuna: pip install 'vlprompt[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _suggest(trial: Any, key: str, dimension: Dimension) -> Any:
    """Return the value that a trial takes of a dimension."""
    if dimension.choices is not None:
        return trial.suggest_categorical(key, dimension.choices)

    low = dimension.low
    high = dimension.high
    assert low is not None
    assert high is not None

    if key.startswith(_TRAIN) or not (float(low).is_integer() and float(high).is_integer()):
        return trial.suggest_float(key, low, high, log=dimension.log)
    return trial.suggest_int(key, int(low), max(int(low), int(high)), log=dimension.log)
