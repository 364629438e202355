"""CoOp's sentences: where the class name stands, where they end, and what the context starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.layout import is_slot, slot_number
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.learners import create_learner

NAMES = ("dog", "red circle", "hummingbird", "boeing 737-800", "st. bernard")
POSITIONS = ("end", "middle", "front")


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("count", [1, 4, 5, 16])
def test_sentences_have_one_length_and_the_name_at_its_offset(
    backbone: Backbone, count: int, specific: bool
) -> None:
    tokenizer = backbone.text.tokenizer
    offsets = {"end": count, "middle": count // 2, "front": 0}
    lengths = {}
    for position in POSITIONS:
        options: dict[str, Any] = {"context_length": count, "position": position, "class_specific": specific}
        learner = create_learner("coop", backbone, NAMES, **options)
        lengths[position] = learner.layout.lengths
        for c, (name, sentence) in enumerate(zip(NAMES, learner.layout.sentences, strict=True)):
            words = tokenizer.encode(name)
            at = 1 + offsets[position]
            assert sentence[0] == tokenizer.start[0]
            assert sentence[at : at + len(words)] == tuple(words)
            assert sentence[-2:] == (*tokenizer.encode("."), *tokenizer.end)
            first = c * count if specific else 0
            slots = [slot_number(s) for s in sentence if is_slot(s)]
            assert slots == list(range(first, first + count))
            assert len(sentence) == 1 + count + len(words) + 2
    assert lengths["end"] == lengths["middle"] == lengths["front"]


@pytest.mark.parametrize(("specific", "rows"), [(False, 4), (True, 4 * len(NAMES))])
def test_size_and_start_of_the_context(backbone: Backbone, specific: bool, rows: int) -> None:
    options: dict[str, Any] = {"context_length": 4, "class_specific": specific}
    start = create_learner("coop", backbone, NAMES, **options).context.detach()
    assert start.shape == (rows, backbone.text.width)
    assert float(start.std()) == pytest.approx(0.02, rel=0.1)
    assert len(start.unique(dim=0)) == rows, "contexts of two classes start alike"
    other = create_learner("coop", backbone, NAMES, seed=2, **options).context
    assert not torch.equal(other, start)


@pytest.mark.parametrize("specific", [False, True])
def test_a_phrase_counts_by_tokens_and_is_zero_shot_at_the_start(backbone: Backbone, specific: bool) -> None:
    phrase = "a_hyperrealistic photo of a"
    tokens = backbone.text.tokenizer.encode("a hyperrealistic photo of a")
    assert len(tokens) > 5
    learner = create_learner("coop", backbone, NAMES, init=phrase, context_length=3, class_specific=specific)
    copies = len(NAMES) if specific else 1
    assert torch.equal(learner.context, backbone.text.embed_tokens(tokens).repeat(copies, 1))
    expected = backbone.class_weights(NAMES, ["a hyperrealistic photo of a {}."])
    torch.testing.assert_close(learner.class_weights().detach(), expected, rtol=0, atol=1e-6)


def test_training_one_class_moves_only_its_own_context(backbone: Backbone) -> None:
    learner = create_learner("coop", backbone, NAMES, context_length=4, class_specific=True)
    learner.class_weights()[2].sum().backward()
    moved = learner.context.grad.reshape(len(NAMES), 4, -1).abs().amax((1, 2)) > 0
    assert moved.tolist() == [False, False, True, False, False]


def test_logits_are_scaled_cosines(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("coop", backbone, NAMES, context_length=4).eval()
    cosines = F.cosine_similarity(
        backbone.image_embeddings(images)[:, None], learner.class_weights()[None], dim=-1
    )
    torch.testing.assert_close(learner(images), backbone.logit_scale * cosines, rtol=0, atol=1e-5)


def test_class_weights_are_computed_once_per_evaluation(
    backbone: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = create_learner("coop", backbone, NAMES, context_length=4).eval()
    calls: list[int] = []
    encode = backbone.text.encode
    monkeypatch.setattr(
        backbone.text, "encode", lambda *args, **more: (calls.append(1), encode(*args, **more))[1]
    )
    with torch.no_grad():
        first = learner(images)
        learner(images)
        assert len(calls) == 1
        learner.train()
        learner.context *= 50
        assert not torch.allclose(learner.eval()(images), first, atol=1e-3)
        assert len(calls) == 2


def test_what_can_not_be_a_context(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="init='  ' has no token"):
        create_learner("coop", backbone, NAMES, init="  ")
    with pytest.raises(ConfigError, match="2 problems") as caught:
        create_learner("coop", backbone, NAMES, context_length=0, position="side")
    message = str(caught.value)
    assert "context_length: input should be greater than or equal to 1, got 0" in message
    assert "position: input should be 'end', 'middle' or 'front', got 'side'" in message
