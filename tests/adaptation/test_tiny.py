"""The promises of test-time adaptation on the embedded weights (the other tests hold them to a random ViT)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlprompt import create_adapter, create_backbone, create_learner, load_dataset
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.adaptation.selection import entropies
from vlprompt.adaptation.views import open_images
from vlprompt.backbones import Backbone

DATA = load_dataset("scenes/shape@sketch", "val").subset([0, 41, 82, 123])
PLAN = {"views": 12, "augment": "augmix:0.8"}


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [image for image, _ in DATA]


def build(name: str, tiny: Backbone, **options: object) -> PromptAdapter:
    adapter = create_adapter(name, tiny, DATA.classnames, ("a photo of a {}.",), **{**PLAN, **options})
    return adapter  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["tpt", "ctpt", "mta", "zero"])
def test_the_order_of_the_stream_changes_no_bit(name: str, tiny: Backbone, images: list[Image.Image]) -> None:
    adapter = build(name, tiny)
    together, reversed_ = adapter.predict(images), adapter.predict(images[::-1])
    assert torch.equal(reversed_.probs.flip(0), together.probs)
    assert float((together.probs - together.before).abs().max()) > 1e-4


def test_what_does_not_move_is_zero_shot(tiny: Backbone, images: list[Image.Image]) -> None:
    zero_shot = create_learner("zero_shot", tiny, DATA.classnames, ("a photo of a {}.",)).eval()
    expected = zero_shot(torch.stack([tiny.preprocess(p) for p in images])).softmax(-1).detach()
    still = {"steps": 0, "alpha": 0.0, "negative_alpha": 0.0}
    for name, keys in {"tpt": ["steps"], "tda": ["alpha", "negative_alpha"]}.items():
        views = {"views": 1} if name == "tda" else {}
        adapter = build(name, tiny, **views, **{k: still[k] for k in keys})
        torch.testing.assert_close(adapter.predict(images).probs, expected, rtol=1e-3, atol=1e-5)


def test_tuning_equals_the_obvious_loop(tiny: Backbone, images: list[Image.Image]) -> None:
    adapter = build("tpt", tiny, steps=2, share=0.5)
    got = adapter.predict(images[0])
    pixels = adapter.plan.make(open_images(images[0], tiny)[0], tiny)
    coop = create_learner("coop", tiny, DATA.classnames, init="a photo of a").train()
    optimizer = torch.optim.AdamW(coop.parameters(), lr=5e-3)
    chosen = None
    for _ in range(2):
        before = dict(coop.named_parameters())["context"].detach().clone()
        text = tiny.text.encode_plain(coop.layout, coop.context, length=77)
        logits = tiny.logit_scale * tiny.encode_image(pixels) @ F.normalize(text, dim=-1).T
        chosen = entropies(logits).argsort()[:6] if chosen is None else chosen
        optimizer.zero_grad()
        marginal_entropy(logits[chosen]).backward()
        optimizer.step()
        moved = dict(coop.named_parameters())["context"].detach() - before + 5e-3 * 0.01 * before
        assert float(moved.abs().max()) < 2 * 5e-3
    torch.testing.assert_close(
        got.probs[0], coop.eval()(pixels[:1]).softmax(-1)[0].detach(), rtol=1e-3, atol=2e-4
    )


@pytest.mark.parametrize("name", ["mta", "zero"])
def test_views_that_all_show_the_same_say_what_one_says(
    name: str, tiny: Backbone, images: list[Image.Image]
) -> None:
    pixels = torch.stack([tiny.preprocess(p) for p in images])
    found = build(name, tiny).predict(pixels[:, None].expand(-1, 9, -1, -1, -1).contiguous())
    assert torch.equal(found.probs.argmax(-1), found.before.argmax(-1))
    if name == "mta":
        torch.testing.assert_close(found.probs, found.before, rtol=1e-3, atol=1e-5)
