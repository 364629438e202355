"""Learning rates as a pure function of the position in a run, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlprompt.training.options import TrainOptions

__all__ = ["learning_rate", "lower_is_better", "stops"]

_PLATEAU = 1e-4  # relative gain that counts as one, PyTorch's default
History = Sequence[Mapping[str, Any]]


def learning_rate(
    options: TrainOptions, epoch: int, step: int, steps_per_epoch: int, history: History = ()
) -> float:
    """Return the learning rate of one optimiser step.

    ``coop`` is the schedule of Zhou et al.'s public code: epoch 0 runs at ``warmup_lr``, epoch e at
    ``lr/2 (1 + cos(pi (e - 1) / E))``. Its cosine counts from the end of the warm-up over all E epochs, so
    the last epoch stands at angle pi (E - 2) / E and the rate never reaches zero.

    ``plateau`` is PyTorch's ``ReduceLROnPlateau`` stepped at every validation, replayed from the history of the run.

    Args:
        options: ``lr``, ``final_lr``, ``schedule``, ``epochs``, ``steps`` and the warm-up settings are read.
        epoch: Epoch in [0, options.epochs).
        step: Step inside the epoch, in [0, steps_per_epoch).
        steps_per_epoch: Optimiser steps per epoch.
        history: One record per finished epoch; read by ``plateau``.
    """
    if options.schedule == "plateau":
        warm = _linear_warmup(options, epoch, step, steps_per_epoch)
        return options.lr * warm * options.plateau_factor ** _reductions(options, history)

    if options.schedule == "constant":
        return options.lr * _linear_warmup(options, epoch, step, steps_per_epoch)

    if options.schedule == "coop":
        warm_epochs = int(options.warmup_epochs)
        if epoch < warm_epochs:
            return options.warmup_lr
        return 0.5 * options.lr * (1 + math.cos(math.pi * (epoch - warm_epochs) / options.epochs))

    # cosine: per step, from the end of the warm-up to its final rate at the last step
    warm_steps = options.warmup_epochs * steps_per_epoch
    done = epoch * steps_per_epoch + step
    if done < warm_steps:
        return options.lr * _linear_warmup(options, epoch, step, steps_per_epoch)

    total = options.epochs * steps_per_epoch if options.steps is None else options.steps
    span = max(1.0, total - warm_steps)
    height = options.lr - options.final_lr
    return options.final_lr + 0.5 * height * (1 + math.cos(math.pi * (done - warm_steps) / span))


def stops(options: TrainOptions, history: History) -> bool:
    """Return whether a run ends early: ``stop_patience`` validations in a row brought nothing better."""
    if options.stop_patience is None or len(history) < options.min_epochs:
        return False

    best = math.inf
    waited = 0
    for value in _monitored(options, history):
        if value < best - options.stop_delta:
            best = value
            waited = 0
        else:
            waited += 1
        if waited >= options.stop_patience:
            return True

    return False


def lower_is_better(metric: str) -> bool:
    """Return whether a validation metric is a loss or a distance rather than a score."""
    return metric.rpartition("/")[2] in ("loss", "nll", "ece", "hd95")


def _linear_warmup(options: TrainOptions, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Return the factor of a warm-up step, in (0, 1]."""
    warm_steps = options.warmup_epochs * steps_per_epoch
    if not warm_steps:
        return 1.0
    return min(1.0, (epoch * steps_per_epoch + step + 1) / warm_steps)


def _reductions(options: TrainOptions, history: History) -> int:
    """Return how often ``plateau`` has lowered the rate."""
    best = math.inf
    bad = 0
    count = 0

    for value in _monitored(options, history):
        better = value < best - _PLATEAU * abs(best) if math.isfinite(best) else True
        if better:
            best = value
            bad = 0
        else:
            bad += 1
        if bad > options.plateau_patience:
            count += 1
            bad = 0

    return count


def _monitored(options: TrainOptions, history: History) -> list[float]:
    """Return the watched metric of every validation, negated if more is better."""
    key = f"val/{options.monitor}"
    sign = 1.0 if lower_is_better(options.monitor) else -1.0
    return [sign * float(record[key]) for record in history if key in record]
