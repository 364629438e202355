"""The embedded backbone: its weights fit, say what they should, and see what they were taught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretraining.corpus import encode
from vlprompt.backbones import create_backbone
from vlprompt.backbones.base import Backbone
from vlprompt.backbones.tiny_weights import WEIGHTS, build_model, load_state, pack_state, seen_token_ids
from vlprompt.core.errors import BackboneError, CheckpointError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.data import scenes


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return create_backbone("tiny")


@torch.no_grad()
def accuracy(backbone: Backbone, task: str, style: str = "plain", limit: int = 160) -> float:
    data = scenes.build(task, "test", style)
    texts = [t.format(c) for t in data.templates for c in data.classnames]
    heads = backbone.encode_text(texts).view(len(data.templates), len(data.classnames), -1).sum(0)
    chosen = range(min(limit, len(data)))
    images = torch.stack([backbone.preprocess(data[i][0]) for i in chosen])
    guess = (backbone.encode_image(images) @ heads.T).argmax(1)
    return float((guess == torch.tensor(data.labels)[list(chosen)]).float().mean())


def test_weights_are_small_half_precision_and_without_unread_rows() -> None:
    tensors, _ = read_tensors(WEIGHTS)
    assert WEIGHTS.stat().st_size <= 16 * 2**20
    assert {t.dtype for t in tensors.values()} == {torch.float16, torch.int32}
    assert len(seen_token_ids()) < 1000
    assert sum(t.numel() for t in tensors.values()) < 8_000_000


def test_every_canonical_word_was_read_in_pretraining() -> None:
    seen = set(seen_token_ids())
    for task in scenes.list_tasks():
        data = scenes.build(task, "val")
        for name in data.classnames:
            unseen_style = task == "style" and name in ("sketch", "inverted")
            assert unseen_style or set(encode(name)) <= seen, (task, name)


def test_loading_is_repeatable_and_leaves_other_generators_alone() -> None:
    first, second = build_model(), build_model()
    state = torch.get_rng_state()
    load_state(first)
    assert torch.equal(torch.get_rng_state(), state)
    load_state(second)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    unseen = torch.ones(49408, dtype=torch.bool)
    unseen[list(seen_token_ids())] = False
    assert 0 < first.token_embedding.weight[unseen].std() < 0.05


def test_packing_and_loading_give_the_model_back(tmp_path: Path) -> None:
    model, other = build_model(), build_model()
    write_tensors(tmp_path / "packed.safetensors", pack_state(model, [5, 49407, 320]))
    load_state(other, tmp_path / "packed.safetensors")
    for name, tensor in model.state_dict().items():
        if name == "token_embedding.weight":
            tensor, loaded = tensor[[5, 320, 49407]], other.state_dict()[name][[5, 320, 49407]]
        else:
            loaded = other.state_dict()[name]
        assert torch.allclose(tensor, loaded, atol=2e-3), name


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    packed = pack_state(build_model(), [1, 2])
    cases = {
        "missing": {k: v for k, v in packed.items() if k != "ln_final.weight"},
        "unknown": {**packed, "visual.extra": torch.zeros(1)},
        "shape": {**packed, "ln_final.weight": torch.ones(3)},
        "table": {k: v for k, v in packed.items() if "seen" not in k},
    }
    for name, tensors in cases.items():
        write_tensors(tmp_path / name, tensors)
        with pytest.raises(BackboneError, match=r"tiny CLIP|pack_state"):
            load_state(build_model(), tmp_path / name)
    with pytest.raises(CheckpointError):
        load_state(build_model(), tmp_path / "nowhere")


def test_features_are_unit_length(tiny: Backbone) -> None:
    with torch.no_grad():
        image = tiny.encode_image(tiny.preprocess(scenes.build("shape", "test")[0][0])[None])
        text = tiny.encode_text(["a photo of a red circle."])
    assert image.shape == text.shape
    assert torch.allclose(image.norm(dim=1), torch.ones(1), atol=1e-4)
    assert torch.allclose(text.norm(dim=1), torch.ones(1), atol=1e-4)


@pytest.mark.parametrize(
    ("task", "least"),
    # Chance is 1/12, 1/2, 1/6, 1/20, 1/7, 1/10, 1/9, 1/5 and 1/6.
    [
        ("colour", 0.9),
        ("arrangement", 0.9),
        ("larger", 0.8),
        ("shape", 0.85),
        ("pattern", 0.6),
        ("glyph", 0.85),
        ("position", 0.85),
        ("count", 0.85),
        ("background", 0.35),
    ],
)
def test_zero_shot_is_far_above_chance(tiny: Backbone, task: str, least: float) -> None:
    assert accuracy(tiny, task) >= least


def test_a_held_out_style_is_harder(tiny: Backbone) -> None:
    assert accuracy(tiny, "colour", "inverted") < accuracy(tiny, "colour") - 0.2
