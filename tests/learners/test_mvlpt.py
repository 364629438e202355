"""MVLPT's three families: the authors' numbers, where words and tokens stand, and who learns from whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.text_learners import read_golden, small_clip
from tests.golden.visual_learners import check_case, put
from tests.golden.weights import filled
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.backbones.vision import VisualPrompts
from vlprompt.classification.multitask import MultiTask
from vlprompt.core.errors import BackboneError, CheckpointError
from vlprompt.learners import Learner
from vlprompt.learners._context import context_layout

GOLDEN = read_golden("mvlpt_small")
NAMES = ["dog", "red circle", "hummingbird"]
FAMILIES = ("coop", "vpt", "upt")


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


def _filled(case: str, backbone: Backbone) -> Learner:
    options = GOLDEN["cases"][case]["options"]
    learner = create_learner("mvlpt", backbone, GOLDEN["classnames"], **options).train()
    spread = {"context": 0.02, "visual": 0.04}
    for name, tensor in learner.trainable_state().items():
        if name.startswith("mixer"):
            last = 0.02 if "bias" in name else tensor.shape[-1] ** -0.5
            spread[name] = 0.1 if "norm" in name else last
    put(f"mvlpt {case}", {n: s for n, s in spread.items() if n in learner.trainable_state()}, learner)
    return learner


@pytest.mark.parametrize("case", FAMILIES)
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    check_case(GOLDEN, case, _filled(case, golden_backbone))


@pytest.mark.parametrize("case", FAMILIES)
def test_label_spaces_against_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    """Their joint loss is ours; theirs per task multiplies foreign logits by zero, which still count exp(0) = 1."""
    learner = _filled(case, golden_backbone)
    names = GOLDEN["classnames"]
    tasks = {str(start): (names[start:end], ("a photo of a {}.",)) for start, end in GOLDEN["tasks"]}
    batch = {
        "image": filled("images", (3, 3, *golden_backbone.image_size), 1.0),
        "task": torch.tensor(GOLDEN["task"]),
        "label": torch.tensor(GOLDEN["local"]),
    }
    joint = MultiTask(learner, tasks, "joint").loss(batch)["cross_entropy"]
    assert joint.item() == pytest.approx(GOLDEN["cases"][case]["joint_loss"], abs=1e-4)

    ours, zeroed = [], []
    for row, task, label in zip(learner(batch["image"]), GOLDEN["task"], GOLDEN["local"], strict=True):
        own = row[slice(*GOLDEN["tasks"][task])]
        ours.append(own.logsumexp(0) - own[label])
        zeroed.append(torch.cat([own, torch.zeros(3)]).logsumexp(0) - own[label])
    assert torch.stack(zeroed).mean().item() == pytest.approx(GOLDEN["cases"][case]["zeroed_loss"], abs=1e-4)
    exact = MultiTask(learner, tasks).loss(batch)["cross_entropy"]
    torch.testing.assert_close(exact, torch.stack(ours).mean(), rtol=1e-4, atol=1e-4)
    assert exact < torch.stack(zeroed).mean()


@pytest.mark.parametrize(
    ("family", "shapes", "parameters"),
    [
        ("coop", {"context": (16, 512)}, 8_192),
        ("vpt", {"visual": (12, 16, 768)}, 147_456),
        ("upt", {"context": (4, 512), "visual": (12, 4, 768)}, 566_400),
    ],
)
def test_sizes_are_the_papers_at_vit_b16(
    family: str, shapes: dict[str, Any], parameters: int, vit_b16: Backbone
) -> None:
    state = create_learner("mvlpt", vit_b16, NAMES, family=family).trainable_state()
    assert {n: tuple(t.shape) for n, t in state.items() if not n.startswith("mixer")} == shapes
    assert sum(t.numel() for t in state.values()) == parameters


@pytest.fixture(scope="module")
def vit_b16() -> Backbone:
    from tests.golden.visual_learners import vit_b16

    return vit_b16()


def test_the_end_stands_at_the_same_place_wherever_the_name_stands(backbone: Backbone) -> None:
    tower, encode = backbone.text, backbone.text.require_tokenizer().encode
    for number, name in enumerate(NAMES):
        words = encode(name)
        for position, offset in {"end": 17, "middle": 9, "front": 1}.items():
            layout = context_layout(tower, NAMES, 16, position)
            sentence = layout.sentences[number]
            assert len(sentence) == 1 + 16 + len(words) + 1 + 1
            assert list(sentence[offset : offset + len(words)]) == words


def test_prompts_of_a_layer_act_from_its_block_on(backbone: Backbone, images: Tensor) -> None:
    """At every depth all blocks run (the authors' code skips those above the last prompted one)."""
    tower = backbone.vision
    seen: list[Tensor] = []
    handles = [b.register_forward_hook(lambda *a: seen.append(a[2].detach())) for b in tower.blocks]
    try:
        for depth in (1, 2, 3):
            tokens = 0.1 * filled("deep", (depth, 4, tower.width), 1.0)
            backbone.image_embeddings(images, VisualPrompts(tokens))
            changed = tokens.clone()
            changed[-1] += 1
            backbone.image_embeddings(images, VisualPrompts(changed))
            first, second = seen[: tower.layers], seen[tower.layers :]
            assert len(seen) == 2 * tower.layers
            same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
            assert same == [i < depth - 1 for i in range(tower.layers)]
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()


def test_both_sides_learn_through_the_mixer_and_kept_prompts_equal_live_ones(
    backbone: Backbone, images: Tensor
) -> None:
    learner = create_learner("mvlpt", backbone, NAMES).train()
    text, visual = learner.prompts()
    assert text.shape == (4, backbone.text.width)
    assert visual.shape == (3, 4, backbone.vision.width)
    to_visual = torch.autograd.grad(text.square().sum(), learner.visual, retain_graph=True)[0]
    to_context = torch.autograd.grad(visual.square().sum(), learner.context)[0]
    assert to_visual.any()
    assert to_context.any()
    live = learner(images)
    learner.eval()
    with torch.no_grad():
        learner(images)
        kept = learner(images)
    torch.testing.assert_close(kept, live.detach())


def test_a_longer_class_list_after_a_short_one(
    make_backbone: Callable[..., Backbone], images: Tensor
) -> None:
    """The authors' code shortens the causal mask that all class lists share, for good."""
    used, fresh = make_backbone(), make_backbone()
    long = ["American staffordshire terrier with a red collar", "hummingbird in front of a tree"]
    create_learner("mvlpt", used, ["dog", "cat"], family="coop", context_length=2)(images).sum().backward()
    torch.testing.assert_close(
        create_learner("mvlpt", used, long, family="coop")(images),
        create_learner("mvlpt", fresh, long, family="coop")(images),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_other_classes_keep_what_was_learned_and_nothing_else(family: str, backbone: Backbone) -> None:
    source = create_learner("mvlpt", backbone, NAMES, family=family, seed=3)
    target = source.with_classes(["ring", "cross"])
    state = source.trainable_state()
    assert state.keys() == target.trainable_state().keys()
    assert all(torch.equal(state[n], t) for n, t in target.trainable_state().items())
    assert target.class_weights().shape == (2, backbone.dim)
    with pytest.raises(CheckpointError, match="token_prefix is unknown"):
        target.load_trainable_state({**state, "token_prefix": torch.zeros(3, 1, 64)})


def test_only_words_need_no_image_prompts(make_backbone: Callable[..., Backbone]) -> None:
    conv = make_backbone(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32})
    assert create_learner("mvlpt", conv, NAMES, family="coop").static_images
    with pytest.raises(BackboneError, match="visual prompts can't be learned"):
        create_learner("mvlpt", conv, NAMES)
