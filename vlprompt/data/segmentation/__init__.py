"""Images with masks and the phrases that ask for them: reading, checking, drawing and converting such data sets."""

from vlprompt.data.segmentation.base import MaskDataset, MaskedImage, MaskSample
from vlprompt.data.segmentation.catalog import list_segmentation, load_segmentation
from vlprompt.data.segmentation.guards import label_leaks, overlaps, pair_problems
from vlprompt.data.segmentation.reading import MaskFiles, MaskRule, read_mask

__all__ = [
    "MaskDataset",
    "MaskFiles",
    "MaskRule",
    "MaskSample",
    "MaskedImage",
    "label_leaks",
    "list_segmentation",
    "load_segmentation",
    "overlaps",
    "pair_problems",
    "read_mask",
]
