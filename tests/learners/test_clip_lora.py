"""CLIP-LoRA: the authors' numbers, an exact no-op at the start, dropout in training only, untouched towers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import BackboneError, ConfigError, VLPromptError
from vlprompt.learners import Learner

GOLDEN = read_golden("clip_lora_small")
NAMES = ["dog", "red circle", "American staffordshire terrier"]
CONV = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}
TIMM = {
    "timm_model_name": "test_vit",
    "timm_model_pretrained": False,
    "timm_pool": "token",
    "image_size": 160,
}


def put(learner: Learner, case: str = "updates", std: float = 0.1) -> Learner:
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.requires_grad and parameter.copy_(filled(f"{case}/{name}", parameter.shape, std))
    return learner


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    learner = golden_learner(golden_backbone, case)
    small_embeddings(GOLDEN, golden_backbone)  # checks the recipe's images
    logits = learner(filled("images", (3, 3, *golden_backbone.image_size), 1.0))
    loss = F.cross_entropy(logits, torch.tensor(GOLDEN["labels"]))
    loss.backward()
    close(logits, golden["logits"])
    close(loss, golden["loss"])
    gradients = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
    assert gradients.keys() == golden["gradient_norms"].keys()
    for name, gradient in gradients.items():
        close(gradient.norm(), golden["gradient_norms"][name])
        close(gradient.flatten()[::61], golden["gradient_every_61st"][name])


def golden_learner(backbone: Backbone, case: str) -> Learner:
    golden = GOLDEN["cases"][case]
    names, options = GOLDEN["classnames"], golden["options"]
    learner = create_learner("clip_lora", backbone, names, [golden["template"]], dropout=0.0, **options)
    return put(learner, case).train()


def test_the_published_path_without_dropout_has_other_gradients_than_finite_differences(
    golden_backbone: Backbone,
) -> None:
    learner = golden_learner(golden_backbone, "both")
    images = filled("images", (3, 3, *golden_backbone.image_size), 1.0)

    def loss() -> Tensor:
        return F.cross_entropy(learner(images), torch.tensor(GOLDEN["labels"]))

    name = "text.1.down.v"
    parameter = learner.get_parameter(name)
    (gradient,) = torch.autograd.grad(loss(), parameter)
    published = GOLDEN["no_dropout_gradient_norms"][name]
    with torch.no_grad():
        step = 0.02 * gradient / gradient.norm()
        slopes = []
        for sign in (1, -1):
            parameter.add_(sign * step)
            slopes.append(loss())
            parameter.sub_(sign * step)
    slope = float((slopes[0] - slopes[1]) / 0.04)
    assert slope == pytest.approx(float(gradient.norm()), rel=5e-3)
    assert slope != pytest.approx(published, rel=2e-2)


@pytest.mark.parametrize("encoder", ["both", "text", "vision"])
def test_the_start_is_an_exact_no_op(encoder: str, backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("clip_lora", backbone, NAMES, encoder=encoder)
    zero_shot = create_learner("zero_shot", backbone, NAMES).eval()(images)
    torch.testing.assert_close(learner.eval()(images), zero_shot, rtol=0, atol=2e-5)
    torch.testing.assert_close(learner.train()(images), zero_shot, rtol=0, atol=2e-5)


def test_unmerged_equals_merged_weights(backbone: Backbone, images: Tensor) -> None:
    learner = put(create_learner("clip_lora", backbone, NAMES, rank=3, alpha=4.0, matrices=("q", "v"))).eval()
    merged = copy.deepcopy(backbone)
    with torch.no_grad():
        for updates, tower in ((learner.text, merged.model), (learner.vision, merged.model.visual)):
            for index, update in updates.items():
                attention = tower.transformer.resblocks[int(index)].attn
                attention.in_proj_weight += update.weight_update()
    width = backbone.text.width
    assert not learner.text["0"].weight_update()[width : 2 * width].any()  # keys have no update
    expected = create_learner("zero_shot", merged, NAMES).eval()(images)
    torch.testing.assert_close(learner(images), expected, rtol=0, atol=1e-4)
    assert (expected - create_learner("zero_shot", backbone, NAMES).eval()(images)).abs().max() > 0.1


def test_dropout_is_each_matrix_s_own_and_acts_in_training_only(backbone: Backbone) -> None:
    learner = put(create_learner("clip_lora", backbone, NAMES, dropout=0.5))
    update, x = learner.text["0"], torch.ones(1, 4000, backbone.text.width)
    clean = update.eval()(x)
    torch.testing.assert_close(clean, F.linear(x, update.weight_update()))
    torch.manual_seed(0)
    noisy = update.train()(x)
    # inverted dropout leaves the expectation alone
    torch.testing.assert_close(noisy.mean(1), clean.mean(1), rtol=0.1, atol=0.02)
    same = update.down
    with torch.no_grad():
        for m in "kv":
            same[m].copy_(same["q"])
            update.up[m].copy_(update.up["q"])
    q, k, v = update(x).chunk(3, dim=-1)
    assert not torch.allclose(q, k)
    assert not torch.allclose(k, v)


def test_while_dropout_acts_every_sentence_draws_its_own_masks(backbone: Backbone, images: Tensor) -> None:
    """Two classes that read the same would get the same features if they shared masks."""
    learner = put(create_learner("clip_lora", backbone, ["dog", "cat"], encoder="text"))
    assert learner.layout.shared > 1
    assert learner.noisy_layout.shared == 0
    torch.manual_seed(1)
    noisy = [learner.train()(images).detach() for _ in range(2)]
    assert not torch.allclose(*noisy)
    assert torch.equal(learner.eval()(images), learner(images))


@pytest.mark.parametrize("causal", [True, False])
def test_the_fast_text_path_sees_the_updates(make_backbone: Callable[..., Backbone], causal: bool) -> None:
    text = {} if causal else {"no_causal_mask": True, "pool_type": "last"}
    backbone = make_backbone(text, custom=True)
    learner = put(create_learner("clip_lora", backbone, NAMES, encoder="text", dropout=0.0))
    tower, adapters = backbone.text, [learner.text[str(i)] for i in range(3)]
    assert tower.packable == causal
    parameter = learner.text["0"].down["k"]
    pull = filled("pull", (len(NAMES), backbone.dim), 1.0)

    def features_and_gradient(run: Callable[..., Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        features = run(learner.layout, adapters=adapters, **options)
        return features.detach(), torch.autograd.grad((features * pull).sum(), parameter)[0]

    expected = features_and_gradient(tower.encode_plain, length=tower.context_length)
    found = features_and_gradient(tower.encode)
    memory, tower.memory = tower.memory, 1  # every tile in a checkpointed chunk of its own
    try:
        chunked = features_and_gradient(tower.encode)
    finally:
        tower.memory = memory
    for result in (found, chunked):
        torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], tower.encode(learner.layout))


def test_the_backbone_stays_as_it_is(make_backbone: Callable[..., Backbone], images: Tensor) -> None:
    backbone = make_backbone()
    before = copy.deepcopy(backbone.model.state_dict())
    plain = create_learner("zero_shot", backbone, NAMES).eval()(images)
    learner = put(create_learner("clip_lora", backbone, NAMES)).train()
    loss = sum(learner.loss({"image": images, "label": torch.arange(6) % 3}).values())
    loss.backward()
    assert not torch.equal(learner.eval()(images), plain)
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert torch.equal(create_learner("zero_shot", backbone, NAMES).eval()(images), plain)


def test_a_timm_image_tower(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(vision=TIMM, custom=True)
    images = filled("timm", (2, 3, *backbone.image_size), 1.0)
    learner = create_learner("clip_lora", backbone, NAMES, encoder="vision").eval()
    plain = backbone.image_embeddings(images)
    torch.testing.assert_close(learner.embed_images(images), plain, rtol=0, atol=1e-5)
    put(learner)
    merged = copy.deepcopy(backbone)
    with torch.no_grad():
        for index, update in learner.vision.items():
            merged.model.visual.trunk.blocks[int(index)].attn.qkv.weight += update.weight_update()
    expected = merged.image_embeddings(images)
    torch.testing.assert_close(learner.embed_images(images), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, plain)
    assert not any(b.attn.qkv._forward_hooks for b in backbone.model.visual.trunk.blocks)


def test_towers_it_can_t_enter_are_refused_by_name(make_backbone: Callable[..., Backbone]) -> None:
    conv = make_backbone(vision=CONV)
    with pytest.raises(BackboneError, match=r"image tower .*ResNet"):
        create_learner("clip_lora", conv, NAMES)
    text_only = create_learner("clip_lora", conv, NAMES, encoder="text")
    assert text_only.static_images
    odd = make_backbone({"block_type": "custom", "qk_norm": True}, custom=True)
    with pytest.raises(BackboneError, match="text tower's blocks"):
        create_learner("clip_lora", odd, NAMES)
    too_long = ["dog", "hummingbird " * 80]
    create_learner("clip_lora", odd, too_long, encoder="vision")
    with pytest.raises(VLPromptError, match="hummingbird hummingbird"):
        create_learner("clip_lora", conv, too_long, encoder="text")
    with pytest.raises(ConfigError, match="matrices"):
        create_learner("clip_lora", odd, NAMES, matrices=["o"])


def test_sizes_layers_and_scale(make_backbone: Callable[..., Backbone]) -> None:
    deep = make_backbone({"layers": 12}, {"layers": 6})
    parts = {
        "bottom": (0, 4),
        "mid": (4, 8),
        "up": (8, 12),
        "half-up": (6, 12),
        "top3": (9, 12),
        "all": (0, 12),
    }
    for layers, (first, last) in parts.items():
        learner = create_learner("clip_lora", deep, NAMES, layers=layers)
        assert list(learner.text) == [str(i) for i in range(first, last)]
    assert list(learner.vision) == [str(i) for i in range(6)]
    assert sum(t.numel() for t in learner.trainable_state().values()) == (12 + 6) * 3 * 2 * (64 + 64)
    assert learner.text["0"].scale == pytest.approx(2**-0.5)
    papers = create_learner("clip_lora", deep, NAMES, scaling="rank")
    assert papers.text["0"].scale == pytest.approx(0.5)


def test_blocks_below_the_first_update_keep_no_graph(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("clip_lora", backbone, NAMES, encoder="vision", layers="top1").train()
    seen = []
    block = backbone.vision.blocks[1]
    handle = block.register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    try:
        out = learner(images)
    finally:
        handle.remove()
    assert seen == [False]
    assert out.requires_grad


def test_it_learns_digits(backbone: Backbone) -> None:
    train = load_dataset("digits", "train", shots=2, seed=1)
    learner = create_learner("clip_lora", backbone, train.classnames, rank=4)
    recipe = {"optimizer": "adamw", "lr": 0.02, "schedule": "cosine", "warmup_epochs": 0}
    history = fit(learner, train, epochs=30, batch_size=20, callbacks=[], **recipe).history
    assert history[-1]["cross_entropy"] < 0.7 * history[0]["cross_entropy"]
