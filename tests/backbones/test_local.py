"""Local tokens are what the tower computes itself, and what makes a patch matter is torch's own attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.local import local_tokens
from vlprompt.core.errors import VLPromptError


def test_a_tower_that_pools_the_mean_has_it_in_front(
    make_backbone: Callable[..., Backbone], images: Tensor
) -> None:
    backbone = make_backbone(vision={"pool_type": "avg"})
    local = local_tokens(backbone.vision, images)
    torch.testing.assert_close(local.features[:, 0], backbone.image_embeddings(images))
    torch.testing.assert_close(local.features[:, 0], local.features[:, 1:].mean(1))
    for image in range(6):
        for patch in (0, 15):
            one, other = local.features[image, 0], local.features[image, 1 + patch]
            cosine = one @ other / (one.norm() * other.norm())
            torch.testing.assert_close(local.salience[image, patch], cosine)


def test_the_first_token_is_the_images_feature(backbone: Backbone, images: Tensor) -> None:
    local = local_tokens(backbone.vision, images)
    torch.testing.assert_close(local.features[:, 0], backbone.image_embeddings(images))
    torch.testing.assert_close(backbone.image_embeddings(local.states), backbone.image_embeddings(images))
    assert local.features.shape == (6, 17, backbone.dim)


def test_every_token_is_normed_and_projected_by_itself(backbone: Backbone, images: Tensor) -> None:
    visual = backbone.model.visual
    states: list[Tensor] = []
    handle = visual.transformer.register_forward_hook(lambda _, __, output: states.append(output))
    with torch.no_grad():
        visual(images)
        handle.remove()
        tokens = states[0].unbind(1)
        expected = torch.stack([visual.ln_post(token) @ visual.proj for token in tokens], dim=1)
    torch.testing.assert_close(local_tokens(backbone.vision, images).features, expected)


def test_attention_is_the_class_tokens_in_the_last_block(backbone: Backbone, images: Tensor) -> None:
    block = backbone.vision.blocks[-1]
    states = backbone.vision.states(images, backbone.vision.layers - 1)
    with torch.no_grad():
        normed = block.ln_1(states.tokens)
        _, weights = block.attn(normed, normed, normed, need_weights=True)  # mean of the heads
    torch.testing.assert_close(local_tokens(backbone.vision, states).salience, weights[:, 0, 1:])


def test_it_goes_on_from_any_block_but_the_last(backbone: Backbone, images: Tensor) -> None:
    whole = local_tokens(backbone.vision, images)
    for blocks in range(backbone.vision.layers):
        local = local_tokens(backbone.vision, backbone.vision.states(images, blocks))
        torch.testing.assert_close(local.features, whole.features)
        torch.testing.assert_close(local.salience, whole.salience)
    with pytest.raises(VLPromptError, match="are read in block 2, and 3 have run"):
        local_tokens(backbone.vision, backbone.vision.states(images, 3))


def test_a_tower_without_projection_keeps_its_width(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    backbone.model.visual.proj = None
    local = local_tokens(backbone.vision, torch.zeros(1, 3, *backbone.image_size))
    assert local.features.shape[-1] == 64
