"""What is learned inside blocks, against the obvious way: changed weights, blocks written out, padded sentences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.golden.weights import filled
from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import BlockEdit, NormDelta, entered_tokens, shifted_norms
from vlprompt.backbones.text import TextTower
from vlprompt.backbones.vision import VisualPrompts
from vlprompt.core.errors import BackboneError, VLPromptError

NAMES = ["dog", "red circle", "American staffordshire terrier"]
CONV = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}
TIMM = {
    "timm_model_name": "test_vit",
    "timm_model_pretrained": False,
    "timm_pool": "token",
    "image_size": 160,
}


class Beside(nn.Module):
    """A layer that stands beside a block."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        with torch.no_grad():
            self.layer.weight.copy_(filled(f"beside/{number}", (width, width), 0.1))
            self.layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.float()))


def delta(width: int, name: str) -> NormDelta:
    made = NormDelta(width)
    with torch.no_grad():
        for part, parameter in made.named_parameters():
            parameter.copy_(filled(f"{name}.{part}", parameter.shape, 0.2))
    return made


def norm_edits(tower: Any) -> list[BlockEdit]:
    return [
        BlockEdit(first_norm=delta(tower.width, f"{i}/1"), second_norm=delta(tower.width, f"{i}/2"))
        for i in range(tower.layers)
    ]


def with_changed_norms(tower: Any, edits: Sequence[BlockEdit]) -> Any:
    """A copy of the tower with the shifts in its weights."""
    changed = copy.deepcopy(tower)
    with torch.no_grad():
        for (first, second), edit in zip(changed.block_norms(), edits, strict=True):
            for norm, shift in ((first, edit.first_norm), (second, edit.second_norm)):
                assert shift is not None
                norm.weight += shift.weight
                norm.bias += shift.bias
    return changed


def layout_of(tower: TextTower, share_prefix: bool = True) -> Any:
    return tower.layout([tower.sentence(f"a photo of a {name}.") for name in NAMES], NAMES, share_prefix)


def every_way(tower: TextTower, edits: Sequence[Any], learned: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Features and a gradient: packed, in checkpointed chunks, padded, and without a shared beginning."""
    layout = layout_of(tower)
    pull = filled("pull", (len(NAMES), tower.encode(layout).shape[-1]), 1.0)

    def result(features: Tensor) -> tuple[Tensor, Tensor]:
        return features.detach(), torch.autograd.grad((features * pull).sum(), learned)[0]

    results = [result(tower.encode(layout, adapters=edits))]
    memory, tower.memory = tower.memory, 1  # every tile in a checkpointed chunk of its own
    try:
        results.append(result(tower.encode(layout, adapters=edits)))
    finally:
        tower.memory = memory
    results.append(result(tower.encode_plain(layout, adapters=edits)))
    results.append(result(tower.encode(layout_of(tower, share_prefix=False), adapters=edits)))
    return results


def agree(results: Sequence[tuple[Tensor, Tensor]], expected: Tensor) -> None:
    for features, gradient in results:
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-5)
    assert results[0][1].any()


@pytest.fixture(scope="module", params=["causal", "not causal", "timm image tower"])
def towers(request: pytest.FixtureRequest, make_backbone: Callable[..., Backbone]) -> Backbone:
    if request.param == "causal":
        return make_backbone()
    if request.param == "not causal":
        return make_backbone({"no_causal_mask": True, "pool_type": "last"}, custom=True)
    return make_backbone(vision=TIMM, custom=True)


@pytest.fixture
def pixels(towers: Backbone) -> Tensor:
    return filled("pixels", (3, 3, *towers.image_size), 1.0)


def test_edits_of_nothing_change_no_bit_of_the_text(towers: Backbone) -> None:
    layout = layout_of(towers.text)
    plain = towers.text.encode(layout)
    assert torch.equal(towers.text.encode(layout, adapters=[BlockEdit()] * 3), plain)
    zeros = [BlockEdit(first_norm=NormDelta(64), second_norm=NormDelta(64)) for _ in range(3)]
    if towers.text.packable:
        assert torch.equal(towers.text.encode(layout, adapters=zeros), plain)
    torch.testing.assert_close(towers.text.encode(layout, adapters=zeros), plain, rtol=0, atol=1e-5)


def test_shifted_norms_of_the_text_equal_changed_weights(towers: Backbone) -> None:
    tower = towers.text
    tower.require_edits()
    edits = norm_edits(tower)
    expected = with_changed_norms(tower, edits).encode(layout_of(tower))
    assert edits[0].first_norm is not None
    agree(every_way(tower, edits, edits[0].first_norm.weight), expected)
    assert not torch.allclose(expected, tower.encode(layout_of(tower)), atol=1e-2)


def test_shifted_norms_of_the_images_equal_changed_weights(towers: Backbone, pixels: Tensor) -> None:
    tower = towers.vision
    tower.require_edits()
    edits = norm_edits(tower)
    expected = with_changed_norms(tower, edits).encode(pixels)
    got = tower.encode(pixels, adapters=edits)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert not torch.allclose(expected, tower.encode(pixels), atol=1e-2)
    assert not any(module._forward_hooks for module in tower.visual.modules())


def test_shifts_of_outer_norms_equal_changed_weights(towers: Backbone, pixels: Tensor) -> None:
    for tower, encode in (
        (towers.vision, lambda tower: tower.encode(pixels, adapters=[BlockEdit()] * tower.layers)),
        (towers.text, lambda tower: tower.encode(layout_of(tower))),
    ):
        norms = tower.outer_norms()
        assert norms
        shifts = [delta(norm.normalized_shape[0], f"outer/{i}") for i, norm in enumerate(norms)]
        changed = copy.deepcopy(tower)
        with torch.no_grad():
            for norm, shift in zip(changed.outer_norms(), shifts, strict=True):
                norm.weight += shift.weight
                norm.bias += shift.bias
        with shifted_norms(list(zip(norms, shifts, strict=True))):
            got = encode(tower)
        torch.testing.assert_close(got, encode(changed), rtol=0, atol=2e-5)
        assert not torch.allclose(got, encode(tower), atol=1e-2)


def beside(blocks: Sequence[Any], norms: Sequence[Any], layers: Sequence[nn.Module]) -> list[Any]:
    """Hooks that add to the output of each block what a layer makes of its normed input, as one would write it."""

    def adding(norm: nn.Module, layer: nn.Module) -> Any:
        return lambda _, inputs, output: output + layer(norm(inputs[0]))

    return [
        block.register_forward_hook(adding(norm, layer))
        for block, norm, layer in zip(blocks, norms, layers, strict=True)
    ]


def test_what_stands_beside_blocks_is_added_to_their_output(towers: Backbone, pixels: Tensor) -> None:
    text = towers.text
    layers = [Beside(text.width, i) for i in range(text.layers)]
    edits = [BlockEdit(parallel=layer) for layer in layers]
    obvious = copy.deepcopy(text)
    beside(obvious.blocks, [first for first, _ in obvious.block_norms()], layers)
    expected = obvious.encode_plain(layout_of(text))  # hooks see blocks that are called, as here
    agree(every_way(text, edits, layers[0].layer.weight), expected)

    vision = towers.vision
    layers = [Beside(vision.width, i) for i in range(vision.layers)]
    visual = copy.deepcopy(vision)
    beside(visual.blocks, [first for first, _ in visual.block_norms()], layers)
    got = vision.encode(pixels, adapters=[BlockEdit(parallel=layer) for layer in layers])
    torch.testing.assert_close(got, visual.encode(pixels), rtol=0, atol=2e-5)
    assert not torch.allclose(got, vision.encode(pixels), atol=1e-2)
    assert not any(module._forward_hooks for module in vision.visual.modules())


def entering(layers: int, first: int, width: int) -> tuple[Tensor, list[BlockEdit | None]]:
    """Two tokens for each block from ``first`` on, and the edits that bring them."""
    tokens = filled("tokens", (layers - first, 2, width), 1.0).requires_grad_()
    return tokens, [None] * first + [BlockEdit(tokens=row) for row in tokens]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_tokens_enter_sentences_between_blocks(first: int, backbone: Backbone) -> None:
    """Every sentence by itself, unpadded, its mask made for its length."""
    tower = backbone.text
    tower.require_entering_tokens()
    tokens, edits = entering(tower.layers, first, tower.width)

    expected, states = [], []
    for name in NAMES:
        ids = torch.tensor(tower.sentence(f"a photo of a {name}."))
        x = tower.embedding(ids)[None] + tower.positions[: len(ids)]
        for i, block in enumerate(tower.blocks):
            if i >= first:
                rest = 1 if i == first else 3
                x = torch.cat([x[:, :1], tokens[i - first][None], x[:, rest:]], dim=1)
            mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
            x = block(x, attn_mask=mask)
        expected.append(tower.project(x[:, -1])[0])
        states.append(tower.norm(x[0]))

    agree(every_way(tower, edits, tokens), torch.stack(expected).detach())
    words, features = tower.encode_words(layout_of(tower), adapters=edits)
    torch.testing.assert_close(features, torch.stack(expected), rtol=0, atol=1e-5)
    for row, own in zip(words, states, strict=True):
        torch.testing.assert_close(row[: len(own)], own, rtol=0, atol=1e-4)
        assert not row[len(own) :].any()


@pytest.mark.parametrize("kind", ["vit", "timm"])
@pytest.mark.parametrize("first", [0, 1])
def test_tokens_enter_images_between_blocks(
    kind: str, first: int, make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone(**({"vision": TIMM, "custom": True} if kind == "timm" else {}))
    pixels = filled("pixels", (3, 3, *backbone.image_size), 1.0)
    tower = backbone.vision
    tower.require_entering_tokens()
    tokens, edits = entering(tower.layers, first, tower.width)
    assert tower.stream is not None

    below: list[Tensor] = []
    x, _ = tower.stream.embed(pixels)
    x = tower.stream.norm_before(x)
    for i, block in enumerate(tower.blocks):
        if i >= first:
            rest = 1 if i == first else 3
            x = torch.cat([x[:, :1], tokens[i - first].expand(3, -1, -1), x[:, rest:]], dim=1)
        else:
            below.append(x)
        x = block(x)
    expected = tower.finish(torch.cat([x[:, :1], x[:, 3:]], dim=1))

    features, entered = backbone.image_embeddings_and_tokens(pixels, edits)
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(tower.encode(pixels, adapters=edits), features, rtol=0, atol=1e-6)
    last = tower.visual.ln_post if kind == "vit" else tower.visual.trunk.norm
    torch.testing.assert_close(entered, last(x[:, 1:3]), rtol=0, atol=1e-4)

    # Blocks below see nothing of them, so their states are the frozen tower's and can be kept.
    for i, states in enumerate(below):
        torch.testing.assert_close(tower.states(pixels, i).tokens if i else states, states, rtol=0, atol=1e-5)
    kept = backbone.image_embeddings_and_tokens(tower.states(pixels, first), edits)
    torch.testing.assert_close(kept[0], features, rtol=0, atol=2e-5)
    torch.testing.assert_close(kept[1], entered, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["EVA-02", "PE-Core", "NaFlex ViT, rotary", "ViT with registers"])
def test_tokens_before_every_block_are_deep_prompts(family: str) -> None:
    """Of those, other tests know that they are right on towers with rotary positions and registers, too."""
    from tests.families import family_backbone

    tower = family_backbone(family).vision
    pixels = filled("pixels", (2, 3, *family_backbone(family).image_size), 1.0)
    tokens, edits = entering(tower.layers, 0, tower.width)
    expected = tower.encode(pixels, VisualPrompts(tokens, "after_cls"))
    torch.testing.assert_close(tower.encode(pixels, adapters=edits), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, tower.encode(pixels), atol=1e-3)


def test_without_tokens_the_image_tower_is_the_frozen_one(backbone: Backbone, images: Tensor) -> None:
    none = [BlockEdit(tokens=torch.zeros(0, 64)), None, None]
    features, entered = backbone.image_embeddings_and_tokens(images, none)
    torch.testing.assert_close(features, backbone.image_embeddings(images), rtol=0, atol=1e-5)
    assert entered.shape == (6, 0, 64)


def test_what_does_not_go_together_is_refused(backbone: Backbone, images: Tensor) -> None:
    one, two = BlockEdit(tokens=torch.zeros(1, 64)), BlockEdit(tokens=torch.zeros(2, 64))
    assert entered_tokens([None, one, one]) == 1
    with pytest.raises(VLPromptError, match="1 and 2 tokens"):
        backbone.image_embeddings(images, adapters=[None, one, two])
    layout = layout_of(backbone.text)
    with pytest.raises(VLPromptError, match="deep text prompts can't be combined"):
        backbone.text.encode(layout, deep=torch.zeros(1, 1, 64), adapters=[None, one, one])
    states = backbone.image_states(images, 2)
    with pytest.raises(VLPromptError, match="block 1 has an adapter"):
        backbone.image_embeddings(states, adapters=[None, one, one])


def test_towers_that_can_t_be_edited_say_what_works(make_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(
        BackboneError, match=r"image tower's blocks can't be edited .*ResNet.* What works here"
    ):
        make_backbone(vision=CONV).vision.require_edits()
    odd = make_backbone({"block_type": "custom", "qk_norm": True}, custom=True)
    with pytest.raises(BackboneError, match=r"text tower's blocks can't be edited .*What works here"):
        odd.text.require_edits()
    mean = make_backbone({"no_causal_mask": True, "pool_type": "last"}, custom=True)
    with pytest.raises(BackboneError, match="no causal one that reads its sentences' ends"):
        mean.text.require_entering_tokens()
