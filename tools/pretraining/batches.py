"""Batches of images, captions and sentences about single attributes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pretraining.corpus import Corpus
from vlprompt.core.seeding import derive_seed, numpy_rng
from vlprompt.training.batches import Batch, epoch_plan

__all__ = ["CaptionBatches"]


class CaptionBatches:
    """Batches of images and captions; epoch e reads caption e modulo the number of captions per image.

    Args:
        corpus: The captioned scenes.
        batch_size: Pairs per global batch.
        seed: The run's seed.
        shift: Images are moved by up to so many pixels each way.
        curriculum: How many first images are easy, and how many first epochs read only them (repeating them, so
            that every epoch has as many steps).
    """

    def __init__(
        self, corpus: Corpus, batch_size: int, seed: int, shift: int = 2, curriculum: tuple[int, int] = (0, 0)
    ) -> None:
        self.corpus = corpus
        self.batch_size = batch_size
        self.seed = seed
        self.shift = shift
        self.easy, self.easy_epochs = curriculum

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        count = len(self.corpus.images)
        if epoch >= self.easy_epochs or not self.easy:
            return epoch_plan(count, self.batch_size, self.seed, epoch)

        passes = [
            epoch_plan(self.easy, self.batch_size, derive_seed(self.seed, "easy", turn), epoch)
            for turn in range(-(-count // self.easy))
        ]
        return [batch for turn in passes for batch in turn][: max(1, count // self.batch_size)]

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`; the batch is what the module's loss reads."""
        draw = epoch % self.corpus.tokens.shape[1]
        last = self.corpus.last[indices, draw].astype(np.int64)
        tokens = self.corpus.tokens[indices, draw, : last.max() + 1].astype(np.int64)
        sentences = self._sentences(epoch, int(indices[0]))
        images = self._shifted(np.stack([self.corpus.images[i] for i in indices]), epoch, int(indices[0]))

        return {
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "text": torch.from_numpy(tokens),
            "last": torch.from_numpy(last),
            "positive": torch.from_numpy(self.corpus.positives(indices, draw)),
            "sentence": pad_sequence(sentences, batch_first=True),
            "sentence_last": torch.tensor([len(s) - 1 for s in sentences]),
            "values": {name: len(values) for name, values in self.corpus.sentences.items()},
            "label": torch.from_numpy(self.corpus.labels[indices].astype(np.int64)),
        }

    def _sentences(self, epoch: int, first: int) -> list[Tensor]:
        """One sentence for every value of every attribute; an attribute's sentences read alike where they can."""
        turns = numpy_rng(self.seed, "sentences", epoch, first).random(len(self.corpus.sentences))
        return [
            torch.tensor(said[int(turn * len(said))])
            for values, turn in zip(self.corpus.sentences.values(), turns, strict=True)
            for said in values
        ]

    def _shifted(self, images: NDArray[np.uint8], epoch: int, first: int) -> NDArray[np.uint8]:
        reach = self.shift
        side = images.shape[1]
        wide = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
        offsets = numpy_rng(self.seed, "shift", epoch, first).integers(0, 2 * reach + 1, (len(images), 2))
        return np.stack([w[y : y + side, x : x + side] for w, (y, x) in zip(wide, offsets, strict=True)])
