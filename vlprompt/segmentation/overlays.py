"""Masks laid over their images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from vlprompt.data.segmentation.base import IGNORE
from vlprompt.segmentation.evaluate import predict_mask

if TYPE_CHECKING:
    from vlprompt.segmentation.experiment import SegmentCell, Session

__all__ = ["overlay", "overlay_sheets", "sheet"]

_TRUE, _FOUND = (16, 185, 129), (239, 68, 68)


def overlay(
    image: Image.Image, mask: NDArray[Any], colour: tuple[int, int, int] = _FOUND, share: float = 0.45
) -> Image.Image:
    """Return an image with a mask's pixels tinted and its border drawn; pixels that don't count (255) turn grey.

    Args:
        image: RGB.
        mask: (H, W) bool, or 0, 1 and 255.
        colour: Of the mask.
        share: Of the tint in the colour of a pixel, in [0, 1].
    """
    pixels = np.asarray(image.convert("RGB"), np.float32).copy()
    inside = np.asarray(mask) == 1
    pixels[inside] = (1 - share) * pixels[inside] + share * np.asarray(colour, np.float32)
    pixels[inside & ~ndimage.binary_erosion(inside)] = colour
    if mask.dtype != bool:
        pixels[np.asarray(mask) == IGNORE] = 128
    return Image.fromarray(pixels.round().astype(np.uint8))


def sheet(rows: Sequence[tuple[str, Mapping[str, Image.Image]]]) -> bytes:
    """Return a PNG of a grid of images: a phrase and an image per column title in every row."""
    columns = list(rows[0][1])
    with rc_context({"font.size": 8}):
        figure = Figure(
            figsize=(1.35 * len(columns) + 0.2, 1.5 * len(rows) + 0.3), layout="constrained", dpi=110
        )
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        for y, (phrase, images) in enumerate(rows):
            for x, column in enumerate(columns):
                axis = axes[y][x]
                axis.imshow(np.asarray(images[column]), interpolation="nearest")
                axis.set_xticks([]), axis.set_yticks([])
                axis.spines[:].set_visible(False)
                if y == 0:
                    axis.set_title(column, fontsize=8)
                if x == 0:
                    axis.set_xlabel(phrase if len(phrase) < 26 else f"{phrase[:25]}…", fontsize=7)
        out = io.BytesIO()
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
        return out.getvalue()


def overlay_sheets(session: Session, cells: Mapping[SegmentCell, Mapping[str, float]]) -> dict[str, bytes]:
    """Return a PNG per model and data set: some test images, truth, and what each strategy finds (first seed).

    Images are taken evenly from the test set, not chosen by how well they turn out.
    """
    config = session.config
    found: dict[str, bytes] = {}
    if not config.overlays:
        return found
    for model in config.models:
        for dataset in config.data.names:
            own = [c for c in cells if (c.model, c.dataset, c.seed) == (model, dataset, config.seeds[0])]
            own = [c for c in own if c.depth in (None, max(config.depths, default=None))]
            if not own:
                continue
            data = session.data(dataset, "test", config.seeds[0])
            step = max(1, len(data) // config.overlays)
            pairs = [data[i] for i in range(0, len(data), step)][: config.overlays]
            rows = [(p.phrase, {"image": p.image, "truth": overlay(p.image, p.mask, _TRUE)}) for p in pairs]
            for cell in own:
                segmenter = session.trained(cell)
                for pair, (_, row) in zip(pairs, rows, strict=True):
                    row[cell.strategy] = overlay(
                        pair.image, predict_mask(segmenter, pair.image, pair.phrase) > 0.5
                    )
            place = "".join(c if c.isalnum() else "-" for c in dataset)
            found[f"{model}-{place}"] = sheet(rows)
    return found
