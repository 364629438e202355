"""What a user may set of a training run: sections of a configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlprompt.core.errors import ConfigError
from vlprompt.core.options import check_switches

__all__ = ["TrackerName", "TrainOptions", "TrainSection", "check_resume"]

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""What a training can be tracked with (see :class:`vlprompt.training.trackers.Tracker`)."""


class TrainSection(BaseModel):
    """The ``train:`` section of a configuration; CoOp's recipe by default.

    Defaults are CoOp's (Zhou et al., IJCV 2022): SGD, lr 0.002, batch 32, per-epoch cosine after one warm-up
    epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    init: str = Field(
        "",
        description="gram:PATH, what a meta-training left behind: its prompts are the start, its regulator changes the "
        "gradients",
    )
    epochs: int = Field(
        50,
        ge=0,
        le=1_000_000,
        description="passes over the training samples; 0 evaluates only. Any other number is not read where steps or "
        "steps_per_shot is given",
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="optimiser steps in all, in place of epochs; the last epoch ends where they do",
    )
    steps_per_shot: int | None = Field(
        None,
        ge=1,
        description="steps for each training image of a class (the largest, where they differ), in place of epochs",
    )
    batch_size: int = Field(
        32, ge=1, description="global batch: samples per optimiser step over all processes"
    )
    lr: float = Field(0.002, gt=0, description="base learning rate per step")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(
        "sgd", description="adam: decay is part of the gradient (L2); adamw: it is not"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    weight_decay: float = Field(5e-4, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.999), description="adam and adamw only")
    eps: float = Field(1e-8, gt=0, description="adam and adamw only")
    schedule: Literal["coop", "cosine", "constant", "plateau"] = Field(
        "coop",
        description="coop: cosine per epoch that never reaches 0; cosine: per step to 0; constant; plateau: times "
        "plateau_factor where the monitored validation figure stops getting better",
    )
    warmup_epochs: float = Field(
        1.0, ge=0, description="coop: whole epochs at warmup_lr; others: linear from 0"
    )
    warmup_lr: float = Field(1e-5, gt=0, description="coop only: constant rate of the warm-up epochs")
    final_lr: float = Field(0.0, ge=0, description="cosine only: the rate it ends at")
    plateau_factor: float = Field(0.2, gt=0, lt=1, description="plateau only")
    plateau_patience: int = Field(5, ge=0, description="plateau only: validations without a better figure")
    monitor: str = Field("loss", description="validation figure that plateau and stop_patience watch")
    stop_patience: int | None = Field(
        None,
        ge=1,
        description="end after so many validations without a better monitored figure; empty: never",
    )
    stop_delta: float = Field(1e-4, ge=0, description="stop_patience: what counts as better")
    min_epochs: int = Field(0, ge=0, description="stop_patience: never end before")
    accumulation: int = Field(
        1, ge=1, description="micro-batches per optimiser step; the result does not change"
    )
    compile: bool = Field(
        False,
        description="torch.compile the losses and their backward pass; the first steps wait for the compiler, numbers "
        "change by rounding",
    )
    grad_clip: float | None = Field(None, gt=0, description="largest allowed norm of all gradients together")
    drop_last: bool = Field(
        True, description="drop an incomplete last batch if there is at least one full one"
    )
    select: Literal["last", "best"] = Field(
        "last", description="best: highest validation score, ties keep the earlier"
    )
    select_metric: str = "accuracy"
    eval_every: int = Field(1, ge=1, description="epochs between validations")
    checkpoint_seconds: float = Field(60.0, ge=0, description="time between checkpoints inside an epoch")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        """Refuse two lengths of a run in steps."""
        if self.steps is not None and self.steps_per_shot is not None:
            raise ValueError("steps and steps_per_shot both say how long the run is: give one of them")
        return self


class TrainOptions(TrainSection):
    """Options of :class:`vlprompt.training.trainer.Trainer`: the section, and the seed of the run."""

    seed: int = Field(1, ge=0)

    def for_shots(self, labels: Iterable[Hashable]) -> TrainOptions:
        """Return the options with ``steps`` in place of ``steps_per_shot``.

        Args:
            labels: The class of every training sample.
        """
        if self.steps_per_shot is None:
            return self
        shots = max(Counter(labels).values(), default=1)
        return self.model_copy(update={"steps": self.steps_per_shot * shots, "steps_per_shot": None})

    def for_epochs_of(self, steps_per_epoch: int) -> TrainOptions:
        """Return the options with as many ``epochs`` as ``steps`` take, the last of which may be cut.

        Args:
            steps_per_epoch: Optimiser steps of a whole epoch.
        """
        if self.steps is None:
            return self
        return self.model_copy(update={"epochs": -(-self.steps // steps_per_epoch)})


def check_resume(folder: str | Path | None, resume: bool) -> None:
    """Refuse to continue what is nowhere.

    Raises:
        ConfigError: If there is no folder.
        DataError: If ``resume`` is neither true nor false.
    """
    check_switches(resume=resume)
    if resume and folder is None:
        raise ConfigError(["resume: it continues what a folder holds; say which: folder=PATH."], "training")
