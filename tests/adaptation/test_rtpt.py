"""R-TPT: every view answers as much as others agree with it, after prompts were tuned on single views."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.adaptation.test_adapters import NAMES, make_image
from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.weights import filled
from vlprompt import create_adapter, create_learner
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation.rtpt import neighbour_weights
from vlprompt.adaptation.views import open_images
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer

GOLDEN = read_golden("rtpt_small")


def test_one_view_answers_alone() -> None:
    assert torch.equal(neighbour_weights(torch.randn(3, 1, 8)), torch.ones(3, 1))


def test_identical_views_answer_alike() -> None:
    views = torch.randn(1, 8).expand(30, -1)
    torch.testing.assert_close(neighbour_weights(views), torch.full((30,), 1 / 30))


def test_an_outlier_hardly_answers() -> None:
    center = F.normalize(torch.ones(16), dim=0)
    noise = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    views = center + 0.05 * noise
    views[7] = -center
    weights = neighbour_weights(views)
    assert float(weights[7]) < 1e-20
    assert float(weights.sum()) == pytest.approx(1)


def test_weights_are_those_of_a_loop() -> None:
    views = torch.randn(25, 16, generator=torch.Generator().manual_seed(1)).double()
    scores = []
    for i in range(25):
        cosines = sorted(
            (float(F.cosine_similarity(views[i], views[j], dim=0)) for j in range(25) if j != i), reverse=True
        )
        scores.append(sum(cosines[:20]) / 20)
    expected = (torch.tensor(scores) / 0.01).softmax(0)
    torch.testing.assert_close(neighbour_weights(views.float()), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("start", ["backbone", "maple"])
def test_where_nothing_moves_all_views_vote_by_weight(start: str, backbone: Backbone) -> None:
    learner = create_learner("maple", backbone, NAMES, depth=2) if start == "maple" else backbone
    adapter = create_adapter("rtpt", learner, NAMES, views=12, augment="crop_flip", lr=0.0)
    images = [make_image(seed) for seed in range(3)]
    views = adapter.encode(open_images(images, adapter.backbone))
    got = adapter.predict(images).probs
    logits = adapter.view_logits(views.embeddings)
    weights = neighbour_weights(views.embeddings)
    for row in range(3):
        expected = sum(weights[row, k] * logits[row, k] for k in range(12)).softmax(-1)
        torch.testing.assert_close(got[row], expected, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_of_single_entropies(backbone: Backbone) -> None:
    adapter = create_adapter("rtpt", backbone, NAMES, views=4)
    assert isinstance(adapter, PromptAdapter)
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    got = adapter.loss(logits, mask, torch.zeros(0))
    for row in range(2):
        singles = [torch.distributions.Categorical(logits=z).entropy() for z in logits[row][mask[row]]]
        assert float(got[row]) == pytest.approx(float(torch.stack(singles).mean()), abs=1e-6)


def test_equals_the_authors_code(tokenizer: TextTokenizer) -> None:
    backbone = small_clip(GOLDEN, tokenizer)
    views = filled("rtpt/views", (2, 30, 3, 64, 64), 1.0)
    views[:, 1:] = 0.7 * views[:, :1] + 0.5 * views[:, 1:]
    adapter = create_adapter("rtpt", backbone, GOLDEN["classnames"], **GOLDEN["options"])
    assert isinstance(adapter, PromptAdapter)
    predictions = adapter.predict(views)
    embeddings = backbone.image_embeddings(views.flatten(0, 1)).unflatten(0, (2, 30))
    tuned = adapter.tuner.tune(embeddings, predictions.kept)
    for row, expected in enumerate(GOLDEN["images"]):
        assert predictions.kept[row].nonzero()[:, 0].tolist() == expected["kept"]
        close(neighbour_weights(embeddings[row]), expected["weights"])
        close(tuned.prompts["context"][row].flatten()[::7], expected["context"])
        close(predictions.probs[row], torch.tensor(expected["logits"]).softmax(-1).tolist())
