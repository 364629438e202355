"""The image tower: visual prompts enter where both conventions say, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from vlprompt.backbones import Backbone, VisualPrompts
from vlprompt.backbones.packed import quick_attention
from vlprompt.core.errors import BackboneError, VLPromptError

INSERTIONS = ("after_cls", "append")
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "clip": {},
    "no_pre_norm": {"no_ln_pre": True},
    "mean_pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "attention_pool": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "layer_scale": {"ls_init_value": 0.3},
    "sine_positions": {"pos_embed_type": "sin_cos_2d"},
}
TIMM: dict[str, dict[str, Any]] = {
    "class_token": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "mean": {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "mlp"},
    "map": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    "registers": {"timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "linear"},
    "fourth": {"timm_model_name": "test_vit4", "timm_pool": "", "timm_proj": "linear"},
}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timm_backbone(make_backbone: Callable[..., Backbone], **vision: Any) -> Backbone:
    return make_backbone(vision={"timm_model_pretrained": False, **vision}, custom=True)


def slow_open_clip(visual: Any, image: Tensor, tokens: Tensor, insertion: str) -> Tensor:
    """One image through open_clip's blocks, one by one, with (J, M, W) prompts; the state is rebuilt at every block."""
    patches = visual.conv1(image[None]).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding[None, None], patches], dim=1) + visual.positional_embedding
    count = tokens.shape[1]
    if insertion == "after_cls":
        x = visual.ln_pre(x)
        first, rest = x[:, :1], x[:, 1:]
        prompt = tokens[0][None]
    else:
        x = visual.ln_pre(torch.cat([x, tokens[0][None]], dim=1))
        first, rest, prompt = x[:, :-count], x[:, :0], x[:, -count:]
    for i, block in enumerate(visual.transformer.resblocks):
        if 0 < i < len(tokens):
            prompt = tokens[i][None]
        x = block(torch.cat([first, prompt, rest], dim=1))
        first, prompt, rest = x.split([first.shape[1], count, rest.shape[1]], dim=1)
    pooled = visual._pool(torch.cat([first, rest], dim=1))[0]
    return (pooled if visual.proj is None else pooled @ visual.proj)[0]


def slow_timm(visual: Any, image: Tensor, tokens: Tensor, insertion: str) -> Tensor:
    """As :func:`slow_open_clip`, for a timm trunk."""
    trunk, count = visual.trunk, tokens.shape[1]
    x = trunk._pos_embed(trunk.patch_embed(image[None]))
    if insertion == "after_cls":
        x = trunk.norm_pre(x)
        first, rest, prompt = (
            x[:, : trunk.num_prefix_tokens],
            x[:, trunk.num_prefix_tokens :],
            tokens[0][None],
        )
    else:
        x = trunk.norm_pre(torch.cat([x, tokens[0][None]], dim=1))
        first, rest, prompt = x[:, :-count], x[:, :0], x[:, -count:]
    for i, block in enumerate(trunk.blocks):
        if 0 < i < len(tokens):
            prompt = tokens[i][None]
        x = block(torch.cat([first, prompt, rest], dim=1))
        first, prompt, rest = x.split([first.shape[1], count, rest.shape[1]], dim=1)
    return visual.head(trunk.forward_head(trunk.norm(torch.cat([first, rest], dim=1))))[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip_towers_equal_a_slow_loop(
    make_backbone: Callable[..., Backbone], images: Tensor, kind: str, insertion: str, depth: int
) -> None:
    tower = make_backbone(vision=OPEN_CLIP[kind]).vision
    assert (tower.kind, tower.layers, tower.width) == ("vit", 3, 64)
    tokens = noise(1, depth, 4, 64)
    with torch.no_grad():
        expected = torch.stack([slow_open_clip(tower.visual, image, tokens, insertion) for image in images])
        got = tower.encode(images, VisualPrompts(tokens, insertion))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(got, tower.encode(images), atol=1e-3)


@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize("kind", TIMM)
def test_timm_towers_equal_a_slow_loop(
    make_backbone: Callable[..., Backbone], kind: str, insertion: str
) -> None:
    backbone = timm_backbone(make_backbone, **TIMM[kind])
    tower = backbone.vision
    assert tower.kind == "timm_vit"
    images = noise(2, 2, 3, *backbone.image_size)
    tokens = noise(1, tower.layers - 1, 4, tower.width)
    with torch.no_grad():
        expected = torch.stack([slow_timm(tower.visual, image, tokens, insertion) for image in images])
        got = tower.encode(images, VisualPrompts(tokens, insertion))
        plain = tower.encode(images, VisualPrompts(tokens[:, :0], insertion))
        torch.testing.assert_close(plain, backbone.model.encode_image(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)
    assert not torch.allclose(got, plain, atol=5e-5)


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_without_prompts_it_is_open_clip(
    make_backbone: Callable[..., Backbone], images: Tensor, kind: str
) -> None:
    backbone = make_backbone(vision=OPEN_CLIP[kind])
    with torch.no_grad():
        expected = backbone.model.encode_image(images)
    assert torch.equal(backbone.image_embeddings(images), expected)
    torch.testing.assert_close(backbone.encode_image(images).norm(dim=-1), torch.ones(6))
    for insertion in INSERTIONS:
        none = VisualPrompts(torch.zeros(2, 0, 64), insertion)
        torch.testing.assert_close(backbone.image_embeddings(images, none), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("insertion", INSERTIONS)
def test_prompts_of_one_image_each_equal_one_pass_each(
    backbone: Backbone, images: Tensor, insertion: str
) -> None:
    tokens = noise(3, len(images), 2, 4, 64)
    got = backbone.image_embeddings(images, VisualPrompts(tokens, insertion))
    alone = [
        backbone.image_embeddings(image[None], VisualPrompts(own, insertion))
        for image, own in zip(images, tokens, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("insertion", INSERTIONS)
def test_prompts_of_a_layer_are_felt_from_its_block_on(
    backbone: Backbone, images: Tensor, insertion: str
) -> None:
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *call: seen.append(call[2])) for block in backbone.vision.blocks
    ]
    try:
        tokens = noise(4, 3, 4, 64)
        backbone.image_embeddings(images, VisualPrompts(tokens, insertion))
        before = list(seen)
        assert len(before) == 3
        for layer in range(3):
            seen.clear()
            changed = tokens.clone()
            changed[layer] += 1
            backbone.image_embeddings(images, VisualPrompts(changed, insertion))
            same = [torch.equal(a, b) for a, b in zip(before, seen, strict=True)]
            assert same == [i < layer for i in range(3)]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("insertion", INSERTIONS)
def test_the_graph_begins_at_the_first_prompt(backbone: Backbone, images: Tensor, insertion: str) -> None:
    tracked: dict[str, bool] = {}
    visual = backbone.vision.visual
    modules = {"patches": visual.conv1, "block 0": backbone.vision.blocks[0]}
    hooks = [
        module.register_forward_hook(lambda *call, name=name: tracked.update({name: call[2].requires_grad}))
        for name, module in modules.items()
    ]
    try:
        tokens = noise(5, 2, 4, 64).requires_grad_()
        backbone.encode_image(images, VisualPrompts(tokens, insertion)).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    assert tracked == {"patches": False, "block 0": True}
    assert bool((tokens.grad.abs().sum((-1, -2)) > 0).all())
    assert all(p.grad is None for p in backbone.parameters())
    assert not backbone.encode_image(images.clone().requires_grad_()).requires_grad


def test_gradient_equals_finite_differences(make_backbone: Callable[..., Backbone], images: Tensor) -> None:
    backbone = make_backbone(seed=2)
    backbone.model.double()
    images, tokens, weights = images.double(), noise(6, 2, 3, 64).double(), noise(7, len(images), 48).double()

    def scalar(value: Tensor) -> Tensor:
        return (backbone.image_embeddings(images, VisualPrompts(value)).double() * weights).sum()

    leaf = tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(leaf), leaf)
    step = 1e-3 * noise(8, *tokens.shape).double()
    numeric = (scalar(tokens + step) - scalar(tokens - step)) / 2
    assert float((gradient * step).sum()) == pytest.approx(float(numeric), rel=1e-3, abs=1e-5)


def test_training_mode_never_reaches_the_towers(
    make_backbone: Callable[..., Backbone], images: Tensor
) -> None:
    backbone = make_backbone(vision={"patch_dropout": 0.5})
    before = backbone.encode_image(images)
    backbone.train()
    assert not any(m.training for m in backbone.modules())
    assert torch.equal(backbone.encode_image(images), before)


CONVOLUTIONS = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "image_size": 64}


@pytest.mark.parametrize("kind", ["resnet", "timm_convolution", "relative_positions"])
def test_towers_that_take_no_prompts_say_why_and_still_encode(
    make_backbone: Callable[..., Backbone], kind: str
) -> None:
    if kind == "resnet":
        backbone, reason = (
            make_backbone(vision=CONVOLUTIONS),
            r"\(ModifiedResNet\) is not a sequence of tokens",
        )
    elif kind == "relative_positions":
        backbone = timm_backbone(make_backbone, timm_model_name="test_vit_relpos", image_size=160)
        reason = r"\(VisionTransformerRelPos\)"
    else:
        backbone = timm_backbone(make_backbone, timm_model_name="test_efficientnet", timm_pool="avg")
        reason = r"\(EfficientNet\) is not a sequence of tokens"
    with pytest.raises(BackboneError, match=reason):
        backbone.vision.require_prompts()
    images = noise(9, 2, 3, *backbone.image_size)
    with pytest.raises(BackboneError, match="visual prompts can't be learned on this backbone"):
        backbone.encode_image(images, VisualPrompts(torch.zeros(1, 1, 64)))
    assert backbone.encode_image(images).shape == (2, backbone.dim)


def test_what_does_not_fit_is_refused(backbone: Backbone, images: Tensor) -> None:
    for tokens, reason in (
        (torch.zeros(1, 2, 63), "width 63, the image tower has 64"),
        (torch.zeros(4, 2, 64), "4 layers, the image tower has 3"),
        (torch.zeros(5, 1, 2, 64), "for 5 images, the batch has 6"),
    ):
        with pytest.raises(VLPromptError, match=reason):
            backbone.encode_image(images, VisualPrompts(tokens))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_with_a_graph_equals_torchs_own(
    make_backbone: Callable[..., Backbone], images: Tensor, precision: Any
) -> None:
    tower = make_backbone().set_precision(precision).vision
    tolerance = 1e-5 if precision == "fp32" else 0.05
    attention = tower.blocks[0].attn
    results = []

    for tokens in (noise(1, 2, 4, 64).requires_grad_(), noise(1, 2, 4, 64).requires_grad_()):
        with patch("vlprompt.backbones.vision.quick_attention", nullcontext) if results else nullcontext():
            features = tower.encode(images, VisualPrompts(tokens, "after_cls"))
        features.square().sum().backward()
        results.append((features.detach(), tokens.grad))

    (quick, quick_gradient), (slow, slow_gradient) = results
    torch.testing.assert_close(quick, slow, rtol=0, atol=tolerance * float(slow.abs().max()))
    torch.testing.assert_close(
        quick_gradient, slow_gradient, rtol=0, atol=tolerance * float(slow_gradient.abs().max())
    )
    assert "forward" not in vars(attention)


def test_what_needs_no_graph_keeps_its_bits_beside_one(backbone: Backbone, images: Tensor) -> None:
    with torch.no_grad():
        expected = backbone.vision.states(images, 2).tokens
    with quick_attention(backbone.vision.blocks):
        assert torch.equal(backbone.vision.states(images, 2).tokens, expected)
        pixels = images.clone().requires_grad_()
        assert backbone.vision.states(pixels, 2).tokens.requires_grad
