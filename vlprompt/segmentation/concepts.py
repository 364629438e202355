"""ConES for segmentation: a searched vector per class instead of the feature of a phrase.

Paper: Yi et al., arXiv 2305.18993. Stated in the abstract: concepts take the text encoder's place, the visual model is
frozen, the task's loss is the objective. Reconstructed here: one vector per class, where it starts, all settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlprompt.concepts.embedding import ConceptEmbedding, Concepts, normal_start
from vlprompt.concepts.search import ConceptSearch, SearchResult
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.weights import weights_id
from vlprompt.data.segmentation.base import MaskDataset
from vlprompt.segmentation.base import Frozen, Segmenter
from vlprompt.segmentation.evaluate import evaluate_segmenter
from vlprompt.segmentation.fit import frozen_of
from vlprompt.segmentation.losses import LossName, segmentation_loss
from vlprompt.segmentation.states import PairStates
from vlprompt.training.batches import Batch, epoch_plan
from vlprompt.training.callback_lists import run_callbacks
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["MaskConcepts", "named", "score_concepts", "search_masks", "segmenter_identity"]

Criterion = Callable[[Tensor, Tensor], dict[str, Tensor]]


class MaskConcepts(ConceptSearch):
    """Concepts as a segmenter's phrases, trained by the segmenter's own loss.

    Args:
        segmenter: The host.
        concepts: (C, 1, d).
        criterion: See :func:`vlprompt.segmentation.losses.segmentation_loss`.
        unfreeze: Patterns of the decoder's parameters that learn too (second stage).

    Raises:
        ConfigError: If a pattern names something else than the decoder's parameters.
    """

    concepts: ConceptEmbedding

    def __init__(
        self,
        segmenter: Segmenter,
        concepts: ConceptEmbedding,
        criterion: Criterion,
        unfreeze: Sequence[str] = (),
    ) -> None:
        super().__init__(concepts, segmenter, unfreeze)
        self.segmenter = [segmenter]  # in a list: its parameters are not this module's
        self.criterion = criterion

        names = [name.replace("/", ".") for name, _ in self.unfrozen.named_parameters()]
        for name in names:
            if not name.startswith("decoder."):
                problem = f"unfreeze: {name!r} is no parameter of the decoder; the towers stay frozen."
                raise ConfigError([problem], "concept search")

        if names and segmenter.strategy.tunes != "decoder":
            problem = (
                "unfreeze: build the segmenter with strategy 'decoder', whose cached states lie before it."
            )
            raise ConfigError([problem], "concept search")

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the criterion's losses.

        Args:
            batch: ``frozen/<name>`` states, ``label`` (B,), ``mask`` (B, H, W) and ``size``.
        """
        conditions = self.concepts()[batch["label"], 0]
        logits = self.segmenter[0].decode(frozen_of(batch), conditions, batch["size"])
        return self.criterion(logits, batch["mask"])

    def to_concepts(self, names: Sequence[str]) -> Concepts:
        """See :meth:`ConceptSearch.to_concepts`."""
        host = segmenter_identity(self.segmenter[0])
        return Concepts("segmenter", self.concepts().detach(), tuple(names), host)


class _Batches:
    """Batches of pairs by the number of their class; states of all images are cached."""

    def __init__(self, states: PairStates, options: TrainOptions) -> None:
        self.states = states
        self.options = options

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        options = self.options
        count = len(self.states.data)
        return epoch_plan(count, options.batch_size, options.seed, epoch, options.drop_last)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        pairs = [int(i) for i in indices]
        frozen, size = self.states.frozen(pairs)
        labels = torch.tensor([self.states.data.samples[i].label for i in pairs])
        batch: Batch = {f"frozen/{name}": state for name, state in frozen.items()}
        return {**batch, "label": labels, "mask": self.states.targets(pairs, size), "size": size}


class _ConceptReader:
    """A segmenter that reads class names as concepts; it has what scoring needs of a segmenter.

    Args:
        segmenter: The host.
        names: C class names.
        concepts: (C, 1, d).
    """

    training = False

    def __init__(self, segmenter: Segmenter, names: Sequence[str], concepts: Tensor) -> None:
        self.segmenter = segmenter
        self.concepts = concepts
        self.numbers = {name: i for i, name in enumerate(names)}
        self.preprocess = segmenter.preprocess
        self.frozen = segmenter.frozen

    def decode(self, frozen: Frozen, texts: Sequence[str], size: tuple[int, int]) -> Tensor:
        """See :meth:`Segmenter.decode`."""
        features = self.concepts[[self.numbers[text] for text in texts], 0]
        return self.segmenter.decode(frozen, features, size)

    def eval(self) -> None:
        """Do nothing: the host stays in evaluation mode."""

    def train(self, mode: bool = True) -> None:
        """Do nothing: the host stays in evaluation mode."""


def search_masks(
    segmenter: Segmenter,
    train: MaskDataset,
    val: MaskDataset | None = None,
    *,
    options: TrainOptions,
    init: Literal["text", "normal"] = "text",
    loss: LossName = "dice_bce",
    unfreeze: Sequence[str] = (),
    start: Tensor | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> SearchResult[MaskConcepts]:
    """Search a vector for every class of a data set; classes without training pairs keep their start.

    Args:
        segmenter: The host, one that takes features in place of phrases; changed only where ``unfreeze`` says so.
        train: Training pairs; their phrases are not read, only the classes' names.
        val: For ``options.select="best"`` (by ``dice``) and the curves; never test data.
        options: Of the trainer.
        init: Where the search starts: features of the class names, or noise of their spread.
        loss: The segmenter's.
        unfreeze: Second stage: patterns of the decoder's parameters that learn too.
        start: (C, 1, d) concepts to start from instead.
        folder: Where a checkpoint is kept; None keeps none.
        resume: Continue from it.

    Raises:
        DataError: If there are no pairs, or the segmenter reads words.
        ConfigError: For patterns that don't fit.
    """
    if not len(train):
        raise DataError(f"{train.name}: there are no training pairs.")
    begun = time.monotonic()
    if start is None:
        start = _name_features(segmenter, train.classnames)
        if init == "normal":
            shape = (len(start), start.shape[1], start.shape[2])
            start = normal_start(shape, start, options.seed)
    concepts = ConceptEmbedding(len(start), start.shape[1], start.shape[2]).to(segmenter.backbone.device)
    concepts.begin(start)

    module = MaskConcepts(segmenter, concepts, segmentation_loss(loss), unfreeze)
    states = PairStates(segmenter, train)
    states.prepare()
    val_states = None if val is None else PairStates(segmenter, val)

    trainer = Trainer(
        module,
        _Batches(states, options),
        options,
        folder,
        validate=None if val is None else (lambda: score_concepts(segmenter, concepts(), val, val_states)),
        callbacks=run_callbacks(folder),
        identity={**segmenter_identity(segmenter), "data": train.name, "start": float(start.norm())},
    )
    history = trainer.run(resume).history
    return SearchResult(module, history, time.monotonic() - begun)


def score_concepts(
    segmenter: Segmenter, concepts: Tensor, data: MaskDataset, states: PairStates | None = None
) -> dict[str, float]:
    """Return Dice, IoU and the other measures of :func:`evaluate_segmenter` with concepts as phrases."""
    reader: Any = _ConceptReader(segmenter, data.classnames, concepts.detach())
    scores = evaluate_segmenter(reader, named(data), boundary=False, states=states)
    return {name: value for name, value in scores.metrics.items() if "/" not in name}


def named(data: MaskDataset) -> MaskDataset:
    """Return the same pairs, each asked for by the name of its class."""
    samples = (replace(sample, phrase=data.classnames[sample.label]) for sample in data.samples)
    return data.with_samples(samples, phrases="class names")


def segmenter_identity(segmenter: Segmenter) -> dict[str, Any]:
    """Return facts that a segmenter's concepts depend on."""
    return {
        "segmenter": segmenter.method,
        "decoder": weights_id(segmenter.decoder.state_dict()),
        "image": weights_id(segmenter.backbone.model.visual.state_dict()),
    }


@torch.no_grad()
def _name_features(segmenter: Segmenter, names: Sequence[str]) -> Tensor:
    """Return (C, 1, d) features of class names, as the segmenter reads phrases."""
    features, words = segmenter.conditions(list(names), None, remember=False)
    if words is not None:
        raise DataError(f"{segmenter.method} reads a phrase's words; a concept is one vector. Use clipseg.")
    return features[:, None].detach()
