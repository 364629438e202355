"""Attribute words in front of the sentence (ATPrompt): the authors' numbers, and every learner that has the option."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.trajectories import check_start, check_trajectory
from tests.golden.visual_learners import put
from tests.golden.weights import filled
from vlprompt import create_learner, load, save
from vlprompt.backbones import Backbone
from vlprompt.backbones.layout import is_slot, slot_number
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import DataError
from vlprompt.learners import LEARNERS

GOLDEN = read_golden("atprompt_small")
NAMES = ["dog", "red circle", "hummingbird"]
ALL = [entry.name for entry in LEARNERS if "attributes" in inspect.signature(entry.target).parameters]


def spread_of(name: str) -> float:
    if name.startswith("meta_net"):
        return 0.05
    return 0.03 if name.startswith("projections") and name.endswith("weight") else 0.02


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, tokenizer: TextTokenizer) -> None:
    golden = GOLDEN["cases"][case]
    sizes = GOLDEN["wide" if golden["learner"] == "maple" else "sizes"]
    backbone = small_clip({"sizes": sizes}, tokenizer)
    learner = create_learner(golden["learner"], backbone, GOLDEN["classnames"], **golden["options"])
    put(case, {name: spread_of(name) for name in learner.trainable_state()}, learner)

    close(filled("images", (4,), 1.0), GOLDEN["first_image_values"])
    images = filled("images", (3, 3, *backbone.image_size), 1.0)
    batch = {"image": images, "label": torch.tensor(GOLDEN["labels"])}
    check_start(golden, learner, batch)
    check_trajectory(golden["trajectory"], learner, batch, lr=0.002)


def test_every_learner_of_text_prompts_has_the_option() -> None:
    assert ALL == [
        "cocoop", "coop", "coprompt", "ivlp", "kgcoop", "lasp", "maple", "mvlpt", "prograd", "promptsrc", "tcp", "upt",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_none_is_the_plain_learner(name: str, backbone: Backbone, images: Tensor) -> None:
    plain = create_learner(name, backbone, NAMES).eval()
    none = create_learner(name, backbone, NAMES, attributes=[], attribute_length=5).eval()
    assert torch.equal(plain(images), none(images))
    assert plain.layout.sentences == none.layout.sentences


@pytest.mark.parametrize("name", ALL)
def test_words_stand_in_front_with_vectors_of_their_own(name: str, backbone: Backbone) -> None:
    """Playfulness has several tokens: in the authors' code they would take one place and shift the sentence."""
    plain = create_learner(name, backbone, NAMES)
    learner = create_learner(name, backbone, NAMES, attributes=["playfulness", "energy"], attribute_length=3)
    assert len(learner.context) - len(plain.context) == 6
    first = plain.layout.slots  # theirs come behind the context's

    encode = backbone.text.require_tokenizer().encode
    assert len(encode("playfulness")) > 1
    for sentence, before in zip(learner.layout.sentences, plain.layout.sentences, strict=True):
        sources = [f"v{slot_number(s) - first}" if is_slot(s) else s for s in sentence]
        front = ["v0", "v1", "v2", *encode("playfulness"), "v3", "v4", "v5", *encode("energy")]
        assert sources[1 : 1 + len(front)] == front
        assert sentence[1 + len(front) :] == before[1:]


@pytest.mark.parametrize("name", ALL)
def test_their_vectors_learn_and_are_saved(
    name: str, backbone: Backbone, images: Tensor, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"attributes": ["color", "shape"], "attribute_length": 1}
    learner = create_learner(name, backbone, NAMES, **options).train()
    batch = {"image": images, "label": torch.arange(6) % 3}
    torch.stack(list(learner.loss(batch).values())).sum().backward()
    assert learner.context.grad[-2:].abs().sum(1).min() > 0

    with torch.no_grad():
        learner.context[-2:] += 0.1
    save(learner, tmp_path / "prompt")
    again = load(tmp_path / "prompt", backbone=backbone)
    assert torch.equal(again.eval()(images), learner.eval()(images))


@pytest.mark.parametrize("name", ["maple", "ivlp", "tcp"])
def test_deeper_layers_leave_them_to_flow_on(name: str, backbone: Backbone) -> None:
    """Only what stands before the name is replaced: the attributes' vectors matter up to the last layer."""
    learner = create_learner(name, backbone, NAMES, attributes=["color"], attribute_length=2)
    top = backbone.text.layers - 1
    prompts = filled("top", (learner.layout.slots - 2, backbone.text.width), 0.1)
    found = []
    for shift in (0.0, 1.0):
        context = filled("context", (learner.layout.slots, backbone.text.width), 0.1)
        context[-2:] += shift * filled("shift", (2, backbone.text.width), 0.3)
        found.append(backbone.text.encode(learner.layout, context, {top: prompts}))
    assert float((found[1] - found[0]).abs().max()) > 1e-3


def test_a_word_that_is_no_token_is_refused(backbone: Backbone) -> None:
    with pytest.raises(DataError, match=r"attributes: the tokenizer reads nothing in ' '"):
        create_learner("coop", backbone, NAMES, attributes=["color", " "])
