"""Searching training options, prompt depth and a strategy's own options on validation data, as TuneVLSeg does.

Every model, strategy and data set has a study of its own in ``search.db`` (SQLite), the least validation loss wins, and
nothing is ever scored on test data. A killed search continues behind its last finished trial; the trial that was killed
runs again. What a trial tries depends on the seed and the trials before it alone, not on how often it was killed.

Paper: TuneVLSeg, ACCV 2024, 2410.05239 (TPE, 10 random of 20 trials, one objective).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlprompt.core.errors import VLPromptError
from vlprompt.core.files import write_json, write_text
from vlprompt.core.options import options_model
from vlprompt.core.seeding import derive_seed
from vlprompt.experiments.old_folder import open_folder
from vlprompt.segmentation import SEGMENTERS, STRATEGIES
from vlprompt.segmentation.config import Dimension, SegmentConfig
from vlprompt.segmentation.experiment import SegmentCell, Session
from vlprompt.training.callbacks import Callback
from vlprompt.training.trainer import Trainer

__all__ = ["SearchOutcome", "search"]

log = logging.getLogger("vlprompt.segment")


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    Attributes:
        folder: Holds ``search.db``, ``best.json`` and, per study, a configuration ``best_<study>.yaml``.
        best: Study name to the best trial's ``value`` (validation loss), ``params`` and ``trials`` done.
    """

    folder: Path
    best: dict[str, dict[str, Any]]


def search(config: SegmentConfig, resume: bool = False) -> SearchOutcome:
    """Search every (model, strategy, data set) of a configuration whose strategy learns anything.

    Args:
        config: Its ``search`` section says what is varied; its first seed draws pictures and starts.
        resume: Continue the studies in the folder.

    Raises:
        VLPromptError: If optuna isn't installed, nothing can be varied, or every trial of a study failed.
    """
    optuna = _optuna()
    session = Session(config, open_folder(config, resume), resume=False)
    best: dict[str, dict[str, Any]] = {}
    for cell in session.plan():
        space = _space(config, session, cell)
        name = cell.name.rpartition("_seed")[0]
        if cell.seed != config.seeds[0] or name in best or not space:
            continue
        cell = SegmentCell(cell.dataset, cell.shots, cell.seed, model=cell.model, strategy=cell.strategy)
        name = cell.name.rpartition("_seed")[0]
        if name in best:
            continue
        study = _study(optuna, config, session.folder, name)
        while (done := _finished(optuna, study)) < config.search.trials:
            study.sampler = _sampler(optuna, config, done)
            _trial(optuna, study, session, cell, space)
        best[name] = _best(study, name, done)
        _write(session.folder, config, cell, name, best)
    if not best:
        raise VLPromptError(
            "there is nothing to search: no strategy learns, or none has an option of search.space."
        )
    return SearchOutcome(session.folder, best)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise VLPromptError("the search needs optuna: pip install 'vlprompt[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _space(config: SegmentConfig, session: Session, cell: SegmentCell) -> dict[str, Dimension]:
    """Return the dimensions that a cell's model and strategy have; the depth never beyond the towers'."""
    strategy = STRATEGIES.get(config.strategy(cell.strategy).name).target
    if strategy.tunes == "nothing":
        return {}
    known = {
        *options_model(strategy).model_fields,
        *options_model(SEGMENTERS.get(config.model(cell.model).name).target).model_fields,
    }
    wanted = {**config.search.space, **config.search.own.get(cell.strategy, {})}
    space = {k: d for k, d in wanted.items() if k.startswith("train.") or k in known}
    if (depth := space.get("depth")) is not None and depth.high is not None:
        backbone = session.backbone(cell.model)
        towers = [backbone.text.layers] if strategy.prompts_text else []
        towers += [backbone.vision.layers] if strategy.prompts_vision else []
        space["depth"] = depth.model_copy(update={"high": min([depth.high, *map(float, towers)])})
    return space


def _study(optuna: Any, config: SegmentConfig, folder: Path, name: str) -> Any:
    """Open a study; what was running when it was killed counts as failed."""
    options = config.search
    folder.mkdir(parents=True, exist_ok=True)
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=options.startup, n_warmup_steps=config.train.min_epochs)
        if options.pruned
        else optuna.pruners.NopPruner()
    )
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'search.db'}", study_name=name, direction="minimize", pruner=pruner,
        load_if_exists=True,
    )  # fmt: skip
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _finished(optuna: Any, study: Any) -> int:
    """Count the trials that taught something; give up where all fail."""
    state = optuna.trial.TrialState
    done = len(study.get_trials(deepcopy=False, states=(state.COMPLETE, state.PRUNED)))
    errors = [t.user_attrs["error"] for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
    if not done and len(errors) >= 3:
        raise VLPromptError(f"{study.study_name}: the first trials failed, the last one with: {errors[-1]}")
    return done + len(errors)


def _sampler(optuna: Any, config: SegmentConfig, done: int) -> Any:
    """Return the sampler of the next trial: seeded by how many there were, so that a kill changes nothing."""
    seed = derive_seed(config.search.seed, "search", done) % 2**32
    return optuna.samplers.TPESampler(
        multivariate=True, n_startup_trials=config.search.startup, seed=seed, warn_independent_sampling=False
    )


def _trial(
    optuna: Any, study: Any, session: Session, cell: SegmentCell, space: Mapping[str, Dimension]
) -> None:
    """Run one trial and tell the study its lowest validation loss."""
    trial = study.ask()
    chosen = {key: _suggest(trial, key, dimension) for key, dimension in space.items()}
    changes = {k.removeprefix("train."): v for k, v in chosen.items() if k.startswith("train.")}
    options = {k: v for k, v in chosen.items() if not k.startswith("train.")}
    watch = _Watch(optuna, trial)
    try:
        session.train(cell, session.segmenter(cell, **options), None, [watch], **changes)
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        log.info(
            "%s trial %d: pruned after epoch %d, %s", study.study_name, trial.number, watch.epoch, chosen
        )
    except VLPromptError as error:  # for example a rate at which the loss is no longer finite
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        log.warning("%s trial %d failed: %s", study.study_name, trial.number, error)
    else:
        study.tell(trial, watch.best)
        log.info("%s trial %d: loss %.4f, %s", study.study_name, trial.number, watch.best, chosen)


def _suggest(trial: Any, key: str, dimension: Dimension) -> Any:
    if dimension.choices is not None:
        return trial.suggest_categorical(key, dimension.choices)
    low, high = dimension.low, dimension.high
    assert low is not None
    assert high is not None
    if key.startswith("train.") or not (float(low).is_integer() and float(high).is_integer()):
        return trial.suggest_float(key, low, high, log=dimension.log)
    return trial.suggest_int(key, int(low), max(int(low), int(high)), log=dimension.log)


class _Watch(Callback):
    """Tells a trial each epoch's validation loss, and ends it where the pruner says so."""

    def __init__(self, optuna: Any, trial: Any) -> None:
        self.optuna, self.trial = optuna, trial
        self.best, self.epoch = float("inf"), 0

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """See :meth:`Callback.on_epoch`."""
        self.epoch = record["epoch"]
        if "val/loss" not in record:
            return
        self.best = min(self.best, record["val/loss"])
        self.trial.report(record["val/loss"], self.epoch)
        if self.trial.should_prune():
            raise self.optuna.TrialPruned


def _best(study: Any, name: str, done: int) -> dict[str, Any]:
    try:
        return {"value": study.best_value, "params": dict(study.best_params), "trials": done}
    except ValueError:
        raise VLPromptError(f"{name}: no trial finished.") from None


def _write(
    folder: Path, config: SegmentConfig, cell: SegmentCell, name: str, best: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write what was found so far, and a configuration that uses it."""
    write_json(folder / "best.json", best)
    params = best[name]["params"]
    train = {k.removeprefix("train."): v for k, v in params.items() if k.startswith("train.")}
    strategy = {
        **config.strategies[cell.strategy],
        **{k: v for k, v in params.items() if not k.startswith("train.")},
    }
    strategy["train"] = {**config.strategy(cell.strategy).train, **train}
    whole = config.model_dump(mode="json")
    whole |= {
        "name": f"best_{config.name}",
        "strategies": {"zero_shot": {}, cell.strategy: strategy},
        "depths": [],
    }
    whole["models"] = {cell.model: {k: v for k, v in config.models[cell.model].items() if k != "strategies"}}
    whole["data"]["names"] = [cell.dataset]
    whole["search"]["own"] = {k: v for k, v in whole["search"]["own"].items() if k == cell.strategy}
    text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    write_text(
        folder / f"best_{name}.yaml", f"# python tools/segment.py bench --cfg best_{name}.yaml\n{text}"
    )
