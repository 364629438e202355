"""What every backdoor scanner can do, be it a learner or a baseline."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.data.transforms import Preprocess
from vlprompt.data.triggers.base import native
from vlprompt.metrics.verdicts import Verdicts

__all__ = ["ImageScanner", "digest_of", "native_size_of", "prepared"]


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


def prepared(native_size: int | None, tower: Preprocess) -> Preprocess:
    """Return the preparation of images for a scanner with a native size; the tower's own without one."""
    return tower if native_size is None else _NativePreparation(native_size, tower)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that change when one of several tensors does."""
    result = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        result.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        result.update(tensor.float().numpy().tobytes())
    return result.hexdigest()[:16]


def native_size_of(sizes: set[int]) -> int:
    """Return the one native size of all training data.

    Raises:
        DataError: If there are several.
    """
    if len(sizes) > 1:
        raise DataError(
            "a scanner learns from images of one native size, these have "
            f"{', '.join(map(str, sorted(sizes)))} pixels a side. Give all data the same native_size."
        )
    return next(iter(sizes))
