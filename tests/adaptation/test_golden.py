"""What adapters compute equals what the authors' code computes (the recipes stand in the JSON files)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.weights import filled
from vlprompt import create_adapter, create_learner
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation.promptalign import PromptAlign, SourceStatistics
from vlprompt.adaptation.selection import cosine_then_entropy
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.backbones.vision import VisualPrompts

GOLDEN = read_golden("tpt_small")


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.fixture(scope="module")
def views() -> torch.Tensor:
    close(filled("images", (4,), 1.0), GOLDEN["first_image_values"])
    return filled("tpt/views", (2, 20, 3, 64, 64), 1.0)


def build(case: str, backbone: Backbone, **options: Any) -> PromptAdapter:
    golden = GOLDEN["cases"][case]
    start: Any = backbone
    if case == "from_coop":
        start = create_learner("coop", backbone, GOLDEN["classnames"], context_length=4)
        start.load_trainable_state({"context": filled("tpt/coop/ctx", (4, 128), 0.02)})
    adapter = create_adapter(golden["adapter"], start, GOLDEN["classnames"], **golden["options"], **options)
    assert isinstance(adapter, PromptAdapter)
    return adapter


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(
    case: str, together: int, golden_backbone: Backbone, views: torch.Tensor
) -> None:
    adapter = build(case, golden_backbone, together=together)
    images = GOLDEN["cases"][case]["images"]
    predictions = adapter.predict(views)
    for i, expected in enumerate(images):
        assert predictions.kept[i].nonzero()[:, 0].tolist() == expected["kept"]
        close(predictions.before[i], torch.tensor(expected["before"]).softmax(-1).tolist())
        close(predictions.probs[i], torch.tensor(expected["logits"]).softmax(-1).tolist())
    tuned = adapter.tuner.tune(
        adapter.backbone.image_embeddings(views.flatten(0, 1)).unflatten(0, (2, 20)), predictions.kept
    )
    # AdamW divides a gradient by its own size, and by more than rounding where it is almost nothing.
    for i, expected in enumerate(images):
        close(tuned.logits[i] / 10, [x / 10 for x in expected["logits"]])  # of size 10, so five digits
        close(tuned.prompts["context"][i].flatten()[::7], expected["context"])


def test_chosen_views_are_the_authors() -> None:
    fixed = GOLDEN["fixed_logits"]
    logits = filled("difftpt/logits", fixed["shape"], fixed["std"])
    near = cosine_then_entropy(logits, logits, 0.8, 1.0)
    assert near.nonzero()[:, 0].tolist() == fixed["near"]
    assert len(fixed["near"]) == 102
    mask = cosine_then_entropy(logits, logits, 0.8, 0.3)
    assert mask.nonzero()[:, 0].tolist() == fixed["kept"]
    assert len(fixed["kept"]) == 30


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_alignment_is_the_authors(layers: int, tokenizer: TextTokenizer) -> None:
    golden = read_golden("promptalign_small")
    backbone = small_clip(golden, tokenizer)
    shape = (2, 4, 19, 128)
    means = filled("promptalign/means", shape, 0.5)
    variances = filled("promptalign/variances", shape, 0.2, 1.0)
    # The recipe's statistics of what enters the blocks; those of what leaves them are not looked at.
    statistics = SourceStatistics(means, variances, backbone.fingerprint["id"])
    learner = create_learner("maple", backbone, GOLDEN["classnames"], depth=3)
    adapter = create_adapter("promptalign", learner, statistics=statistics, layers=layers)
    assert isinstance(adapter, PromptAlign)

    tokens = filled("promptalign/tokens", (3, 2, 128), 0.02).requires_grad_()
    views = filled("promptalign/views", (5, 3, 64, 64), 1.0)[golden["selected"]]
    _, distance = adapter.aligned(lambda: backbone.vision.encode(views, VisualPrompts(tokens, "append")))
    distance.backward()

    expected = golden["cases"][str(layers)]
    assert float(distance.detach()) == pytest.approx(expected["loss"], rel=1e-5)
    close(tokens.grad.flatten()[::13], expected["gradient"])
