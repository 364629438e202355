"""Training a segmentation model on pairs, through the one trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.options import check_options, describe_problems
from vlprompt.core.paths import user_path
from vlprompt.core.processes import accelerator
from vlprompt.core.trainable import ParameterGroup, Trainable, Wrapper
from vlprompt.data.base import hash_strings
from vlprompt.data.loading import Workers, takes_workers
from vlprompt.data.segmentation.augment import JointAugmentation
from vlprompt.data.segmentation.base import MaskDataset, check_pairs
from vlprompt.data.segmentation.reading import resize_mask
from vlprompt.segmentation.base import Frozen, Segmenter
from vlprompt.segmentation.evaluate import evaluate_segmenter
from vlprompt.segmentation.losses import LossName, segmentation_loss
from vlprompt.segmentation.states import PairStates
from vlprompt.training.batches import Batch, Batches, ReadBatches, epoch_plan
from vlprompt.training.callback_lists import default_callbacks
from vlprompt.training.callbacks import Callback, check_callbacks
from vlprompt.training.options import TrainOptions, TrainSection, check_resume
from vlprompt.training.trainer import Trainer

__all__ = [
    "SegmentTrainOptions",
    "SegmentTrainSection",
    "SegmentationFit",
    "SegmentationTask",
    "check_phrases",
    "fit_segmenter",
    "frozen_of",
]


class SegmentTrainSection(TrainSection):
    """The ``train:`` section with TuneVLSeg's recipe as defaults (its section 4 and public configuration)."""

    epochs: int = Field(20, ge=0, description="passes over the pairs; 0 evaluates only")
    lr: float = Field(2e-4, gt=0, description="base learning rate per step")
    optimizer: Literal["sgd", "adamw"] = "adamw"
    weight_decay: float = Field(
        1e-3, ge=0, description="of weight matrices; prompts, biases, norms have none"
    )
    schedule: Literal["coop", "cosine", "constant", "plateau"] = "plateau"
    warmup_epochs: float = Field(0.0, ge=0)
    drop_last: bool = False
    select: Literal["last", "best"] = "best"
    select_metric: str = "dice"
    stop_patience: int | None = Field(12, ge=1)
    min_epochs: int = Field(10, ge=0)


class SegmentTrainOptions(SegmentTrainSection, TrainOptions):
    """The section, and the seed of the run."""


@dataclass(frozen=True)
class SegmentationFit:
    """The result of a training.

    Attributes:
        metrics: Validation figures of the chosen weights (``val/...``) and ``seconds``.
        history: One record per epoch.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(repr=False)


class SegmentationTask(nn.Module, Wrapper):
    """A segmentation model and its loss, as the trainer wants them.

    Args:
        segmenter: What learns.
        loss: See :func:`vlprompt.segmentation.losses.segmentation_loss`.
    """

    def __init__(self, segmenter: Segmenter, loss: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.criterion = loss

    @property
    def wrapped(self) -> Trainable:
        """See :attr:`Wrapper.wrapped`."""
        return self.segmenter

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`vlprompt.core.trainable.Trainable.loss`."""
        frozen = frozen_of(batch)
        if frozen:
            logits = self.segmenter.decode(frozen, batch["texts"], batch["size"])
        else:
            logits = self.segmenter(batch["image"], batch["texts"])
        return self.criterion(logits, batch["mask"])

    def trainable_state(self) -> dict[str, Tensor]:
        """See :meth:`Segmenter.trainable_state`."""
        return self.segmenter.trainable_state()

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Segmenter.load_trainable_state`."""
        self.segmenter.load_trainable_state(state)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return what has weight decay, the weight matrices of linear and convolution layers, and what has none."""
        decayed = set()
        for prefix, module in self.named_modules():
            has_matrix = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            for name, _ in module.named_parameters(recurse=False):
                if (name == "weight" and has_matrix) or name.endswith("proj_weight"):
                    decayed.add(f"{prefix}.{name}" if prefix else name)

        learned = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        with_decay = [name for name in learned if name in decayed]
        without = [name for name in learned if name not in decayed]
        groups: list[ParameterGroup] = [{"names": with_decay}, {"names": without, "weight_decay": 0.0}]
        return [group for group in groups if group["names"]]


class _PairBatches(ReadBatches):
    """Batches of pairs: cached frozen states, or pixels where images are augmented or states don't fit in memory."""

    def __init__(
        self, states: PairStates, augmentation: JointAugmentation, options: TrainOptions, cached: bool
    ) -> None:
        self.states = states
        self.augmentation = augmentation
        self.options = options
        self.cached = cached

    @property
    def reads(self) -> bool:
        """See :attr:`vlprompt.training.batches.ReadBatches.reads`."""
        return not self.cached

    def plan(self, epoch: int) -> list[np.ndarray]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        options = self.options
        return epoch_plan(len(self.states.data), options.batch_size, options.seed, epoch, options.drop_last)

    def fetch(self, indices: np.ndarray, epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        pairs = [int(i) for i in indices]
        data = self.states.data
        batch: Batch = {"texts": [data.samples[i].phrase for i in pairs]}

        if self.cached:
            frozen, size = self.states.frozen(pairs)
            batch |= {f"frozen/{name}": state for name, state in frozen.items()}
            return {**batch, "size": size, "mask": self.states.targets(pairs, size)}

        images = []
        masks = []

        for i in pairs:
            image, mask = self.augmentation.augment(data[i], self.options.seed, epoch)
            pixels = self.states.segmenter.preprocess(image)
            images.append(pixels)
            masks.append(resize_mask(mask, (pixels.shape[-1], pixels.shape[-2])))

        return {**batch, "image": torch.stack(images), "mask": torch.from_numpy(np.stack(masks))}


@takes_workers
def fit_segmenter(
    segmenter: Segmenter,
    train: MaskDataset,
    val: MaskDataset | None = None,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    augmentation: str = "none",
    loss: LossName = "dice_bce",
    cache_mb: float = 2000.0,
    callbacks: Sequence[Callback] | None = None,
    workers: Workers | None = None,
    **options: Any,
) -> SegmentationFit:
    """Train a segmentation model; the parameters that its strategy tunes are changed in place.

    Without augmentation, states that training never changes are computed once per image (``Segmenter.frozen``).

    Args:
        segmenter: See :func:`vlprompt.create_segmenter`.
        train: Training pairs.
        val: Validation pairs, for the schedule, early stopping and the choice of the epoch. Never test data. Without
            them the rate is constant and the last epoch is taken.
        folder: Where checkpoints go; None writes nothing.
        resume: Continue from the checkpoint in ``folder``; on a CPU the result is the same to the last bit.
        augmentation: See :class:`JointAugmentation`.
        loss: See :func:`segmentation_loss`.
        cache_mb: MB from 0 on for frozen states of training images, and as much again for those of validation images.
        callbacks: Replaces the default one, :class:`vlprompt.training.callbacks.ProgressBar`. A
            :class:`vlprompt.training.trackers.Tracker` is one too.
        workers: Processes that read images; see :data:`vlprompt.data.loading.Workers`.
        **options: See :class:`SegmentTrainOptions`.

    Raises:
        ConfigError: For wrong options, all at once.
        DataError: If there are no pairs, a pair can't be read, or a phrase is longer than the text tower reads.
        NonFiniteError: If the loss or a gradient is NaN or infinite.
        CheckpointError: If the checkpoint to resume is damaged or another run's.
    """
    _check_arguments(loss=loss, cache_mb=cache_mb)
    check_resume(folder, resume)
    check_callbacks(callbacks)
    for data in (train,) if val is None else (train, val):
        check_pairs(data)
    started = time.monotonic()
    processes = accelerator()
    segmenter.to(segmenter.backbone.device_or(processes.device))
    checked = _options(options, val is not None)
    _read_phrases(segmenter, [train] if val is None else [train, val])
    criterion = segmentation_loss(loss)
    views = JointAugmentation(augmentation)
    val_states = None if val is None else PairStates(segmenter, val, limit_mb=cache_mb)

    def validate() -> dict[str, float]:
        assert val is not None
        scores = evaluate_segmenter(segmenter, val, boundary=False, loss=criterion, states=val_states)
        return {name: value for name, value in scores.metrics.items() if "/" not in name}

    history: list[dict[str, Any]] = []
    if segmenter.num_trainable() and checked.epochs:
        path = None if folder is None else user_path(folder)
        if callbacks is None:
            callbacks = default_callbacks(segmenter.method, path)
        trainer = Trainer(
            SegmentationTask(segmenter, criterion),
            _batches(segmenter, train, views, checked, cache_mb),
            checked,
            path,
            validate=None if val is None else validate,
            callbacks=callbacks,
            identity=_identity(segmenter, train, augmentation, loss),
            accelerator=processes,
        )
        history = trainer.run(resume).history

    segmenter.eval()
    metrics = {} if val is None else {f"val/{name}": value for name, value in validate().items()}
    seconds = time.monotonic() - started
    return SegmentationFit({"seconds": seconds, **metrics}, history)


def _check_arguments(*, loss: LossName, cache_mb: Annotated[float, Field(ge=0)]) -> None:
    """Check the arguments of :func:`fit_segmenter` that are no training options."""
    values = {"loss": loss, "cache_mb": cache_mb}
    check_options(_check_arguments, values, source="vlprompt.fit_segmenter")


def check_phrases(segmenter: Segmenter, data: MaskDataset) -> None:
    """Refuse phrases that are longer than the text tower reads, before anything is computed.

    Raises:
        DataError: Names the longest one and its record.
    """
    tower = segmenter.backbone.text
    prompts = 0  # tokens

    if segmenter.strategy.prompts_text:
        with torch.no_grad():
            feature = torch.zeros(1, segmenter.backbone.dim, device=segmenter.backbone.device)
            rows = segmenter.strategy(feature).text
        prompts = 0 if rows is None else rows.shape[-2]

    lengths: dict[str, int] = {}

    for sample in data.samples:
        if sample.phrase not in lengths:
            lengths[sample.phrase] = len(tower.sentence(sample.phrase)) + prompts

    longest = max(lengths, key=lambda phrase: lengths[phrase])
    if lengths[longest] > tower.context_length:
        record = next(sample.record for sample in data.samples if sample.phrase == longest)
        raise DataError(
            f"{data.name}, {record}: the phrase {longest[:80]!r} takes {lengths[longest]} tokens with the "
            f"{prompts} of the prompt; the text tower reads {tower.context_length}. Use shorter phrases "
            "(prompt=1, phrase=...)."
        )


def _read_phrases(segmenter: Segmenter, parts: Sequence[MaskDataset]) -> None:
    """Check all phrases, and let a model with a frozen text side encode them now, together.

    The last bits of a feature depend on the phrases that are encoded with it, and a resumed run would encode others
    together.
    """
    for data in parts:
        if not len(data):
            raise DataError(f"{data.name}: there are no {data.split} pairs.")
        check_phrases(segmenter, data)

    if segmenter.strategy.prompts_text or segmenter.strategy.tunes == "all":
        return

    phrases = list(dict.fromkeys(s.phrase for data in parts for s in data.samples))
    with torch.no_grad():
        segmenter.conditions(phrases, None, remember=True)


def frozen_of(batch: Mapping[str, Any]) -> Frozen:
    """Return the frozen states of a batch, which has them as ``frozen/<name>``."""
    prefix = "frozen/"
    return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}


def _options(options: Mapping[str, Any], has_val: bool) -> SegmentTrainOptions:
    """Return checked options; what needs validation data is off without them."""
    without_val = {} if has_val else {"schedule": "constant", "select": "last", "stop_patience": None}
    try:
        return SegmentTrainOptions(**{**without_val, **options})
    except ValidationError as error:
        raise ConfigError(describe_problems(error, SegmentTrainOptions), "training options") from error


def _batches(
    segmenter: Segmenter, data: MaskDataset, views: JointAugmentation, options: TrainOptions, cache_mb: float
) -> Batches:
    states = PairStates(segmenter, data, limit_mb=cache_mb)
    cached = not views.is_random and states.prepare()
    return _PairBatches(states, views, options, cached)


def _identity(segmenter: Segmenter, train: MaskDataset, augmentation: str, loss: str) -> dict[str, Any]:
    """Facts that a run and its continuation must share."""
    return {
        "segmenter": segmenter.method,
        "segmenter_options": {k: str(v) for k, v in segmenter.options.items()},
        "backbone": segmenter.backbone.fingerprint["id"],
        "precision": segmenter.backbone.precision,
        "data": train.name,
        "pairs": hash_strings(f"{s.record}\x1e{s.phrase}" for s in train.samples),
        "augmentation": augmentation,
        "loss": loss,
    }
