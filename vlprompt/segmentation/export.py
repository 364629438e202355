"""A segmenter for one list of phrases as one file, see :mod:`vlprompt.saved.export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vlprompt.core.errors import DataError
from vlprompt.saved.export import ExportError, export_module
from vlprompt.segmentation.base import Segmenter

__all__ = ["export_segmenter"]


def export_segmenter(segmenter: Segmenter, path: str | Path, phrases: Sequence[str]) -> Path:
    """Write a segmenter for one list of phrases as one file and check that it gives the same logits.

    The file takes ``images`` (1, 3, H, W) of the backbone's size and gives ``logits`` (1, P, H, W), one map for each
    phrase. The metadata ``vlprompt`` is a JSON text as of :func:`vlprompt.saved.export.export`, with ``phrases`` in the
    place of ``classnames``.

    Args:
        segmenter: What was trained, on a backbone in float32.
        path: ``*.onnx`` or ``*.pt2``; replaced if it is there.
        phrases: P phrases.

    Raises:
        ExportError: See :func:`vlprompt.saved.export.export`.
        DataError: If there is no phrase, or one is empty.
    """
    if isinstance(phrases, str) or not phrases or not all(phrase.strip() for phrase in phrases):
        raise DataError(
            f"a segmenter is exported for a list of phrases, none of them empty; got {phrases!r}."
        )
    if segmenter.backbone.vision.dtype != torch.float32:
        raise ExportError(
            f"the backbone runs in {segmenter.backbone.vision.dtype}; load the segmenter on one in float32 to "
            "export it."
        )

    facts = {
        "method": segmenter.title(),
        "phrases": list(phrases),
        "preprocess": {**segmenter.backbone.fingerprint["preprocess"], "resize_mode": "squash"},
        "backbone": {"name": segmenter.backbone.name, "id": segmenter.backbone.fingerprint["id"]},
    }
    height, width = segmenter.image_size
    return export_module(_Phrases(segmenter, phrases), (height, width), path, facts, any_batch=False)


class _Phrases(nn.Module):
    """(1, 3, H, W) images to (1, P, H, W) logits; the image tower runs once, the decoder for all phrases together."""

    def __init__(self, segmenter: Segmenter, phrases: Sequence[str]) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.phrases = list(phrases)
        self.train(segmenter.training)

    def forward(self, images: Tensor) -> Tensor:
        count = len(self.phrases)
        frozen = {
            name: state.expand(count, *state.shape[1:])
            for name, state in self.segmenter.frozen(images).items()
        }
        size = (int(images.shape[-2]), int(images.shape[-1]))
        return self.segmenter.decode(frozen, self.phrases, size).transpose(0, 1)
