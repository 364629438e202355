"""The small members of all families of backbones, which docs/families.py builds, one of each for all tests."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vlprompt.backbones import Backbone

pytest.importorskip("transformers", reason="transformers is an optional extra")
pytest.importorskip("timm.models.naflexvit", reason="this timm has no NaFlex towers")

__all__ = [
    "FAMILIES",
    "IMAGE_FAMILIES",
    "TEXT_FAMILIES",
    "TRANSFORMERS",
    "family_backbone",
    "load_page_maker",
]


@functools.cache
def load_page_maker() -> ModuleType:
    """Return the script that makes docs/backbones.md."""
    path = Path(__file__).parent.parent / "docs" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_BY_NAME = {family.name: family for family in load_page_maker().FAMILIES}
FAMILIES = tuple(_BY_NAME)
TRANSFORMERS = tuple(name for name in FAMILIES if name.endswith(" text"))
"""Families whose text tower is an encoder of the transformers library."""
IMAGE_FAMILIES = tuple(name for name in FAMILIES if name not in TRANSFORMERS and name != "MetaCLIP worldwide")
"""Families that differ in their image tower."""
TEXT_FAMILIES = ("CLIP", "CoCa", "SigLIP, SigLIP 2", "MobileCLIP-B", "MetaCLIP worldwide", *TRANSFORMERS)
"""Families that differ in their text tower."""


@functools.cache
def family_backbone(name: str) -> Backbone:
    """Return the small member of a family. Nothing may change it."""
    backbone: Backbone = load_page_maker().build(_BY_NAME[name])
    return backbone
