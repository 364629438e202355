"""What every detector is: a frozen image side, concepts as its language, boxes with a logit per concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlprompt.core.errors import DataError
from vlprompt.core.precision import Precision
from vlprompt.detection.boxes import Target, box_losses

__all__ = ["Detections", "Detector", "Frozen"]

Frozen = Mapping[str, Tensor]


@dataclass(frozen=True)
class Detections:
    """What a detector predicts for B images.

    Attributes:
        logits: (B, N, C), of "this box shows concept c".
        boxes: (B, N, 4) centre x, centre y, width and height, as fractions of the image's sides.
    """

    logits: Tensor
    boxes: Tensor


class Detector(nn.Module):
    """Base of all detectors. Everything is frozen; what is searched comes in as an argument.

    Attributes:
        method: Its registry name.
        identity: Facts that its concepts depend on; JSON-able.
        width: d, of a concept's vectors: what the text encoder writes.
        tower: Prefixes of the names of parameters that :meth:`frozen` uses.
        precision: What its encoders are stored and run in.
    """

    method: str = ""
    identity: dict[str, Any]
    width: int
    tower: tuple[str, ...] = ()
    precision: Precision = "fp32"

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return (3, h, w), the same size for every image.

        Sides are squashed, so that boxes as fractions of the sides stay true.
        """
        raise NotImplementedError

    def frozen(self, images: Tensor) -> dict[str, Tensor]:
        """Return what no concept changes of (B, 3, h, w) images; the first axis of each tensor is the image."""
        raise NotImplementedError

    def detect(self, frozen: Frozen, concepts: Tensor) -> Detections:
        """Return detections of (C, L, d) concepts; a concept's logit is the mean over its L vectors."""
        raise NotImplementedError

    @property
    def reads_text(self) -> bool:
        """Whether :meth:`read` works: there is a text encoder and a tokenizer for it."""
        return True

    def read(self, texts: Sequence[str]) -> Tensor:
        """Return (n, d) outputs of the text encoder.

        Raises:
            BackboneError: If there is no text encoder or tokenizer.
        """
        raise NotImplementedError

    def embeds(self, frozen: Frozen) -> Tensor:
        """Return (B, N, d): what each box shows, in the space of concepts.

        Raises:
            DataError: If boxes have no such vectors.
        """
        raise DataError(f"init='visual': boxes of {type(self).__name__} have no vectors in the text's space.")

    def drop_text(self) -> None:
        """Delete the text encoder."""
        raise NotImplementedError

    def losses(self, frozen: Frozen, concepts: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the host's own losses by name; their sum is minimised."""
        detections = self.detect(frozen, concepts)
        return box_losses(detections.logits, detections.boxes, targets)

    def forward(self, images: Tensor, concepts: Tensor) -> Detections:
        """Return detections of (C, L, d) concepts in (B, 3, h, w) images."""
        return self.detect(self.frozen(images), concepts)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
