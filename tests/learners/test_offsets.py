"""Offsets of frozen words: exact in the packed text tower, off to the bit, two rates, other classes; and dept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlprompt
from tests.golden.visual_learners import put
from tests.golden.weights import filled
from vlprompt import load, save
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.layout import is_slot, slot_number
from vlprompt.core.errors import ConfigError, DataError, VLPromptError
from vlprompt.core.options import options_model
from vlprompt.learners import LEARNERS
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

build: Any = vlprompt.create_learner  # whose results have members of their own
NAMES = ["dog", "red circle", "American staffordshire terrier"]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
ALL = [entry.name for entry in LEARNERS if "offset_rank" in options_model(entry.target).model_fields]
MODES = ("place", "token", "class")


def learner_of(name: str, backbone: Backbone, spread: float = 0.3, **options: Any) -> Any:
    """A learner whose every number has left its start; those of its offsets by more."""
    learner = build(name, backbone, NAMES, **options)
    moved = dict.fromkeys(learner.learned_parameters(), 0.02)
    put(name, {key: spread if key.startswith("offsets") else std for key, std in moved.items()}, learner)
    return learner.eval()


def obvious_sentences(learner: Any, over: str = "tail") -> Tensor:
    """(C, d) features of sentences run one by one, unpadded, whose offsets are added in a loop."""
    tower, offsets = learner.backbone.text, learner.offsets
    features = []
    for c, (sentence, name) in enumerate(zip(learner.layout.sentences, learner.classnames, strict=True)):
        embedded = []
        t = 0
        named = tower.require_tokenizer().encode(name)
        for place, source in enumerate(sentence):
            if is_slot(source):
                embedded.append(learner.context[slot_number(source)])
                continue
            x = tower.embedding.weight[source]
            is_start = place < len(tower.tokenizer.start)
            if not is_start and (over == "tail" or source in named):
                if offsets.mode == "token":
                    inner = torch.relu(x @ offsets.left + offsets.left_bias)
                    x = x + inner @ offsets.right + offsets.right_bias
                else:
                    rows = offsets.left[c] if offsets.mode == "class" else offsets.left
                    x = x + 8.0 / offsets.left.shape[-1] ** 0.5 * rows[t] @ offsets.right
                t += 1
            embedded.append(x)
        x = torch.stack(embedded)[None] + tower.positions[: len(sentence)]
        mask = torch.full((len(sentence),) * 2, -torch.inf).triu(1)
        for block in tower.blocks:
            x = block(x, attn_mask=mask)
        features.append(tower.project(x[:, -1])[0])
    return torch.stack(features)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [
    {"position": "end"}, {"position": "middle"}, {"position": "front"}, {"position": "end", "class_specific": True},
    {"offset_over": "name"}, {"attributes": ["color"]},
])  # fmt: skip
def test_packed_sentences_equal_single_ones(mode: str, options: dict[str, Any], backbone: Backbone) -> None:
    """With the gradients of everything that is learned, also where tiles run in checkpointed chunks."""
    learner = learner_of("coop", backbone, context_length=4, offset_rank=3, offset_mode=mode, **options)
    expected = obvious_sentences(learner, options.get("offset_over", "tail"))
    own = list(learner.learned_parameters().values())
    pull = filled("pull", tuple(expected.shape), 1.0)
    right = torch.autograd.grad((expected * pull).sum(), own)

    tower: Any = backbone.text
    plain = tower.encode_plain(learner.layout, learner.context, offsets=learner.offsets.rows(learner.layout))
    torch.testing.assert_close(plain, expected, rtol=0, atol=2e-5)
    memory = tower.memory
    for size in (memory, 1):
        tower.memory = size
        try:
            got = learner.class_embeddings()
            gradients = torch.autograd.grad((got * pull).sum(), own)
        finally:
            tower.memory = memory
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        for gradient, one in zip(gradients, right, strict=True):
            assert one.any()
            torch.testing.assert_close(gradient, one, rtol=1e-3, atol=1e-4)
    bare = learner.layout.with_offsets([[-1] * length for length in learner.layout.lengths])
    without = tower.encode(bare, learner.context)
    assert not torch.allclose(got, without, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_packed_sentences_equal_single_ones_on_vit_b16(mode: str) -> None:
    backbone = create_backbone("ViT-B-16")
    learner = learner_of("coop", backbone, 0.02, offset_rank=3, offset_mode=mode)
    with torch.no_grad():
        expected = obvious_sentences(learner)
        torch.testing.assert_close(learner.class_embeddings(), expected, rtol=1e-4, atol=1e-5)


def test_groups_may_have_offsets_of_their_own(backbone: Backbone) -> None:
    learner = learner_of("coop", backbone, offset_rank=2)
    rows = torch.stack(
        [learner.offsets.rows(learner.layout), filled("rows", (6, 64), 0.1)[: learner.offsets.places]]
    )
    together = backbone.text.encode(learner.layout, learner.context, offsets=rows)
    plain = backbone.text.encode_plain(learner.layout, learner.context, offsets=rows)
    torch.testing.assert_close(together, plain, rtol=0, atol=1e-5)
    for group in range(2):
        one = backbone.text.encode(learner.layout, learner.context, offsets=rows[group])
        torch.testing.assert_close(together[group], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["CoCa", "SigLIP, SigLIP 2", "XLM-RoBERTa text"])
def test_towers_that_are_not_packed(family: str) -> None:
    """An offset is what another embedding would be: the difference of two words turns one into the other."""
    from tests.families import FAMILIES, family_backbone

    assert family in FAMILIES
    tower = family_backbone(family).text
    first, second = tower.sentence("a dog."), tower.sentence("a cat.")
    assert len(first) == len(second)
    numbers = [number if a != b else -1 for number, (a, b) in enumerate(zip(first, second, strict=True))]
    rows = tower.embed_tokens(second) - tower.embed_tokens(first)
    layout = tower.layout([first, first]).with_offsets([numbers, [-1] * len(first)])
    got = tower.encode(layout, offsets=rows)
    expected = tower.encode(tower.layout([second, first]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_every_learner_of_text_prompts_has_the_option() -> None:
    assert ALL == [
        "cocoop", "coop", "coprompt", "dept", "ept", "ivlp", "kgcoop", "lasp", "maple", "mvlpt", "prograd", "promptsrc",
        "tcp", "upt",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("dept", "ept")])
def test_off_is_the_plain_learner_and_the_start_says_the_same(
    name: str, backbone: Backbone, images: Tensor
) -> None:
    plain = build(name, backbone, NAMES).eval()
    off = build(name, backbone, NAMES, offset_rank=0, offset_rate=3.0).eval()
    assert off.learned_parameters().keys() == plain.learned_parameters().keys()
    assert off.parameter_groups() == plain.parameter_groups()
    assert off.layout.offsets is None
    expected = plain(images)
    assert torch.equal(off(images), expected)
    for mode in ("place", "token"):
        start = build(name, backbone, NAMES, offset_rank=2, offset_mode=mode).eval()
        assert start.layout.shared == plain.layout.shared
        assert torch.equal(start(images), expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", MODES)
def test_every_learner_learns_its_offsets(name: str, mode: str, backbone: Backbone, images: Tensor) -> None:
    options: dict[str, Any] = {"offset_rank": 2, "offset_mode": mode}
    learner = learner_of(name, backbone, **options).train()
    assert learner.class_bound == (mode == "class")
    batch = {"image": images, "frozen": backbone.image_embeddings(images), "label": LABELS}
    losses = learner.loss(batch)
    own = {k: p for k, p in learner.learned_parameters().items() if k.startswith("offsets.")}
    assert len(own) == (4 if mode == "token" else 2)
    gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(own.values()))
    assert all(gradient.any() for gradient in gradients)

    learner.eval()
    again = learner.with_classes(learner.classnames)
    torch.testing.assert_close(again(images), learner(images), rtol=0, atol=1e-5)
    if mode == "class":
        with pytest.raises(DataError, match="one set of parameters per class"):
            learner.with_classes(["cat", "dog", "bird"])
    else:
        moved = learner.with_classes(["dog", "cat"])(images)
        if name not in ("lasp", "upt", "mvlpt"):  # of which a class does not depend on the others
            torch.testing.assert_close(moved[:, 0], learner(images)[:, 0], rtol=0, atol=1e-3)


def test_five_steps_equal_a_loop_without_packing(backbone: Backbone) -> None:
    """SGD with momentum and decay, two rates: sentences padded to one length, offsets behind start and slots."""
    learner = build("coop", backbone, NAMES, context_length=4, offset_rank=2, offset_rate=0.5)
    put("five", {"context": 0.1, "offsets.left": 0.3, "offsets.right": 0.1}, learner)
    embeddings = filled("embeddings", (6, backbone.dim), 1.0)

    tower: Any = backbone.text
    names = ("context", "offsets.left", "offsets.right")
    context, left, right = (learner.learned_parameters()[name].detach().clone() for name in names)
    own = [tensor.requires_grad_() for tensor in (context, left, right)]
    optimizer = torch.optim.SGD(
        [{"params": own[:1], "lr": 0.1}, {"params": own[1:], "lr": 0.05}], momentum=0.9, weight_decay=5e-4
    )
    words = [tower.tokenizer.encode(f"{name}.") for name in NAMES]
    (start,), (end,) = tower.tokenizer.start, tower.tokenizer.end
    longest = max(map(len, words))
    ids = torch.tensor([[*row, end, *[0] * (longest - len(row))] for row in words])
    mask = torch.full((longest + 6,) * 2, -torch.inf).triu(1)
    for _ in range(5):
        tail = tower.embedding(ids) + 8 / 2**0.5 * left @ right
        first = tower.embedding(torch.tensor([[start]])).expand(3, -1, -1)
        x = torch.cat([first, context.expand(3, -1, -1), tail], 1) + tower.positions[: longest + 6]
        for block in tower.blocks:
            x = block(x, attn_mask=mask)
        ends = torch.tensor([5 + len(row) for row in words])
        weights = F.normalize(tower.project(x[torch.arange(3), ends]), dim=-1)
        logits = backbone.logit_scale * F.normalize(embeddings, dim=-1) @ weights.T
        optimizer.zero_grad()
        F.cross_entropy(logits, LABELS).backward()
        optimizer.step()

    batches = TensorBatches({"embedding": [embeddings], "label": [LABELS]}, 6, seed=1)
    options = TrainOptions(epochs=5, batch_size=6, lr=0.1, schedule="constant", warmup_epochs=0)
    Trainer(learner, batches, options, callbacks=[]).run()
    for name, expected in zip(names, own, strict=True):
        got = learner.learned_parameters()[name].detach()
        torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_rate_of_offsets_scales_their_step_alone(backbone: Backbone) -> None:
    steps = {}
    for rate in (0.1, 0.3):
        learner = learner_of("coop", backbone, context_length=4, offset_rank=2, offset_rate=rate)
        before = {name: tensor.clone() for name, tensor in learner.trainable_state().items()}
        batch = {"embedding": [filled("embeddings", (6, backbone.dim), 1.0)], "label": [LABELS]}
        options = TrainOptions(
            epochs=1, batch_size=6, lr=1e-3, schedule="constant", warmup_epochs=0, weight_decay=0
        )
        Trainer(learner, TensorBatches(batch, 6, seed=1), options, callbacks=[]).run()
        steps[rate] = {name: learner.trainable_state()[name] - tensor for name, tensor in before.items()}
    assert torch.equal(steps[0.1]["context"], steps[0.3]["context"])
    for name in ("offsets.left", "offsets.right"):
        torch.testing.assert_close(3 * steps[0.1][name], steps[0.3][name], rtol=1e-2, atol=1e-7)


def test_places_beyond_the_trained_ones_have_no_offset(
    backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    short = build("coop", backbone, ["dog", "cat"], context_length=2, offset_rank=2)
    put("short", {"offsets.left": 0.3, "offsets.right": 0.3}, short)
    assert short.offsets.left.shape == (3, 2)  # name, stop, end
    with caplog.at_level(logging.WARNING):
        other = short.eval().with_classes(["dog", "American staffordshire terrier"])
    assert "3 places have one, and these classes have more" in caplog.text
    assert "staffordshire" in caplog.text
    assert "dog" not in caplog.text
    assert max(other.layout.offsets[1]) == 2
    assert other.layout.offsets[1][-1] == -1
    torch.testing.assert_close(other.class_embeddings()[0], short.class_embeddings()[0], rtol=0, atol=1e-5)


def test_saved_offsets_come_back(backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    for mode in MODES:
        learner = learner_of("dept", backbone, offset_mode=mode)
        save(learner, tmp_path / mode)
        loaded = load(tmp_path / mode, backbone)
        torch.testing.assert_close(loaded.eval()(images), learner(images), rtol=0, atol=1e-5)


def test_dept_has_as_many_numbers_as_coop_with_16_vectors(make_backbone: Callable[..., Backbone]) -> None:
    """At the text width of CLIP's ViT-B/16 and 20 places: 4 * 512 + 11 * 532 = 7,900 of 8,192."""
    names = [*NAMES[:2], " ".join(["dog"] * 18)]  # with stop and end, 20 places
    learner = build("dept", make_backbone(text={"width": 512, "heads": 8}), names)
    assert learner.offsets.left.shape == (20, 11)
    assert sum(p.numel() for p in learner.learned_parameters().values()) == 7_900


def test_dept_fills_the_budget(backbone: Backbone) -> None:
    for mode in MODES:
        small = build("dept", backbone, NAMES, offset_mode=mode)
        rank = small.options["offset_rank"]
        more = build("dept", backbone, NAMES, offset_mode=mode, offset_rank=rank + 1)
        count, next_count = (
            sum(p.numel() for p in one.learned_parameters().values()) for one in (small, more)
        )
        assert count <= 16 * 64 < next_count
    with pytest.raises(ConfigError, match="budget: 4 vectors of 64 numbers leave none"):
        build("dept", backbone, NAMES, budget=4)


def test_what_does_not_fit_is_refused(backbone: Backbone, make_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(ConfigError, match="offset_rank: the family vpt learns nothing in its sentences"):
        build("mvlpt", backbone, NAMES, family="vpt", offset_rank=2)
    with pytest.raises(ConfigError, match="offset_rnak: unknown key; did you mean 'offset_rank'"):
        build("coop", backbone, NAMES, offset_rnak=2)
    with pytest.raises(ConfigError, match=r"offset_mode: .*'place', 'token' or 'class'"):
        build("coop", backbone, NAMES, offset_rank=2, offset_mode="word")
    learner = build("coop", backbone, NAMES, offset_rank=2)
    with pytest.raises(VLPromptError, match="refer to 5 offsets, 0 were given"):
        backbone.text.encode(learner.layout, learner.context)
    with pytest.raises(VLPromptError, match="not to a learned vector"):
        learner.layout.with_offsets([[0] * n for n in learner.layout.lengths])
