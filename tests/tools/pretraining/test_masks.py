"""Pretraining of the embedded segmenters: what its phrases and masks say, and that a run can be resumed and shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretraining import read_recipe
from pretraining.masks import MaskBatches, MaskModule, MaskOptions, pretrain_masks
from pretraining.phrases import MOST_OBJECTS, PhraseScenes
from vlprompt.backbones import create_backbone
from vlprompt.core.files import read_tensors
from vlprompt.data.scenes.attributes import HELD_OUT_MASKS, HELD_OUT_STYLES, PATTERNS, is_held_out
from vlprompt.data.scenes.captions import phrase
from vlprompt.data.scenes.render import render
from vlprompt.segmentation import create_segmenter
from vlprompt.segmentation._weights import EMBEDDED
from vlprompt.training.options import TrainOptions

OPTIONS = MaskOptions(
    segmenter="cris",
    decoder={"width": 16, "layers": 1, "heads": 2, "hidden": 16, "dropout": 0.1},
    images=24,
    watch=4,
    train=TrainOptions(
        epochs=2, batch_size=8, optimizer="adamw", lr=1e-3, warmup_epochs=0, schedule="cosine"
    ),
)


def test_scenes_hold_nothing_that_is_kept_back() -> None:
    scenes = PhraseScenes(300, 3)
    specs = [scenes.spec(i) for i in range(len(scenes))]
    objects = [o for spec in specs for o in spec.objects]
    assert not {spec.style for spec in specs} & HELD_OUT_STYLES
    assert not {o.shape for o in objects} & HELD_OUT_MASKS
    assert not [o for o in objects if is_held_out(o.shape, o.colour, o.pattern)]
    assert {len(spec.objects) for spec in specs} == set(range(1, MOST_OBJECTS + 1))
    assert scenes.spec(7) == PhraseScenes(9, 3).spec(7)  # a longer run sees the same first scenes


def test_a_phrase_names_all_it_fits_and_nothing_else() -> None:
    scenes = PhraseScenes(200, 1, negatives=0.3)
    empty = 0
    for i in range(len(scenes)):
        objects = scenes.spec(i).objects
        for draw in range(3):
            text, named = scenes.phrase(i, draw)
            assert (text, named) == scenes.phrase(i, draw)
            empty += not named
            for place, item in enumerate(objects):
                whole = phrase(item).split()  # pattern, colour, shape
                said = f" {text.rstrip('.')} "
                if place in named:
                    assert any(f" {word} " in said for word in whole), (text, item)
                    continue
                # What isn't named differs from the phrase in something that is said.
                patterned = any(f" {said_of} " in said for said_of in PATTERNS)
                words = [
                    f" {item.colour} ",
                    f" {' '.join(whole[2:])} ",
                    *([f" {item.pattern} "] if patterned else []),
                ]
                assert not all(w in said for w in words), (text, item)
    assert 0.2 < empty / 600 < 0.4


def test_masks_are_those_of_the_image() -> None:
    scenes = PhraseScenes(5, 2)
    image, packed = scenes.rendered(3)
    drawn = render(scenes.spec(3))
    assert np.array_equal(image, drawn.image)
    masks = np.unpackbits(packed, axis=2).astype(bool)
    assert masks.shape == (MOST_OBJECTS, 64, 64)
    assert np.array_equal(masks[: len(drawn.masks)], drawn.masks)
    assert not masks[len(drawn.masks) :].any()


def test_batches_hold_what_the_towers_say(tmp_path: Path) -> None:
    segmenter = create_segmenter("clipseg", create_backbone("tiny"), "decoder", weights="random", hidden=16)
    scenes = PhraseScenes(12, 5)
    batches = MaskBatches(scenes, segmenter, tmp_path, OPTIONS.train)
    batch = batches.fetch(np.array([9, 2, 4]), epoch=1)
    assert batch["texts"] == [scenes.phrase(i, 1)[0] for i in (9, 2, 4)]
    named = scenes.phrase(2, 1)[1]
    expected = render(scenes.spec(2)).masks[named].any(0) if named else np.zeros((64, 64), bool)
    assert np.array_equal(batch["mask"][1, 0].numpy(), expected)
    image = Image.fromarray(render(scenes.spec(2)).image)
    state = segmenter.frozen(segmenter.preprocess(image)[None])
    for name, tensor in state.items():
        torch.testing.assert_close(batch[f"frozen/{name}"][1].float(), tensor[0], rtol=1e-2, atol=1e-2)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
    MaskBatches(scenes, segmenter, tmp_path, OPTIONS.train)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")} == written  # found, not made again


def test_batch_statistics_move_in_pretraining_only() -> None:
    segmenter = create_segmenter(
        "cris", create_backbone("tiny"), "decoder", weights="random", **OPTIONS.decoder
    )
    assert not any(
        m.training for m in segmenter.train().decoder.modules() if isinstance(m, torch.nn.BatchNorm2d)
    )
    module = MaskModule(segmenter).train()
    assert all(m.training for m in segmenter.decoder.modules())
    assert not any(m.training for m in segmenter.backbone.modules())
    assert any("running_mean" in name for name in module.trainable_state())


@pytest.mark.slow
def test_a_run_resumes_and_ships_what_the_segmenter_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain_masks(OPTIONS, tmp_path / "whole")

    steps = []

    def stop(*_: object) -> None:
        steps.append(1)
        if len(steps) == 5:  # of 2 x 3: in the second epoch, after checkpoints
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pretraining.masks.ShipDecoder.on_step", stop, raising=False)
        short = OPTIONS.model_copy(
            update={"train": OPTIONS.train.model_copy(update={"checkpoint_seconds": 0.0})}
        )
        with pytest.raises(KeyboardInterrupt):
            pretrain_masks(short, tmp_path / "cut")
    resumed = pretrain_masks(short, tmp_path / "cut", resume=True)
    first, second = read_tensors(whole)[0], read_tensors(resumed)[0]
    for name, tensor in first.items():
        if name.endswith("in_proj_bias"):
            # The true gradient of a key's bias is zero. Adam turns what rounding leaves of it into steps, and rounding
            # depends on where tensors lie in memory.
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-3)
        else:
            assert torch.equal(second[name], tensor), name

    monkeypatch.setattr("vlprompt.segmentation._weights.EMBEDDED", whole.parent)
    loaded = create_segmenter("cris", create_backbone("tiny"))
    own = loaded.decoder.state_dict()
    assert all(
        torch.equal(own[n].half(), t) if t.is_floating_point() else torch.equal(own[n], t)
        for n, t in first.items()
    )


@pytest.mark.parametrize("name", ["clipseg", "cris"])
def test_the_shipped_recipes_are_those_of_the_shipped_weights(name: str) -> None:
    entry, options = read_recipe(f"pretrain_{name}_tiny.yaml")
    assert entry.name == "masks"
    sizes = read_tensors(EMBEDDED / f"{name}_tiny.safetensors")[1]["sizes"]
    assert {k: v for k, v in options.decoder.items() if k in sizes} == {
        k: sizes[k] for k in options.decoder if k in sizes
    }
