"""What victims are trained on: a suspected set as it is, as a scanner cleaned it, and what both are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.metrics.verdicts import Verdicts
from vlprompt.security.data import ScanData
from vlprompt.security.effect import pixels_of

__all__ = ["SuspectVerdicts", "Training", "training_set"]

_FILE = "verdicts.safetensors"


@dataclass(frozen=True)
class Training:
    """What a victim is trained on.

    Attributes:
        part: ``"poisoned"``: the suspected set as it is. ``"cleaned"``: without what a scanner suspects. ``"mended"``:
            what a scanner suspects stays, labelled with the object that it names. ``"perfectly cleaned"``: without what
            is poisoned. ``"clean"``: the images before the attack.
        cleaner: Label of the scanner; None where none is needed.
    """

    part: str
    cleaner: str | None = None


@dataclass(frozen=True)
class SuspectVerdicts:
    """A scanner's verdicts on n suspects, as files.

    Attributes:
        score: (n,), how suspicious.
        suspected: (n,), whether the score reaches the scanner's threshold.
        object: (n,), number of the object that the scanner names; None if it names none.
    """

    score: Tensor
    suspected: Tensor
    object: Tensor | None = None

    @classmethod
    def of(cls, verdicts: Verdicts, threshold: float) -> SuspectVerdicts:
        """Return what is kept of a scanner's verdicts.

        Args:
            verdicts: On the suspects, in their order.
            threshold: The score from which an image is called poisoned.
        """
        thing = None if verdicts.object is None else verdicts.object.argmax(1)
        return cls(verdicts.score, verdicts.score >= threshold, thing)

    def write(self, folder: Path) -> None:
        """Write them into a cell's folder."""
        tensors = {"score": self.score, "suspected": self.suspected}
        if self.object is not None:
            tensors["object"] = self.object
        write_tensors(folder / _FILE, tensors, {})

    @classmethod
    def read(cls, folder: Path) -> SuspectVerdicts:
        """Read what :meth:`write` wrote.

        Raises:
            CheckpointError: If the file is missing or damaged.
        """
        tensors, _ = read_tensors(folder / _FILE)
        return cls(tensors["score"], tensors["suspected"], tensors.get("object"))


def training_set(
    training: Training, data: ScanData, verdicts: SuspectVerdicts | None
) -> tuple[Tensor, Tensor]:
    """Return the pixels (m, 3, S, S), in [0, 1], and the labels (m,) that a victim is trained on.

    Args:
        training: Which.
        data: Holds the n suspects, m <= n of which are trained on.
        verdicts: Of the scanner that cleans, on all n; None where none is needed.
    """
    if training.part == "clean":
        return pixels_of(data.innocents), torch.tensor(data.innocents.labels)

    pixels = pixels_of(data.suspects)
    labels = torch.tensor(data.suspects.labels)
    if training.part == "poisoned":
        return pixels, labels
    if training.part == "perfectly cleaned":
        clean = torch.tensor(data.suspects.targets["trigger"]) == 0
        return pixels[clean], labels[clean]

    assert verdicts is not None
    if training.part == "cleaned":
        return pixels[~verdicts.suspected], labels[~verdicts.suspected]
    assert verdicts.object is not None
    return pixels, torch.where(verdicts.suspected, verdicts.object, labels)
