"""ImageNet's class ids and curated names, which timm and open_clip already ship.

The names are OpenAI's, in the order of the sorted WordNet ids (``n01440764`` ...). That list gives two pairs of
classes the same name, which no text can tell apart; the second of each pair gets its WordNet word here.

Source: openai/CLIP notebooks/Prompt_Engineering_for_ImageNet.ipynb, equal to open_clip's list.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from vlprompt.core.errors import UnknownNameError

__all__ = ["SYNSET_LISTS", "synset_ids", "synset_names"]

SYNSET_LISTS = {
    "imagenet": "imagenet_synsets.txt",
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
}
# CLIP's list says "missile" (also n03773504) and "sunglasses" (also n04356056) for these two.
_TOLD_APART = {"n04008634": "projectile", "n04355933": "sunglass"}


@cache
def synset_ids(which: str) -> tuple[str, ...]:
    """Return the sorted WordNet ids of a class list: 1,000 of ``"imagenet"``, 200 of ``-a`` and of ``-r``.

    Raises:
        UnknownNameError: For another list.
    """
    if which not in SYNSET_LISTS:
        raise UnknownNameError("list of synsets", which, SYNSET_LISTS)
    text = files("timm.data").joinpath("_info", SYNSET_LISTS[which]).read_text(encoding="utf-8")
    return tuple(sorted(text.split()))


@cache
def synset_names(which: str) -> tuple[str, ...]:
    """Return one class name per id of :func:`synset_ids`."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # here: importing open_clip takes seconds

    names = dict(zip(synset_ids("imagenet"), IMAGENET_CLASSNAMES, strict=True)) | _TOLD_APART
    return tuple(names[i] for i in synset_ids(which))
