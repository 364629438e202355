"""Learning rates as a pure function of the position in a run, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from vlprompt.training.options import TrainOptions

__all__ = ["learning_rate"]


def learning_rate(options: TrainOptions, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of one optimiser step.

    ``coop`` is the schedule of Zhou et al.'s public code: epoch 0 runs at ``warmup_lr``, epoch e at
    ``lr/2 (1 + cos(pi (e - 1) / E))``. Its cosine counts from the end of the warm-up over all E epochs, so
    the last epoch stands at angle pi (E - 2) / E and the rate never reaches zero.

    Args:
        options: ``lr``, ``schedule``, ``epochs`` and the warm-up settings are read.
        epoch: Epoch in [0, options.epochs).
        step: Step inside the epoch, in [0, steps_per_epoch).
        steps_per_epoch: Optimiser steps per epoch.
    """
    if options.schedule == "constant":
        return options.lr * _linear_warmup(options, epoch, step, steps_per_epoch)
    if options.schedule == "coop":
        warm = int(options.warmup_epochs)
        if epoch < warm:
            return options.warmup_lr
        return 0.5 * options.lr * (1 + math.cos(math.pi * (epoch - warm) / options.epochs))
    warm_steps = options.warmup_epochs * steps_per_epoch
    done = epoch * steps_per_epoch + step
    if done < warm_steps:
        return options.lr * _linear_warmup(options, epoch, step, steps_per_epoch)
    span = max(1.0, options.epochs * steps_per_epoch - warm_steps)
    return 0.5 * options.lr * (1 + math.cos(math.pi * (done - warm_steps) / span))


def _linear_warmup(options: TrainOptions, epoch: int, step: int, steps_per_epoch: int) -> float:
    warm_steps = options.warmup_epochs * steps_per_epoch
    return min(1.0, (epoch * steps_per_epoch + step + 1) / warm_steps) if warm_steps else 1.0
