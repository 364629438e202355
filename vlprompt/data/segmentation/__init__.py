"""Images with masks and the phrases that ask for them: samples, readers, checks and conversions.

Such data sets are opened by :func:`vlprompt.load_segmentation` (``catalog``).
"""

from vlprompt.data.segmentation.base import MaskDataset, MaskedImage, MaskSample
from vlprompt.data.segmentation.guards import label_leaks, long_phrases, overlaps, pair_problems
from vlprompt.data.segmentation.reading import MaskFiles, MaskRule, read_mask

__all__ = [
    "MaskDataset",
    "MaskFiles",
    "MaskRule",
    "MaskSample",
    "MaskedImage",
    "label_leaks",
    "long_phrases",
    "overlaps",
    "pair_problems",
    "read_mask",
]
