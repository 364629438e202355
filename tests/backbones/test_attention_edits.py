"""Keys and values in front of a block's own, and what follows attention, against blocks that are written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.golden.weights import filled
from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import BlockEdit, KeysValues, keys_values_sets
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


class After(nn.Module):
    """What follows attention: it reads both what attention reads and what it says."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(filled(f"after/{number}", (width, width), 0.1))

    def forward(self, normed: Tensor, attended: Tensor) -> Tensor:
        return 1.1 * attended + torch.tanh(normed @ self.weight)


def edits_of(layers: int, width: int, sets: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, list[BlockEdit]]:
    """Keys, values and edits: 2, 3, 4, ... keys before the blocks' own, and a layer behind attention."""
    keys = filled("keys", (*sets, layers, layers + 1, width), 1.0).requires_grad_()
    values = filled("values", (*sets, layers, layers + 1, width), 1.0).requires_grad_()
    edits = []
    for i in range(layers):
        own = KeysValues(keys[..., i, : i + 2, :], values[..., i, : i + 2, :])
        edits.append(BlockEdit(keys_values=own, after_attention=After(width, i)))
    return keys, values, edits


def obvious_block(block: Any, x: Tensor, edit: BlockEdit, causal: bool) -> Tensor:
    """A pre-norm block on (R, W) tokens of one image or sentence, head by head."""
    attention = block.attn
    packed = hasattr(attention, "in_proj_weight")
    heads = int(attention.num_heads)
    normed = (block.ln_1 if packed else block.norm1)(x)
    weights = (attention.in_proj_weight, attention.in_proj_bias) if packed else ()
    projected = nn.functional.linear(normed, *weights) if packed else attention.qkv(normed)
    query, key, value = projected.chunk(3, -1)
    assert edit.keys_values is not None
    count = len(edit.keys_values.keys)
    key = torch.cat([edit.keys_values.keys, key])
    value = torch.cat([edit.keys_values.values, value])

    size = x.shape[1] // heads
    columns = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[:, part].T / size**0.5
        for r in range(len(x) if causal else 0):
            scores[r, count + r + 1 :] = -torch.inf
        columns.append(scores.softmax(-1) @ value[:, part])
    attended = (attention.out_proj if packed else attention.proj)(torch.cat(columns, 1))

    assert edit.after_attention is not None
    x = x + (block.ls_1 if packed else block.ls1)(edit.after_attention(normed, attended))
    if packed:
        return x + block.ls_2(block.mlp(block.ln_2(x)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def one_set(edit: BlockEdit, number: int) -> BlockEdit:
    """The edit that image or group ``number`` sees."""
    assert edit.keys_values is not None
    own = KeysValues(edit.keys_values.keys[number], edit.keys_values.values[number])
    return BlockEdit(keys_values=own, after_attention=edit.after_attention)


def layout_of(tower: TextTower, share_prefix: bool = True) -> Any:
    return tower.layout([tower.sentence(f"a photo of a {name}.") for name in NAMES], NAMES, share_prefix)


def obvious_sentences(tower: Any, edits: Sequence[BlockEdit]) -> Tensor:
    features = []
    for name in NAMES:
        ids = torch.tensor(tower.sentence(f"a photo of a {name}."))
        x = tower.embedding(ids) + tower.positions[: len(ids)]
        for block, edit in zip(tower.blocks, edits, strict=True):
            x = obvious_block(block, x, edit, causal=True)
        features.append(tower.project(x[-1]))
    return torch.stack(features)


def every_way(tower: TextTower, edits: Sequence[Any], learned: Sequence[Tensor]) -> list[list[Tensor]]:
    """Features and gradients: packed, in checkpointed chunks, padded, and without a shared beginning."""
    pull = filled("pull", tuple(tower.encode(layout_of(tower), adapters=edits).shape), 1.0)

    def result(encode: Callable[..., Tensor], share: bool = True) -> list[Tensor]:
        features = encode(layout_of(tower, share), adapters=edits)
        return [features.detach(), *torch.autograd.grad((features * pull).sum(), learned)]

    results = [result(tower.encode), result(tower.encode_plain), result(tower.encode, share=False)]
    memory, tower.memory = tower.memory, 1  # every tile in a checkpointed chunk of its own
    try:
        results.append(result(tower.encode))
    finally:
        tower.memory = memory
    return results


def agree(results: Sequence[Sequence[Tensor]], expected: Sequence[Tensor]) -> None:
    for features, *gradients in results:
        torch.testing.assert_close(features, expected[0], rtol=0, atol=2e-5)
        for gradient, right in zip(gradients, expected[1:], strict=True):
            assert right.any()
            torch.testing.assert_close(gradient, right, rtol=1e-4, atol=2e-5)


def test_sentences_look_at_further_keys(backbone: Backbone) -> None:
    tower = backbone.text
    keys, values, edits = edits_of(tower.layers, tower.width)
    expected = obvious_sentences(tower, edits)
    pull = filled("pull", tuple(expected.shape), 1.0)
    gradients = torch.autograd.grad((expected * pull).sum(), (keys, values))
    agree(every_way(tower, edits, (keys, values)), [expected.detach(), *gradients])
    assert not torch.allclose(expected, tower.encode(layout_of(tower)), atol=1e-2)


def test_groups_of_sentences_look_at_keys_of_their_own(backbone: Backbone) -> None:
    tower = backbone.text
    keys, values, edits = edits_of(tower.layers, tower.width, (2,))
    expected = torch.stack(
        [obvious_sentences(tower, [one_set(edit, group) for edit in edits]) for group in range(2)]
    )
    pull = filled("pull", tuple(expected.shape), 1.0)
    gradients = torch.autograd.grad((expected * pull).sum(), (keys, values))
    agree(every_way(tower, edits, (keys, values)), [expected.detach(), *gradients])

    # In the last block alone: what lies below is shared by the groups.
    last = [None, None, edits[-1]]
    first = [None, None, one_set(edits[-1], 0)]
    packed = tower.encode(layout_of(tower), adapters=last)
    torch.testing.assert_close(packed, tower.encode_plain(layout_of(tower), adapters=last), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[0], tower.encode(layout_of(tower), adapters=first), rtol=0, atol=1e-5)


def test_sentences_that_are_not_causal_or_mask_padding(make_backbone: Callable[..., Backbone]) -> None:
    """Keys that stand far away and say nothing are as if they weren't there; others change the features."""
    for options in ({"no_causal_mask": True, "pool_type": "last"}, {"embed_cls": True}):
        tower = make_backbone(options, custom=True).text
        assert not tower.packable
        _, _, edits = edits_of(tower.layers, tower.width)
        layout = layout_of(tower)
        plain = tower.encode(layout)
        assert not torch.allclose(tower.encode(layout, adapters=edits), plain, atol=1e-2)
        none = KeysValues(torch.zeros(0, tower.width), torch.zeros(0, tower.width))
        empty = [BlockEdit(keys_values=none)] * tower.layers
        torch.testing.assert_close(tower.encode(layout, adapters=empty), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "timm"])
@pytest.mark.parametrize("sets", [(), (3,)])
def test_images_look_at_further_keys(
    kind: str, sets: tuple[int, ...], make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone(**({"vision": TIMM, "custom": True} if kind == "timm" else {}))
    pixels = filled("pixels", (3, 3, *backbone.image_size), 1.0)
    tower = backbone.vision
    tower.require_attention_edits()
    keys, values, edits = edits_of(tower.layers, tower.width, sets)

    assert tower.stream is not None
    start = tower.stream.norm_before(tower.stream.embed(pixels)[0])
    states = []
    for number, x in enumerate(start):
        for block, edit in zip(tower.blocks, edits, strict=True):
            x = obvious_block(block, x, one_set(edit, number) if sets else edit, causal=False)
        states.append(x)
    expected = tower.finish(torch.stack(states))
    pull = filled("pull", tuple(expected.shape), 1.0)

    got = tower.encode(pixels, adapters=edits)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    gradients = torch.autograd.grad((got * pull).sum(), (keys, values))
    for gradient, right in zip(
        gradients, torch.autograd.grad((expected * pull).sum(), (keys, values)), strict=True
    ):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)

    # From states that were kept below the first edit.
    later = [None, *edits[1:]]
    kept = tower.encode(tower.states(pixels, 1), adapters=later)
    torch.testing.assert_close(kept, tower.encode(pixels, adapters=later), rtol=0, atol=1e-5)

    # Nothing of it stays in the tower.
    assert not any(module._forward_hooks for module in tower.visual.modules())
    torch.testing.assert_close(tower.encode(pixels), tower.finish(_frozen(tower, pixels)), rtol=0, atol=1e-5)


def _frozen(tower: Any, pixels: Tensor) -> Tensor:
    return tower.states(pixels, tower.layers).tokens


@pytest.mark.parametrize("family", ["EVA-02", "PE-Core", "NaFlex ViT, rotary", "ViT with registers"])
def test_deep_prompts_without_queries_are_keys_and_values(family: str) -> None:
    """Before the first block a prompt's key and value are the projections of its norm, and its output plays no part
    there; with rotary positions it doesn't turn, as the deep prompts of other tests don't."""
    from tests.families import family_backbone

    backbone = family_backbone(family)
    tower = backbone.vision
    tower.require_attention_edits()
    pixels = filled("pixels", (2, 3, *backbone.image_size), 1.0)
    prompt = filled("prompt", (1, 2, tower.width), 1.0)

    seen: dict[str, Tensor] = {}
    block = tower.blocks[0]
    handle = block.register_forward_hook(lambda _, __, output: seen.update(block=output))
    tower.encode(pixels, VisualPrompts(prompt))
    expected = seen.pop("block")
    assert tower.stream is not None
    special = tower.stream.special
    expected = torch.cat([expected[:, :special], expected[:, special + 2 :]], 1)

    normed = block.norm1(prompt[0])
    query_key_value: Any = block.attn
    if query_key_value.qkv is not None:
        bias = getattr(query_key_value, "q_bias", None)
        _, key, value = query_key_value.qkv(normed).chunk(3, -1)
        value = value if bias is None else value + query_key_value.v_bias
    else:
        key, value = query_key_value.k_proj(normed), query_key_value.v_proj(normed)
    heads = int(query_key_value.num_heads)
    key = query_key_value.k_norm(key.unflatten(-1, (heads, -1))).flatten(-2)
    edits = [BlockEdit(keys_values=KeysValues(key, value)), *[None] * (tower.layers - 1)]
    tower.encode(pixels, adapters=edits)
    handle.remove()
    torch.testing.assert_close(seen["block"], expected, rtol=0, atol=1e-4)


def test_no_key_changes_nothing(backbone: Backbone, images: Tensor) -> None:
    none = KeysValues(torch.zeros(0, 64), torch.zeros(0, 64))
    edits = [BlockEdit(keys_values=none, after_attention=lambda _, attended: attended)] * 3
    plain = backbone.text.encode(layout_of(backbone.text))
    torch.testing.assert_close(backbone.text.encode(layout_of(backbone.text), adapters=edits), plain)
    got = backbone.image_embeddings(images, adapters=edits)
    torch.testing.assert_close(got, backbone.image_embeddings(images), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(
    backbone: Backbone, images: Tensor, make_backbone: Callable[..., Backbone]
) -> None:
    def edit(*shape: int) -> BlockEdit:
        return BlockEdit(keys_values=KeysValues(torch.zeros(shape), torch.zeros(shape)))

    layout = layout_of(backbone.text)
    with pytest.raises(VLPromptError, match="block 1: keys and values have width 32, the tower has 64"):
        backbone.text.encode(layout, adapters=[None, edit(2, 32), None])
    uneven = BlockEdit(keys_values=KeysValues(torch.zeros(2, 64), torch.zeros(3, 64)))
    with pytest.raises(VLPromptError, match=r"keys of shape \(2, 64\), values of \(3, 64\)"):
        backbone.image_embeddings(images, adapters=[uneven, None, None])
    with pytest.raises(VLPromptError, match="4 sets of keys and values for a batch of 6 images"):
        backbone.image_embeddings(images, adapters=[edit(4, 2, 64), None, None])
    with pytest.raises(VLPromptError, match="2 and 3 sets of keys and values"):
        backbone.text.encode(layout, adapters=[edit(2, 2, 64), edit(3, 2, 64), None])
    assert keys_values_sets([edit(1, 2, 64), edit(3, 2, 64)]) == 3

    tower = make_backbone(vision=CONV).vision
    with pytest.raises(BackboneError, match=r"blocks can't be edited .*ResNet.* What works here"):
        tower.encode(images, adapters=[edit(2, 64)] * max(1, len(tower.attention)))
    odd = make_backbone({"block_type": "custom", "qk_norm": True}, custom=True).text
    with pytest.raises(BackboneError, match=r"text tower's blocks can't be edited .*What works here"):
        odd.encode(layout_of(odd), adapters=[edit(2, 64)] * 3)
