"""Every public function says what it takes when it is given an object of another kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import vlprompt
from vlprompt.backbones import Backbone

NAMES = ["cat", "dog"]
IMAGE = Image.new("RGB", (64, 64))


@pytest.fixture(scope="module")
def objects() -> SimpleNamespace:
    """One object of each kind."""
    backbone: Backbone = vlprompt.create_backbone("tiny", "random")
    return SimpleNamespace(
        backbone=backbone,
        learner=vlprompt.create_learner("coop", backbone, NAMES),
        segmenter=vlprompt.create_segmenter("clipseg", backbone),
        adapter=vlprompt.create_adapter("zero", backbone, NAMES),
    )


CALLS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "a name for a backbone": (
        lambda o, _: vlprompt.create_learner("coop", "tiny", NAMES),  # type: ignore[arg-type]
        "a backbone is what vlprompt.create_backbone.* got str 'tiny'",
    ),
    "a learner for a backbone": (
        lambda o, _: vlprompt.create_segmenter("clipseg", o.learner),
        "a backbone is what .* got CoOp",
    ),
    "a segmenter to adapt": (
        lambda o, _: vlprompt.create_adapter("zero", o.segmenter, NAMES),
        "a backbone or a learner is what .* got CLIPSeg",
    ),
    "a number for a name": (
        lambda o, _: vlprompt.create_learner(5, o.backbone, NAMES),  # type: ignore[arg-type]
        "the name of a learner is a text; got int",
    ),
    "a path that predicts": (
        lambda o, _: vlprompt.predict("my_prompt", IMAGE),  # type: ignore[arg-type]
        "a classifier is what .* got str 'my_prompt'",
    ),
    "a segmenter that names": (
        lambda o, _: vlprompt.predict(o.segmenter, IMAGE),
        "a classifier is what .* got CLIPSeg",
    ),
    "an adapter that is fitted": (
        lambda o, _: vlprompt.fit(o.adapter, vlprompt.load_dataset("digits")),
        "a learner is what .* got Zero.* vlprompt.fit_segmenter",
    ),
    "a learner for an adapter": (
        lambda o, _: list(vlprompt.adapt_stream(o.learner, [IMAGE])),
        "an adapter is what .* got CoOp",
    ),
    "a backbone that is saved": (
        lambda o, folder: vlprompt.save(o.backbone, folder),
        "a learner or a segmentation model is what .* got Backbone",
    ),
    "a number for a path": (
        lambda o, _: vlprompt.load(5),  # type: ignore[arg-type]
        "a path is a text or a Path; got int",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_it_is_said_in_a_sentence(call: str, objects: SimpleNamespace, tmp_path: Path) -> None:
    function, message = CALLS[call]
    with pytest.raises(vlprompt.VLPromptError, match=message):
        function(objects, tmp_path)
