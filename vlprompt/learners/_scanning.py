"""What every backdoor scanner can do, be it a learner or a baseline."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.data import ImageDataset
from vlprompt.data.compositions import CompositionDataset
from vlprompt.data.forensics import SIDE, examined
from vlprompt.data.transforms import Preprocess
from vlprompt.data.triggers.base import native, size_label
from vlprompt.metrics.verdicts import Verdicts

__all__ = [
    "ImageScanner",
    "composed_data",
    "digest_of",
    "embed_examined",
    "examining",
    "native_size_of",
    "prepared",
    "seen_compositions",
]


class ImageScanner(ABC):
    """Tells poisoned images from clean ones, by rows that the frozen image tower gives.

    Attributes:
        method: Registry name.
        backbone: Frozen towers.
        classnames: C objects.
        triggers: T names, the first ``"clean"``.
        needs_whole_set: Whether it only judges a whole labelled data set at once, never single images.
    """

    method: str
    backbone: Backbone
    classnames: tuple[str, ...]
    triggers: tuple[str, ...]
    needs_whole_set: bool = False

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The score from which an image is called poisoned."""

    @property
    def native_size(self) -> int | None:
        """Pixels a side to which training brought every image; None if it left images as they come."""
        return None

    @property
    def digest(self) -> str:
        """Hex digits that change when what was learned does."""
        return digest_of({})

    @property
    def preprocess(self) -> Preprocess:
        """What makes (3, H, W) of an image of any size, as :meth:`embed_images` reads it.

        Images of training had the native size before they were enlarged to the tower's input. An image that takes
        another way has other statistics of its pixels, and is suspected for them.
        """
        return prepared(self.native_size, self.backbone.preprocess)

    @abstractmethod
    def embed_images(self, images: Tensor) -> Tensor:
        """Return the rows (B, D) that :meth:`judge` reads, for preprocessed images (B, 3, H, W)."""

    @abstractmethod
    def judge(self, rows: Tensor) -> Verdicts:
        """Return verdicts on (n, D) rows of :meth:`embed_images`, each row by itself.

        Raises:
            DataError: If the scanner needs a whole set.
        """

    def judge_set(self, rows: Tensor, labels: Tensor) -> Verdicts:
        """Return verdicts on a whole data set.

        Args:
            rows: (n, D), of :meth:`embed_images`.
            labels: (n,), the labels that the images came with; an attacker may have flipped some.
        """
        return self.judge(rows)


@dataclass(frozen=True)
class _NativePreparation:
    """Brings an image to a scanner's native size, then prepares it for the tower.

    Attributes:
        native_size: Pixels a side.
        tower: The backbone's preparation.
    """

    native_size: int
    tower: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        return self.tower(Image.fromarray(native(image, self.native_size)))


@dataclass(frozen=True)
class _ForensicPreparation:
    """Prepares an image for the tower, and looks at its pixels before that, at the native size or at its own.

    Attributes:
        native_size: Pixels a side; None for every image's own size.
        tower: The backbone's preparation.
    """

    native_size: int | None
    tower: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = Image.fromarray(native(image, self.native_size))
        views = examined(pixels)
        if self.native_size is not None and self.native_size <= SIDE:
            views = views[:1]  # the others are empty
        return torch.cat([self.tower(pixels).flatten(), torch.from_numpy(views).flatten()])


def prepared(native_size: int | None, tower: Preprocess) -> Preprocess:
    """Return the preparation of images for a scanner with a native size; the tower's own without one."""
    return tower if native_size is None else _NativePreparation(native_size, tower)


def examining(native_size: int | None, tower: Preprocess) -> Preprocess:
    """Return a preparation that also looks at the pixels themselves: (3 H W + V (1 + E),) of an image.

    The tower's (3, H, W) input comes first, then V views of :func:`vlprompt.data.forensics.examined`: one if images are
    brought to a native size that fits into a view, else all.

    Args:
        native_size: Pixels a side that images are brought to before; None to leave every image at its own size.
        tower: The backbone's preparation.
    """
    return _ForensicPreparation(native_size, tower)


@torch.no_grad()
def embed_examined(backbone: Backbone, images: Tensor, method: str) -> Tensor:
    """Return (B, d + V (1 + E)) rows of images that :func:`examining` prepared: embeddings, then views.

    Args:
        backbone: Whose preparation the images have.
        images: (B, 3 H W + V (1 + E)).
        method: What the scanner is called.

    Raises:
        DataError: If the images have another preparation.
    """
    height, width = backbone.image_size
    pixels = 3 * height * width
    if images.dim() != 2 or images.shape[1] <= pixels:
        raise DataError(
            f"this {method} looks at images before the tower's preparation enlarges them; prepare them with "
            f"learner.preprocess. These are {tuple(images.shape)}."
        )
    embeddings = backbone.image_embeddings(images[:, :pixels].unflatten(1, (3, height, width)))
    return torch.cat([embeddings, images[:, pixels:].to(embeddings)], dim=1)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that change when one of several tensors does."""
    result = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        result.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        result.update(tensor.float().numpy().tobytes())
    return result.hexdigest()[:16]


def native_size_of(sizes: set[int | None]) -> int | None:
    """Return the one native size of all training data; None if their images keep their own sizes.

    Raises:
        DataError: If there are several.
    """
    if len(sizes) > 1:
        raise DataError(
            "a scanner learns from images of one native size, these have "
            f"{', '.join(sorted(str(size_label(size)) for size in sizes))} pixels a side. Give all data the same "
            "native_size."
        )
    return next(iter(sizes))


def composed_data(data: ImageDataset, triggers: Sequence[str], method: str) -> CompositionDataset:
    """Return a data set, checked to know the triggers that a scanner was built for.

    Args:
        data: What the scanner is to learn from.
        triggers: Of the scanner.
        method: What the scanner is called.

    Raises:
        DataError: If the data don't say their triggers, or say others.
    """
    if not isinstance(data, CompositionDataset):
        raise DataError(
            f"{method} learns from images whose trigger is known, and {data.name} does not say. Use "
            f"triggered:{data.name}."
        )
    if tuple(data.triggers) != tuple(triggers):
        raise DataError(
            f"{method} was built for the triggers {', '.join(triggers)}; {data.name} has {', '.join(data.triggers)}. "
            "Give both the same list (learner.triggers and data.options.triggers)."
        )
    return data


def seen_compositions(data: CompositionDataset) -> Tensor:
    """Return the (T, C) compositions that training shows."""
    assert data.compositions is not None
    return torch.as_tensor(data.compositions.seen)
