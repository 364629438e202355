"""Classes may be divided among processes only where a step encodes the same sentences whatever its samples are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS, create_learner

NAMES = ("dog", "red circle", "hummingbird", "boeing 737-800")


@pytest.mark.parametrize("name", LEARNERS.names())
def test_the_sentences_of_a_step_do_not_depend_on_its_samples(
    name: str, backbone: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = create_learner(name, backbone, NAMES)
    if learner.prepares:
        learner.prepare(backbone.image_embeddings(images)[None], torch.arange(len(images)) % len(NAMES))
    assert learner.divides_classes

    seen: list[tuple[tuple[tuple[int, ...], ...], int]] = []
    encode = backbone.text.encode

    def watched(layout, context=None, deep=None, adapters=None, offsets=None):  # type: ignore[no-untyped-def]
        rows = (
            [deep] if isinstance(deep, Tensor) else list((deep or {}).values())
        )  # prompts of blocks by number
        groups = (context is not None and context.dim() == 3) or any(
            t.dim() == (4 if isinstance(deep, Tensor) else 3) for t in rows
        )
        if torch.is_grad_enabled() and not groups:
            seen.append((tuple(layout.sentences), -1 if context is None else len(context)))
        return encode(layout, context, deep, adapters, offsets)

    monkeypatch.setattr(backbone.text, "encode", watched)
    steps = []
    for rows in (slice(0, 4), slice(5, 6)):
        seen.clear()
        labels = torch.tensor([0, 1, 2, 3, 0, 1])[rows]
        losses = learner.train().loss(
            {"image": images[rows], "label": labels, "index": torch.arange(6)[rows]}
        )
        steps.append(([*seen], sorted(losses)))
    assert steps[0] == steps[1]
