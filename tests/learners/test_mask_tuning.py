"""Mask tuning: what is masked, the masked tower against the obvious way, and masks beside other learners."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import Tensor

from tests.golden.weights import filled
from tests.learners.masking import (
    FORMS,
    NAMES,
    RECIPE,
    named_scores,
    obvious,
    scatter,
)
from vlprompt import create_backbone, create_learner, fit
from vlprompt.backbones import Backbone
from vlprompt.backbones.reweighted import ReweightedBackbone
from vlprompt.backbones.weight_masks import maskable
from vlprompt.core.errors import BackboneError, ConfigError, NonFiniteError, UnknownNameError
from vlprompt.data import ImageDataset
from vlprompt.learners.base import DEFAULT_TEMPLATES

# --- what is masked


def test_weights_of_a_vision_transformer_and_their_sizes() -> None:
    with torch.device("meta"):
        visual = CLIP(**open_clip.get_model_config("ViT-B-16")).visual
    sizes: dict[str, int] = {}
    for name, kind in maskable(visual).items():
        sizes[kind] = sizes.get(kind, 0) + visual.get_parameter(name).numel()
    assert sizes["attention.in"] + sizes["attention.out"] == 28_311_552
    assert sizes["mlp.in"] + sizes["mlp.out"] == 56_623_104
    assert sizes["patch"] == 589_824
    assert sum(sizes.values()) == 85_524_480


def test_groups_of_every_kind_of_tower(tower: Backbone) -> None:
    names = {form: set(create_learner(form, tower, NAMES).kinds) for form in FORMS}
    weights = {n for n, p in tower.vision.visual.named_parameters() if p.dim() in (2, 4)}
    head = {n for n in weights if n == "proj" or "head" in n or "positional" in n}
    assert names["pmt"] == weights - head
    assert not names["amt"] & names["mmt"]
    patch = names["pmt"] - names["amt"] - names["mmt"]
    assert len(patch) == (3 if tower.vision.kind == "conv" else 1)  # a ResNet's stem, a ViT's patch embedding
    assert set(create_learner("amt", tower, NAMES, patch=True).kinds) == names["amt"] | patch


def test_the_embedded_backbone_can_be_masked() -> None:
    tiny = create_backbone("tiny", "random")
    learner = scatter(create_learner("ramt", tiny, NAMES))
    images = filled("images", (2, 3, *tiny.image_size), 1.0)
    torch.testing.assert_close(learner.embed_images(images), obvious(learner, named_scores(learner), images))
    assert sum(kind == "patch" for kind in maskable(tiny.vision.visual).values()) == 6


def test_weights_by_name(backbone: Backbone) -> None:
    learner = create_learner("amt", backbone, NAMES, tensors=["*resblocks.1.*"])
    assert list(learner.kinds) == [
        "transformer.resblocks.1.attn.in_proj_weight",
        "transformer.resblocks.1.attn.out_proj.weight",
    ]
    with pytest.raises(UnknownNameError, match=r"weight of the image tower.*resblocks\.7"):
        create_learner("amt", backbone, NAMES, tensors=["*resblocks.7.*"])
    with pytest.raises(ConfigError, match="no weights to mask in attention"):
        create_learner("amt", backbone, NAMES, tensors=["*mlp*"])
    with pytest.raises(ConfigError, match=r"threshold: 0\.02 must be below init, 0\.01"):
        create_learner("amt", backbone, NAMES, threshold=0.02)


# --- the masked tower


@pytest.mark.parametrize("form", FORMS)
def test_it_starts_as_zero_shot_to_the_last_bit(form: str, tower: Backbone, images: Tensor) -> None:
    zero = create_learner("zero_shot", tower, NAMES).eval()
    learner = create_learner(form, tower, NAMES).eval()
    with torch.no_grad():
        assert torch.equal(learner(images), zero(images))


@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradient_equal_the_obvious_way(form: str, tower: Backbone, images: Tensor) -> None:
    learner = scatter(create_learner(form, tower, NAMES))
    before = {n: p.clone() for n, p in tower.vision.visual.named_parameters()}
    ours = learner.embed_images(images)
    expected = obvious(learner, named_scores(learner), images)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        assert (ours - tower.image_embeddings(images)).norm() > 0.02 * ours.norm()
    scores = list(learner.scores.values())
    target = filled("target", ours.shape, 1.0)
    gradients = torch.autograd.grad((ours * target).sum(), scores, retain_graph=True)
    for got, want in zip(gradients, torch.autograd.grad((expected * target).sum(), scores), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()) + 1e-7)
    for got, again in zip(gradients, torch.autograd.grad((ours * target).sum(), scores), strict=True):
        assert torch.equal(got, again)  # two backward passes through one graph
    after = dict(tower.vision.visual.named_parameters())
    assert all(torch.equal(after[n], p) and after[n].grad is None for n, p in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_a_weight_outlives_its_layer(dtype: torch.dtype, tower: Backbone, images: Tensor) -> None:
    tower = copy.deepcopy(tower).to(dtype)
    made: list[weakref.ref[Tensor]] = []
    scores = {
        n: tower.vision.visual.get_parameter(n).clone().requires_grad_()
        for n in maskable(tower.vision.visual)
    }

    def make(name: str) -> Callable[[Tensor], Tensor]:
        def product(weight: Tensor) -> Tensor:
            assert sum(ref() is not None for ref in made) <= 4  # those of one attention layer
            result = weight * (scores[name] > 0)
            if torch.is_grad_enabled():
                result = result + 0 * scores[name]
            made.append(weakref.ref(result))
            return result

        return product

    view = ReweightedBackbone(tower, {name: make(name) for name in scores})
    loss = view.image_embeddings(images).square().sum()
    assert len(made) == len(scores)
    assert not any(ref() is not None for ref in made)
    loss.backward()
    # All but the lowest weight are made again for the gradient of their input.
    assert len(made) >= 2 * len(scores) - 1


def test_an_error_inside_the_tower_leaves_the_weights_alone(backbone: Backbone, images: Tensor) -> None:
    learner = scatter(create_learner("pmt", backbone, NAMES)).eval()
    with torch.no_grad():
        expected = backbone.image_embeddings(images)
        block = backbone.vision.blocks[1]
        handle = block.mlp.c_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner(images)
        handle.remove()
        assert torch.equal(backbone.image_embeddings(images), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_adapters_would_bypass_the_masks_and_are_refused(backbone: Backbone, images: Tensor) -> None:
    with pytest.raises(BackboneError, match="adapters of attention can't be combined"):
        create_learner("amt", backbone, NAMES, prompts="clip_lora")(images)
    text_only = create_learner(
        "amt", backbone, NAMES, prompts="clip_lora", prompt_options={"encoder": "text"}
    )
    assert text_only(images).shape == (6, 4)


# --- together with other learners


@pytest.mark.parametrize("prompts", ["coop", "maple", "cocoop", "vpt", "upt", "clip_adapter"])
def test_prompts_and_masks_learn_together(
    prompts: str, backbone: Backbone, digits: ImageDataset, images: Tensor
) -> None:
    learner = create_learner("ramt", backbone, digits.classnames, digits.templates, prompts=prompts)
    alone = create_learner(prompts, backbone, digits.classnames, digits.templates).eval()
    with torch.no_grad():
        torch.testing.assert_close(learner.eval()(images), alone(images))
    before = {n: t.clone() for n, t in learner.trainable_state().items()}
    fit(learner, digits, epochs=2, lr=4e-3, batch_size=10, **RECIPE)
    after = learner.trainable_state()
    assert all(not torch.equal(after[n], t) for n, t in before.items())
    assert {n for n in after if n.startswith("prompts.")}
    assert [n for n in after if "backbone" in n] == []
    restored = create_learner("ramt", backbone, digits.classnames, digits.templates, prompts=prompts).eval()
    restored.load_trainable_state(after)
    with torch.no_grad():
        assert torch.equal(restored(images), learner.eval()(images))


def test_masks_below_the_prompts_learn_too(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = create_learner("pmt", backbone, NAMES, prompts="vpt").train()
    learner.loss(batch)["cross_entropy"].backward()
    assert all(float(score.grad.abs().max()) > 0 for score in learner.scores.values())


def test_only_masks_are_gated(backbone: Backbone, digits: ImageDataset) -> None:
    learner = scatter(create_learner("ramt", backbone, digits.classnames, prompts="coop")).train()
    learned = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    task = [torch.ones_like(p) for p in learned.values()]
    combined = learner.combine_gradients({"cross_entropy": task, "kl": [-10 * t for t in task]})
    for name, gradient in zip(learned, combined, strict=True):
        expected = 1.0 if name == "prompts.context" else 1 / 11
        assert float(gradient.mean()) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ("prograd", "combine_gradients"),
        ("tip_adapter", "prepare"),
        ("kgcoop", "a loss"),
        ("ramt", "combine_gradients"),
    ],
)
def test_what_has_its_own_way_of_training_is_refused(prompts: str, reason: str, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=f"{prompts} can't be trained together with masks: it has {reason}"):
        create_learner("ramt", backbone, NAMES, DEFAULT_TEMPLATES, prompts=prompts)


def test_options_of_prompts_are_checked(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="contxt_length"):
        create_learner("ramt", backbone, NAMES, prompts="coop", prompt_options={"contxt_length": 4})
    learner = create_learner("ramt", backbone, NAMES, prompts="coop", prompt_options={"context_length": 3})
    assert learner.prompts.context.shape[0] == 3


def test_a_gradient_that_is_not_finite_is_an_error(backbone: Backbone, digits: ImageDataset) -> None:
    learner = create_learner("ramt", backbone, digits.classnames, digits.templates)
    next(iter(learner.scores.values())).data.fill_(1e38)
    with pytest.raises(NonFiniteError):
        fit(learner, digits, epochs=1, lr=1e-3, batch_size=10, **RECIPE)
