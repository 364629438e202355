"""MMA: the authors' numbers, their gradient trick as a rate, sharing between towers, no stale texts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from tests.learners.twenty_steps import golden_images, train_twenty_steps
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import BackboneError
from vlprompt.learners import Learner

GOLDEN = read_golden("mma_small")
NAMES = ["dog", "red circle", "American staffordshire terrier"]
CONV = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


def golden_learner(backbone: Backbone, scale: float = 0.001) -> Learner:
    learner = create_learner("mma", backbone, GOLDEN["classnames"], width=8, scale=scale)
    with torch.no_grad():
        for name, parameter in learner.learned_parameters().items():
            parameter.copy_(filled(f"adapters/{name}", parameter.shape, 0.2))
    return learner.train()


@pytest.mark.parametrize("scale", GOLDEN["cases"])
def test_equals_the_authors_code(scale: str, golden_backbone: Backbone) -> None:
    """Their gradients are 1 / s times the true ones: a scaling of their own, which we leave to the rate."""
    golden = GOLDEN["cases"][scale]
    learner = golden_learner(golden_backbone, float(scale))
    small_embeddings(GOLDEN, golden_backbone)  # checks the recipe's images
    logits = learner(golden_images(learner))
    loss = F.cross_entropy(logits, torch.tensor(GOLDEN["labels"]))
    loss.backward()
    close(logits, golden["logits"])
    close(loss, golden["loss"])
    assert learner.learned_parameters().keys() == golden["scaled_gradients"].keys()
    for name, parameter in learner.learned_parameters().items():
        assert parameter.grad is not None
        expected = golden["scaled_gradients"][name]
        largest = max(1e-6, expected["norm"])
        scaled = parameter.grad / float(scale)
        assert float(scaled.norm()) == pytest.approx(expected["norm"], rel=1e-4)
        torch.testing.assert_close(
            scaled.flatten()[::61], torch.tensor(expected["every_61st"]), rtol=1e-4, atol=1e-4 * largest
        )


def test_twenty_steps_equal_the_authors_by_rate_and_decay(golden_backbone: Backbone) -> None:
    """lr / s and s wd, as in the recipe, do what their scaled gradients do."""
    golden = GOLDEN["run"]
    learner = golden_learner(golden_backbone, 0.1)
    losses = train_twenty_steps(
        learner, GOLDEN["labels"], lr=0.01 / 0.1, weight_decay=5e-4 * 0.1, momentum=0.9, optimizer="sgd"
    )
    assert losses == pytest.approx(golden["losses"], rel=1e-3)
    with torch.no_grad():
        logits = learner(golden_images(learner))
    expected = torch.tensor(golden["logits"])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)
    stale = torch.tensor(golden["logits_with_texts_of_step_10"])
    assert (expected - stale).abs().max() > 0.1  # what their code would say


def test_an_evaluation_in_between_leaves_no_stale_texts(golden_backbone: Backbone) -> None:
    learner = golden_learner(golden_backbone, 0.5)
    images = golden_images(learner)
    with torch.no_grad():
        learner.eval()(images)
        learner.train()
        for parameter in learner.text.parameters():
            parameter.add_(0.1)
        after = learner.eval()(images)
        learner._cached_weights = None
        assert torch.equal(learner(images), after)


def test_it_starts_near_zero_shot(backbone: Backbone, images: torch.Tensor) -> None:
    expected = create_learner("zero_shot", backbone, NAMES).eval()(images)
    with torch.no_grad():
        starts = [create_learner("mma", backbone, NAMES, scale=s).eval()(images) for s in (1e-3, 1e-4)]
    distances = [float((start - expected).abs().max()) for start in starts]
    assert 0 < distances[0] < 1
    assert distances[1] == pytest.approx(0.1 * distances[0], rel=0.1)  # O(s)


def test_towers_share_the_middle_layer_by_rank_from_the_top(
    make_backbone: Callable[..., Backbone], images: torch.Tensor
) -> None:
    backbone = make_backbone(text={"layers": 2}, vision={"layers": 4})
    learner = create_learner("mma", backbone, NAMES, depth=3)  # more than the text tower has
    assert len(learner.shared) == len(learner.text) == len(learner.vision) == 2
    assert learner.frozen_stages() == 1 + 2
    edits = learner._edits(learner.vision, 4)
    assert edits[:2] == [None, None]
    with torch.no_grad():
        plain = learner.eval()(images)
        for parameter in learner.shared[1].parameters():
            parameter.add_(1.0)
    texts = learner.class_embeddings()
    pictures = learner.embed_images(images)
    own = learner.shared[1].weight
    assert torch.autograd.grad(texts.sum(), own)[0].any()
    assert torch.autograd.grad(pictures.sum(), own)[0].any()
    assert not torch.equal(learner(images), plain)


def test_towers_it_can_t_stand_beside_are_refused(make_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(BackboneError, match="image tower's blocks can't be edited"):
        create_learner("mma", make_backbone(vision=CONV), NAMES)
