"""What a learner trains on and is calibrated on: cached embeddings where they are exact, pixels otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlprompt.classification.evaluate import encoder_of, image_embeddings
from vlprompt.classification.prefixes import KeptStates, kept_states, pass_size
from vlprompt.core.errors import DataError
from vlprompt.core.processes import accelerator
from vlprompt.core.trainable import Batch
from vlprompt.data import Augmentation, FeatureCache, ImageDataset
from vlprompt.learners import Learner
from vlprompt.saved.card import tensors_digest
from vlprompt.training.batches import Batches, ReadBatches, Rows, TensorBatches, epoch_plan
from vlprompt.training.options import TrainOptions

__all__ = ["ImageBatches", "TrainingSource", "ValidationSource"]


class ImageBatches(ReadBatches):
    """Batches of decoded, augmented pixels, for learners that touch the image tower.

    Args:
        data: Training samples.
        preprocess: The learner's.
        augmentation: What makes a view of an image.
        options: ``batch_size``, ``seed`` and ``drop_last`` are read.
        views: Number of fixed views per image; 0 draws a new one every epoch.
        known: What is known of every fixed view by name, (n, d) embeddings of each: ``"frozen"``, the frozen tower's,
            ``"teacher"``, a teacher's. Batches carry what there is.
        pairs: Whether batches carry the pixels of each image's next view, as ``"second"``.
    """

    def __init__(
        self,
        data: ImageDataset,
        preprocess: Any,
        augmentation: Augmentation,
        options: TrainOptions,
        views: int,
        known: Mapping[str, Sequence[Tensor]] | None = None,
        pairs: bool = False,
    ) -> None:
        self.data = data
        self.preprocess = preprocess
        self.augmentation = augmentation
        self.options = options
        self.views = views
        self.known = known or {}
        self.pairs = pairs
        self.targets = {name: torch.tensor(values) for name, values in data.targets.items()}

    def plan(self, epoch: int) -> list[np.ndarray]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        options = self.options
        return epoch_plan(len(self.data), options.batch_size, options.seed, epoch, options.drop_last)

    def fetch(self, indices: np.ndarray, epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        view = epoch % self.views if self.views else epoch
        index = torch.as_tensor(indices)

        batch: Batch = {"image": torch.stack([self._view(int(i), view) for i in indices])}
        batch |= {name: values[index] for name, values in self.targets.items()}
        batch["index"] = index

        for name, of_views in self.known.items():
            batch[name] = of_views[view % len(of_views)][index]
        if self.pairs:
            batch["second"] = torch.stack([self._view(int(i), view + 1) for i in indices])
        return batch

    def _view(self, index: int, view: int) -> Tensor:
        image, _ = self.data[index]
        return self.augmentation.augment(
            image, self.preprocess, self.options.seed, self.data.key(index), view
        )


@dataclass(frozen=True)
class TrainingSource:
    """Turns a data set into what a learner trains on.

    Attributes:
        learner: The classifier that is trained on the data.
        data: Its training samples.
        augmentation: What makes a view of an image.
        views: Number of fixed views per image; 0 draws a new one every epoch.
        options: Of the run.
        cache: Where image features are stored.
        places: Where each class of the data stands among the learner's; empty if the two lists are the same.
    """

    learner: Learner
    data: ImageDataset
    augmentation: Augmentation
    views: int
    options: TrainOptions
    cache: FeatureCache
    places: tuple[int, ...] = ()

    @property
    def repeats(self) -> bool:
        """Whether the same pixels come again in later epochs, so that their features can be stored."""
        return self.views > 0 or not self.augmentation.is_random

    @property
    def _fixed_views(self) -> int:
        """V; views without chance are all the same."""
        return max(1, self.views) if self.augmentation.is_random else 1

    @property
    def positions(self) -> Tensor:
        """See :attr:`vlprompt.learners.hooks.TrainingSamples.positions`."""
        return torch.tensor(self.places or range(len(self.data.classnames)))

    def states(self) -> list[KeptStates]:
        """Return the kept token states of every fixed view; empty if training reads embeddings or pixels."""
        if self.learner.static_images or not self.repeats:
            return []

        parts = accelerator().num_processes * self.options.accumulation
        return kept_states(
            self.learner,
            self.data,
            self.cache,
            size=pass_size(self.options.batch_size, len(self.data), parts),
            augmentation=self.augmentation,
            seed=self.options.seed,
            views=self._fixed_views,
        )

    def batches(self, states: Sequence[KeptStates] | None = None) -> Batches:
        """Return what the trainer iterates over.

        Args:
            states: What :meth:`states` returned, or nothing to read pixels; None: what it returns.
        """
        learner = self.learner
        known = self._of_teacher()
        if learner.static_images and self.repeats:
            return self._stored({"embedding": self._embeddings(), **known})

        if learner.reads_frozen and self.repeats and learner.teacher is None:
            known["frozen"] = self._frozen()
        states = self.states() if states is None else states
        if states:
            return self._stored({"image": states, **known})
        return ImageBatches(
            self.data,
            learner.preprocess,
            self.augmentation,
            self.options,
            self.views,
            known,
            pairs=learner.pairs_views and not self.repeats,
        )

    def _stored(self, views: Mapping[str, Sequence[Rows]]) -> TensorBatches:
        """Return batches of what is stored for every view, with the data's targets."""
        tensors = dict(views)
        for name, values in self.data.targets.items():
            tensors[name] = [torch.tensor(values)]
        return TensorBatches(tensors, self.options.batch_size, self.options.seed, self.options.drop_last)

    def first_epoch(self) -> Iterator[Batch]:
        """See :meth:`vlprompt.learners.hooks.TrainingSamples.first_epoch`."""
        batches = self.batches()
        for part in batches.plan(0):
            yield batches.fetch(part, 0)

    def training_data(self) -> tuple[Tensor, Tensor]:
        """See :meth:`vlprompt.learners.hooks.TrainingSamples.training_data`."""
        return torch.stack(self._embeddings()), _truth(self.data)

    def _of_teacher(self) -> dict[str, Sequence[Tensor]]:
        """Return ``"teacher"``: what a teacher's image tower makes of every fixed view; nothing where there is none.

        Raises:
            DataError: If views come once only.
        """
        teacher = self.learner.teacher
        if teacher is None:
            return {}
        if not self.repeats:
            raise DataError(
                f"{self.learner.title()} has a teacher, which sees every view once: give fixed views (data.views=1 or "
                "more), or no augmentation."
            )

        encode, fingerprint = encoder_of(teacher)
        if not teacher.static_images:  # its prompts are in the image tower
            encode = teacher.embed_images
            fingerprint += tensors_digest(
                {k: t.cpu().contiguous() for k, t in teacher.trainable_state().items()}
            )
        with torch.no_grad():
            rows = self.cache.view_features(
                self.data,
                encode,
                teacher.preprocess,
                fingerprint=fingerprint,
                augmentation=self.augmentation,
                seed=self.options.seed,
                views=range(self._fixed_views),
            )
        return {"teacher": rows}

    def _frozen(self) -> list[Tensor]:
        """Return for every fixed view the embeddings that the frozen tower makes of it, or of the next view."""
        embeddings = self._embeddings()
        return [*embeddings[1:], *embeddings[:1]] if self.learner.pairs_views else embeddings

    def _embeddings(self) -> list[Tensor]:
        """Return the (n, d) embeddings of every fixed view."""
        encode, fingerprint = encoder_of(self.learner)

        return self.cache.view_features(
            self.data,
            encode,
            self.learner.preprocess,
            fingerprint=fingerprint,
            augmentation=self.augmentation,
            seed=self.options.seed,
            views=range(self._fixed_views),
        )


@dataclass(frozen=True)
class ValidationSource:
    """Validation samples as a learner's :meth:`calibrate` sees them.

    Attributes:
        learner: Their classifier.
        data: The samples.
        cache: Where image features are stored.
    """

    learner: Learner
    data: ImageDataset
    cache: FeatureCache

    def validation_data(self) -> tuple[Tensor, Tensor]:
        """See :meth:`vlprompt.learners.hooks.ValidationSamples.validation_data`."""
        embeddings = image_embeddings(self.learner, self.data, cache=self.cache)
        several = self.learner.takes_several_labels
        return embeddings, _truth(self.data) if several else torch.tensor(self.data.labels)


def _truth(data: ImageDataset) -> Tensor:
    """Return (n,) labels; (n, C) of all labels where an image can have several."""
    return torch.from_numpy(data.multi_hot()) if data.multi_label else torch.tensor(data.labels)
