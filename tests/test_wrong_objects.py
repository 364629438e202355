"""Every public function says what it takes when it is given an object of another kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlprompt
from vlprompt.adaptation.attack import PGD, attack_dataset
from vlprompt.adaptation.stream import adapt_dataset
from vlprompt.backbones import Backbone
from vlprompt.classification.predict import accuracy
from vlprompt.core.errors import DataError

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
        data=vlprompt.load_dataset("digits", "test").subset(range(2)).keep_classes([0, 1]),
        pairs=vlprompt.load_segmentation("scenes/masks", "test", images=1),
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
    "a word for what to do with bad images": (
        lambda o, _: list(vlprompt.adapt_stream(o.adapter, [IMAGE], on_bad_image="ignore")),  # type: ignore[arg-type]
        "on_bad_image: input should be 'error' or 'skip', got 'ignore'",
    ),
    "a text for a callback": (
        lambda o, _: vlprompt.fit(o.learner, [(IMAGE, 0)], epochs=1, callbacks=["bar"]),  # type: ignore[list-item]
        "a callback is what .* got str 'bar'",
    ),
    "a text for a callback of pairs": (
        lambda o, _: vlprompt.fit_segmenter(o.segmenter, o.pairs, epochs=1, callbacks=["bar"]),  # type: ignore[list-item]
        "a callback is what .* got str 'bar'",
    ),
    "a text for a callback of a run": (
        lambda o, _: vlprompt.run("fewshot_tiny.yaml", callbacks=["bar"]),  # type: ignore[list-item]
        "a callback is what .* got str 'bar'",
    ),
    "nothing to resume": (
        lambda o, _: vlprompt.fit(o.learner, [(IMAGE, 0)], epochs=1, resume=True),
        "resume: it continues what a folder holds",
    ),
    "nothing to resume of pairs": (
        lambda o, _: vlprompt.fit_segmenter(o.segmenter, o.pairs, epochs=1, resume=True),
        "resume: it continues what a folder holds",
    ),
    "batches of no image to evaluate": (
        lambda o, _: vlprompt.evaluate(o.learner.with_classes(o.data.classnames), o.data, batch_size=0),
        "batch_size must be a whole number from 1 on, got 0",
    ),
    "batches of fewer than no image": (
        lambda o, _: vlprompt.evaluate(o.learner.with_classes(o.data.classnames), o.data, batch_size=-1),
        "batch_size must be a whole number from 1 on, got -1",
    ),
    "batches of no image to name": (
        lambda o, _: accuracy(o.learner.with_classes(o.data.classnames), o.data, batch_size=0),
        "batch_size must be a whole number from 1 on, got 0",
    ),
    "batches of no image to adapt to": (
        lambda o, _: adapt_dataset({"zero": o.adapter}, o.data, batch_size=0),
        "batch_size must be a whole number from 1 on, got 0",
    ),
    "batches of no image to attack": (
        lambda o, folder: attack_dataset(o.data, o.learner, PGD(steps=1), folder, batch_size=0),
        "batch_size must be a whole number from 1 on, got 0",
    ),
    "batches of no pair": (
        lambda o, _: vlprompt.evaluate_segmenter(o.segmenter, o.pairs, batch_size=0),
        "batch_size must be a whole number from 1 on, got 0",
    ),
    "percent for a threshold": (
        lambda o, _: vlprompt.evaluate_segmenter(o.segmenter, o.pairs, threshold=50),
        r"threshold is a probability in \[0, 1\], got 50",
    ),
    "a fraction that is a text": (
        lambda o, _: PGD(eps="4/255"),  # type: ignore[arg-type]
        r"eps: '4/255' is not in \[0, 1\]",
    ),
    "pixels of another kind": (
        lambda o, _: PGD(pixels="half"),  # type: ignore[arg-type]
        "pixels: input should be 'bytes' or 'floats', got 'half'",
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


def _switches() -> list[tuple[str, str]]:
    """Return every public function with each of its arguments that are true or false."""
    functions = {name: getattr(vlprompt, name) for name in vlprompt.__all__}
    return [
        (name, argument.name)
        for name, function in functions.items()
        if inspect.isfunction(function)
        for argument in inspect.signature(function).parameters.values()
        if argument.annotation == "bool"
    ]


@pytest.mark.parametrize(("function", "switch"), _switches())
def test_a_switch_is_true_or_false(
    function: str, switch: str, objects: SimpleNamespace, tmp_path: Path
) -> None:
    """Python takes the word "no" for true."""
    arguments: dict[str, tuple[Any, ...]] = {
        "evaluate_segmenter": (objects.segmenter, objects.pairs),
        "export": (objects.learner, tmp_path / "model.onnx"),
        "fit": (objects.learner, objects.data),
        "fit_segmenter": (objects.segmenter, objects.pairs),
        "load_dataset": ("digits",),
        "load_segmentation": ("scenes/masks",),
        "push": (tmp_path, "somebody/something"),
        "run": ("fewshot_tiny.yaml",),
    }
    with pytest.raises(DataError, match=f"{switch} is True or False, got 'no'"):
        getattr(vlprompt, function)(*arguments[function], **{switch: "no"})


def test_a_switch_of_numpy_is_one() -> None:
    assert len(vlprompt.load_dataset("digits", "test", strict_shots=np.bool_(False)))  # type: ignore[arg-type]
