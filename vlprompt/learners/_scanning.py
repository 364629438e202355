"""What every backdoor scanner can do, be it a learner or a baseline."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.metrics.verdicts import Verdicts

__all__ = ["ImageScanner"]


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
