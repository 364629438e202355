"""How well a mask fits another: overlap and boundary distance of one pair, and their means over a data set.

Conventions that numbers depend on, and where papers differ:

* Everything is computed per pair at the mask's own size, then averaged; ``iou_dataset`` alone pools pixels of pairs.
* Empty prediction on an empty mask is perfect (Dice and IoU 1, distance 0); such pairs are reported apart as well.
* If exactly one of two masks is empty, no distance exists: the image's diagonal stands for it.
* Pixels that don't count (255) are outside of both masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlprompt.core.errors import DataError
from vlprompt.data.segmentation.base import IGNORE

__all__ = ["PairScore", "hausdorff", "mean_iou_of_maps", "score_pair", "summarise_pairs"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class PairScore:
    """One pair's figures.

    Attributes:
        record: Name of the pair.
        label: Number of its class.
        dice: 2 |A n B| / (|A| + |B|).
        iou: |A n B| / |A u B|.
        hd95: See :func:`hausdorff` at 95, pixels; NaN if it wasn't asked for.
        everything: Dice of a prediction that marks every pixel: what can be had without looking.
        intersection: Pixels in both masks.
        union: Pixels in either.
        empty: Whether the true mask is empty.
    """

    record: str
    label: int
    dice: float
    iou: float
    hd95: float
    everything: float
    intersection: int
    union: int
    empty: bool


def score_pair(
    predicted: NDArray[np.bool_],
    mask: NDArray[np.uint8],
    record: str = "",
    label: int = 0,
    boundary: bool = True,
) -> PairScore:
    """Compare a predicted mask with a true one.

    Args:
        predicted: (H, W) bool.
        mask: (H, W) with 1 inside, 0 outside, 255 where it doesn't count.
        record: Name of the pair.
        label: Number of its class.
        boundary: Whether to compute the distance of boundaries, which costs most.

    Raises:
        DataError: If the shapes differ, or the mask has other values.
    """
    if predicted.shape != mask.shape:
        raise DataError(f"{record}: the prediction is {predicted.shape}, the mask {mask.shape}.")
    if strange := sorted({int(v) for v in np.unique(mask)} - {0, 1, IGNORE}):
        raise DataError(f"{record}: a mask holds 0, 1 and 255 only, got {strange[:3]}.")

    counts = mask != IGNORE
    true = mask == 1
    ours = predicted.astype(bool) & counts
    inter = int((ours & true).sum())
    union = int((ours | true).sum())
    size = int(ours.sum() + true.sum())
    area = int(counts.sum())

    return PairScore(
        record,
        label,
        dice=2 * inter / size if size else 1.0,
        iou=inter / union if union else 1.0,
        hd95=hausdorff(ours, true) if boundary else float("nan"),
        everything=2 * int(true.sum()) / (area + int(true.sum())) if area + true.sum() else 1.0,
        intersection=inter,
        union=union,
        empty=not true.any(),
    )


def hausdorff(first: Mask, second: Mask, percentile: float = 95.0) -> float:
    """Return a percentile of boundary distances in pixels, the larger of the two directions; 100: Hausdorff's own.

    This is MONAI's definition; medpy's pools both directions before the percentile. The boundary of a mask is its
    pixels with a neighbour (of four) outside.
    """
    if not first.any() or not second.any():
        return 0.0 if first.any() == second.any() else float(np.hypot(*first.shape))

    edges = [m & ~ndimage.binary_erosion(m, border_value=0) for m in (first, second)]
    # Of every pixel its distance to the nearest pixel of the other boundary; cropping changes no distance.
    rows, columns = (np.flatnonzero((edges[0] | edges[1]).any(axis)) for axis in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    a = edges[0][box]
    b = edges[1][box]
    there = ndimage.distance_transform_edt(~b)[a]
    back = ndimage.distance_transform_edt(~a)[b]

    return float(max(np.percentile(there, percentile), np.percentile(back, percentile)))


def summarise_pairs(scores: Sequence[PairScore], classnames: Sequence[str]) -> dict[str, float]:
    """Return flat figures of a data set.

    ``dice``, ``iou``, ``hd95`` and ``all_foreground_dice`` are means over pairs. ``macro_dice`` and ``macro_iou`` are
    means over classes of means over pairs. ``iou_dataset`` is the mean over classes of pooled intersections over pooled
    unions (the mIoU of semantic segmentation, without competition between classes). ``dice_filled`` and
    ``dice_empty`` split pairs by whether there was something to find; ``empty_share`` says how many had nothing.

    Raises:
        DataError: If there are no scores.
    """
    if not scores:
        raise DataError("no pairs to summarise.")

    distances = [s.hd95 for s in scores if not np.isnan(s.hd95)]
    by_class: dict[int, list[PairScore]] = {}

    for score in scores:
        by_class.setdefault(score.label, []).append(score)

    filled = [s for s in scores if not s.empty]
    empty = [s for s in scores if s.empty]
    pooled = {c: (sum(s.intersection for s in v), sum(s.union for s in v)) for c, v in by_class.items()}
    metrics = {
        "dice": _mean(s.dice for s in scores),
        "iou": _mean(s.iou for s in scores),
        **({"hd95": _mean(distances)} if distances else {}),
        "all_foreground_dice": _mean(s.everything for s in scores),
        "macro_dice": _mean(_mean(s.dice for s in v) for v in by_class.values()),
        "macro_iou": _mean(_mean(s.iou for s in v) for v in by_class.values()),
        "iou_dataset": _mean(i / u if u else 1.0 for i, u in pooled.values()),
        "empty_share": len(empty) / len(scores),
        **({"dice_filled": _mean(s.dice for s in filled)} if filled else {}),
        **({"dice_empty": _mean(s.dice for s in empty)} if empty else {}),
        "pairs": float(len(scores)),
    }

    if 1 < len(by_class) <= 40:
        metrics |= {
            f"class/{classnames[c]}/dice": _mean(s.dice for s in by_class[c]) for c in sorted(by_class)
        }
    return metrics


def mean_iou_of_maps(
    intersections: Mapping[int, int], unions: Mapping[int, int], classnames: Sequence[str]
) -> dict[str, float]:
    """Return the mIoU of class maps (``argmax`` mode) over classes that occur in truth or prediction, pixels pooled."""
    present = [c for c in sorted(unions) if unions[c]]
    if not present:
        return {"argmax_miou": 1.0}
    values = {c: intersections.get(c, 0) / unions[c] for c in present}
    named = {f"argmax_iou/{classnames[c]}": v for c, v in values.items()} if len(present) <= 40 else {}
    return {"argmax_miou": _mean(values.values()), **named}


def _mean(values: object) -> float:
    return float(np.mean(list(values)))  # type: ignore[call-overload]
