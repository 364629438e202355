"""Images with several labels: one sample each, whose loss is over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlprompt import fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.classification.evaluate import evaluate
from vlprompt.core.errors import ConfigError
from vlprompt.data import ImageDataset, Sample
from vlprompt.learners import create_learner
from vlprompt.learners._losses import binary_cross_entropy

QUICK = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "callbacks": []}


@pytest.fixture(scope="module")
def several() -> ImageDataset:
    return load_dataset("scenes/several", "train").subset(range(24))


def test_the_loss_is_that_of_a_slow_loop() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[1, 0, 1], [0, -1, 1], [-1, -1, -1], [0, 0, 0]])
    total = 0.0
    for row, truth in zip(logits.tolist(), target.tolist(), strict=True):
        losses = [math.log1p(math.exp(-z if y else z)) for z, y in zip(row, truth, strict=True) if y >= 0]
        total += sum(losses) / max(1, len(losses))
    assert float(binary_cross_entropy(logits, target)) == pytest.approx(total / 4, rel=1e-5)


def test_parts_of_a_batch_add_up() -> None:
    """Micro-batches are weighted by their samples, whatever is unknown in them."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, generator=generator)
    target = torch.randint(-1, 2, (6, 5), generator=generator)
    whole = binary_cross_entropy(logits, target)
    parts = 4 / 6 * binary_cross_entropy(logits[:4], target[:4]) + 2 / 6 * binary_cross_entropy(
        logits[4:], target[4:]
    )
    torch.testing.assert_close(whole, parts)


def test_an_image_is_one_sample_with_all_its_labels(several: ImageDataset) -> None:
    assert several.multi_label
    assert several.multi_hot().sum(1).tolist() == [len(sample.classes) for sample in several.samples]
    assert several.targets["target"] == several.multi_hot().tolist()
    assert len(several.one_label_each()) == several.multi_hot().sum()
    assert "target" not in several.one_label_each().targets


def test_unknown_labels_follow_the_classes() -> None:
    samples = (Sample("a", (0, 2), (1,)), Sample("b", (2,), (0, 1)), Sample("c", (1,), (2,)))
    data = load_dataset("scenes/several", "train")
    data = ImageDataset("x", "train", samples, ("p", "q", "r"), data.templates, data.reader)
    assert data.multi_hot().tolist() == [[1, -1, 1], [-1, -1, 1], [0, 1, -1]]
    assert data.keep_classes([2, 1]).multi_hot().tolist() == [[1, -1], [1, -1], [-1, 1]]


@pytest.mark.parametrize(
    ("options", "samples"),
    [({}, 24), ({"several_labels": "split"}, None), ({"several_labels": "together"}, 24)],
)
def test_fit_asks_the_loss_how(
    backbone: Backbone, several: ImageDataset, options: dict[str, str], samples: int | None
) -> None:
    learner = create_learner("coop", backbone, several.classnames, context_length=2)
    seen: list[dict[str, Tensor]] = []
    original = learner.loss
    learner.loss = lambda batch: (seen.append(dict(batch)), original(batch))[1]  # type: ignore[method-assign]
    fit(learner, several, **{**QUICK, "drop_last": False, **options})
    count = int(several.multi_hot().sum()) if samples is None else samples
    assert sum(len(batch["label"]) for batch in seen) == count
    assert all(("target" in batch) == (samples is not None) for batch in seen)


def test_a_loss_over_single_labels_gets_single_labels_or_refuses(
    backbone: Backbone, several: ImageDataset
) -> None:
    learner = create_learner("kgcoop", backbone, several.classnames)
    fit(learner, several, **QUICK)
    with pytest.raises(
        ConfigError, match="several_labels: kgcoop has a loss over single labels; write split"
    ):
        fit(learner, several, several_labels="together", **QUICK)


@pytest.mark.slow
def test_a_recipe_is_found_by_mean_average_precision(backbone: Backbone, several: ImageDataset) -> None:
    learner = create_learner("clip_adapter", backbone, several.classnames)
    result = fit(learner, several, seed=2, epochs=1, recipe="auto")
    assert result.metrics["recipe/lr"] > 0
    scores = evaluate(learner, several)
    assert scores["score"] == scores["map"]


def test_logits_of_one_label_are_counted_from_an_images_mean(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("zero_shot", backbone, ("dog", "cat", "bird"))
    logits = learner(images)
    alone = learner.label_logits(logits)
    torch.testing.assert_close(alone.mean(1), torch.zeros(len(images)), atol=1e-5, rtol=0)
    torch.testing.assert_close(alone - alone[:, :1], logits - logits[:, :1])
