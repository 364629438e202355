"""What all learners with visual prompts must do: published sizes, start values, other towers, no wasted graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.visual_learners import vit_b16
from vlprompt import create_learner, evaluate, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.core.errors import BackboneError
from vlprompt.learners._visual import initial_visual_prompts, possible_depth

NAMES = ["dog", "red circle", "American staffordshire terrier", "hummingbird"]
VISUAL = ("vpt", "upt", "maple", "ivlp", "promptsrc")
TWO_SIDED = VISUAL[1:]
TOWERS: dict[str, dict[str, Any]] = {
    "deep image tower": {"vision": {"layers": 4}, "text": {"layers": 2}},
    "deep text tower": {"vision": {"layers": 2, "width": 96}, "text": {"layers": 4}},
    "timm": {
        "vision": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token"},
        "custom": True,
    },
}


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vpt", {"visual_length": 16}, 147_456),  # 12 * 16 * 768
        ("vpt", {"visual_length": 16, "visual_depth": 1}, 12_288),
        ("upt", {}, 566_400),  # 2,048 + 36,864 + 527,488 of the mixer
        ("upt", {"mixer": "identity"}, 38_912),
        ("maple", {"depth": 9}, 3_555_072),  # 9 * 1,024 + 9 * (512 * 768 + 768)
        ("maple", {"depth": 3}, 1_185_024),
        ("ivlp", {}, 46_080),  # 9 * 4 * (512 + 768)
        ("promptsrc", {}, 46_080),
    ],
)
def test_number_of_parameters_on_vit_b16(name: str, options: dict[str, Any], count: int) -> None:
    learner = create_learner(name, vit_b16(), ["dog", "cat"], **options)
    assert sum(t.numel() for t in learner.trainable_state().values()) == count


@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("name", VISUAL)
def test_learns_on_towers_of_any_shape(
    name: str, towers: str, make_backbone: Callable[..., Backbone]
) -> None:
    """Deep options exceed every tower here; digits need no download."""
    backbone = make_backbone(**TOWERS[towers])
    frozen = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    train = load_dataset("digits", "train", shots=1, seed=1)
    learner = create_learner(name, backbone, train.classnames, train.templates)
    before = {n: t.clone() for n, t in learner.trainable_state().items()}
    result = fit(learner, train, epochs=3, batch_size=10, lr=0.01, warmup_epochs=0, callbacks=[])
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    after = learner.trainable_state()
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(t, frozen[n]) for n, t in backbone.model.state_dict().items())


@pytest.mark.parametrize("name", VISUAL)
def test_scenes_are_learned_and_scored_through_the_image_tower(name: str, backbone: Backbone) -> None:
    train = load_dataset("scenes/shape", "train", shots=1, seed=1)
    train = train.keep_classes(range(4))
    learner = create_learner(name, backbone, train.classnames, train.templates)
    start = evaluate(learner, train)["nll"]
    fit(learner, train, epochs=4, batch_size=4, lr=0.01, warmup_epochs=0, callbacks=[])
    assert evaluate(learner, train)["nll"] < start


@pytest.mark.parametrize("name", [name for name in VISUAL if name != "vpt"])  # which learns pixels there
def test_convolutional_towers_are_refused_by_name(name: str, make_backbone: Callable[..., Backbone]) -> None:
    resnet = make_backbone(vision={"layers": [1, 1, 1, 1], "width": 8})
    with pytest.raises(
        BackboneError, match=r"visual prompts can't be learned on this backbone.*ModifiedResNet"
    ):
        create_learner(name, resnet, NAMES)


@pytest.mark.parametrize("name", VISUAL)
def test_nothing_below_the_first_prompt_has_a_graph(name: str, backbone: Backbone, images: Tensor) -> None:
    learner = create_learner(name, backbone, NAMES).train()
    seen: dict[str, bool] = {}
    visual: Any = backbone.vision.visual
    watched = {"patches": visual.conv1, "block": visual.transformer.resblocks[0]}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, k=k: seen.update({k: output.requires_grad}))
        for k, module in watched.items()
    ]
    learner.embed_images(images)
    for handle in handles:
        handle.remove()
    assert seen == {"patches": False, "block": True}


@pytest.mark.parametrize("name", VISUAL)
def test_prompts_move_the_embeddings_and_another_seed_starts_elsewhere(
    name: str, backbone: Backbone, images: Tensor
) -> None:
    plain = backbone.image_embeddings(images)
    one, again, other = (
        create_learner(name, backbone, NAMES, seed=s).eval().embed_images(images) for s in (1, 1, 2)
    )
    assert torch.equal(one, again)
    for different in (plain, other):
        assert (one - different).abs().max() > 1e-4


@pytest.mark.parametrize("name", VISUAL)
def test_evaluation_follows_every_change_of_the_prompts(
    name: str, backbone: Backbone, images: Tensor
) -> None:
    """What evaluation keeps between batches must not outlive new parameters."""
    learner = create_learner(name, backbone, NAMES).eval()
    with torch.no_grad():
        first = learner(images)
        assert torch.equal(first, learner(images))
        learner.load_trainable_state({n: -3 * t for n, t in learner.trainable_state().items()})
        second = learner(images)
        live = learner.train()(images)
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(second, live)


def test_start_values_follow_each_convention(backbone: Backbone) -> None:
    after_cls = initial_visual_prompts(backbone.vision, 3, 200, "after_cls", seed=1)
    bound = (6 / (3 * 8 * 8 + 64)) ** 0.5  # patches of 8 x 8 pixels, width 64
    assert after_cls.shape == (3, 200, 64)
    assert 0.99 * bound < after_cls.abs().max() <= bound
    assert after_cls.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    append = initial_visual_prompts(backbone.vision, 3, 200, "append", seed=1)
    assert append.std() == pytest.approx(0.02, rel=0.02)
    shallow = initial_visual_prompts(backbone.vision, 1, 200, "after_cls", seed=1)
    assert torch.equal(shallow[0], after_cls[0])


def test_depth_is_what_the_shallowest_tower_has() -> None:
    assert [possible_depth(d, 12, 24) for d in (None, 3, 12, 40)] == [12, 3, 12, 12]


@pytest.mark.parametrize("name", TWO_SIDED)
def test_the_text_side_learns_too(name: str, backbone: Backbone) -> None:
    learner = create_learner(name, backbone, NAMES).train()
    weights = learner.class_weights()
    (gradient,) = torch.autograd.grad(weights[0] @ weights[1], learner.context)
    assert gradient.any()
