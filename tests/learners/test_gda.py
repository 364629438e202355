"""GDA: the authors' numbers, scikit-learn's discriminant, and images that are truly left out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from tests.golden.text_learners import read_golden
from tests.golden.weights import filled
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.learners.gda import gaussian_classifier, left_out_scores

GOLDEN = read_golden("gda_small")
NAMES = ("dog", "cat", "bird", "fish", "tree")
DIM = 24


@pytest.fixture
def narrow(make_backbone: Callable[..., Backbone]) -> Backbone:
    """A backbone whose joint space is never entered: tests give features of the golden's width."""
    backbone = make_backbone()
    backbone.dim = DIM
    return backbone


def samples(shots: int, views: int, noise: float = 2.5) -> tuple[Tensor, Tensor]:
    """Return (V n, d) embeddings, view by view, and their labels, as the recipe of the golden values says."""
    labels = torch.arange(5 * shots) % 5
    images = filled("gda/centre", (5, DIM), 1.0)[labels]
    images = images + filled(f"gda/image/{shots}", (5 * shots, DIM), noise)
    parts = [images + filled(f"gda/view/{view}/{shots}", images.shape, 0.4) for view in range(views)]
    return torch.cat(parts), labels.repeat(views)


def validation(noise: float = 2.5) -> tuple[Tensor, Tensor]:
    labels = torch.arange(30) % 5
    return filled("gda/centre", (5, DIM), 1.0)[labels] + filled("gda/val", (30, DIM), noise), labels


def learner_on(backbone: Backbone, **options: Any) -> Any:
    """Return a learner whose zero-shot weights are the recipe's and whose tau is 100."""
    kind = type(create_learner("gda", backbone, NAMES))
    text = filled("gda/centre", (5, DIM), 1.0) + filled("gda/text", (5, DIM), 1.6)

    class OnFeatures(kind):  # type: ignore[valid-type, misc]
        def _zero_shot_logits(self, features: Tensor) -> Tensor:
            return 100.0 * features @ F.normalize(text, dim=-1).to(features.dtype).T

    return OnFeatures(backbone, NAMES, **options)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, narrow: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    learner = learner_on(narrow)
    history = learner.solve(samples(golden["shots"], golden["views"]), validation(), views=golden["views"])

    assert history == pytest.approx({name: golden[name] for name in ("alpha", "val_accuracy")})
    expected = torch.tensor(golden["weight_every_5th"])
    torch.testing.assert_close(learner.weight.flatten()[::5].detach(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learner.bias.detach(), torch.tensor(golden["bias"]), rtol=1e-4, atol=1e-4)

    logits = learner.logits(filled("gda/test", (4, DIM), 1.0)).detach().flatten()
    torch.testing.assert_close(logits, torch.tensor(golden["test_logits"]), rtol=1e-4, atol=1e-3)


def test_is_linear_discriminant_analysis(narrow: Backbone) -> None:
    """Balanced classes: scores less their mean are s (N - 1) / N times those of a discriminant shrunk by s."""
    embeddings, labels = samples(6, 2)
    features = F.normalize(embeddings.double(), dim=-1)
    solution = gaussian_classifier(features, labels, 5)
    assert solution is not None

    count = len(labels)
    shrinkage = DIM / (count - 1 + DIM)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.2] * 5)
    model.fit(features.numpy(), labels.numpy())

    test = F.normalize(filled("gda/test", (4, DIM), 1.0).double(), dim=-1)
    ours = test @ solution.weight.T + solution.bias
    theirs = torch.from_numpy(model.decision_function(test.numpy()))
    factor = shrinkage * (count - 1) / count
    torch.testing.assert_close(
        ours - ours.mean(-1, keepdim=True), factor * (theirs - theirs.mean(-1, keepdim=True))
    )


@pytest.mark.parametrize(("shots", "views"), [(2, 1), (3, 4), (7, 2)])
def test_left_out_scores_are_those_of_a_classifier_solved_without_the_image(shots: int, views: int) -> None:
    embeddings, labels = samples(shots, views)
    keep = labels != 3  # a class without samples
    keep[torch.arange(len(labels)) % (5 * shots) == 4] = False  # a class with one sample less
    features = F.normalize(embeddings.double(), dim=-1)[keep]
    labels = labels[keep]

    rows, scores = left_out_scores(features, labels, 5, views)
    images = len(labels) // views
    numbers = torch.arange(len(labels)) % images
    alone = shots == 2
    assert len(rows) == len(labels) - (views if alone else 0)  # the last image of its class can't be left out

    for row, score in zip(rows, scores, strict=True):
        rest = numbers != numbers[row]
        slow = gaussian_classifier(features[rest], labels[rest], 5)
        assert slow is not None
        torch.testing.assert_close(score, features[row] @ slow.weight.T + slow.bias, rtol=1e-9, atol=1e-9)


def test_the_order_of_views_and_of_images_changes_nothing(narrow: Backbone) -> None:
    embeddings, labels = samples(3, 4)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(2))
    other = embeddings.unflatten(0, (4, 15))[[2, 0, 3, 1]][:, order].flatten(0, 1)

    first, second = learner_on(narrow), learner_on(narrow)
    assert first.solve((embeddings, labels), None, views=4) == second.solve(
        (other, labels[:15][order].repeat(4)), None, views=4
    )
    torch.testing.assert_close(first.weight, second.weight)


def test_without_validation_the_images_left_out_choose(narrow: Backbone) -> None:
    """Views of an image are no independent samples: with them as such, alpha would look better than it is."""
    train = samples(4, 3)
    learner = learner_on(narrow)
    history = learner.solve(train, None, views=3)
    assert set(history) == {"alpha", "leave_one_out_accuracy"}

    as_images = learner_on(narrow).solve(train, None, views=1)
    assert as_images["leave_one_out_accuracy"] > history["leave_one_out_accuracy"]


def test_what_cannot_be_chosen_stays_and_is_said(narrow: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        learner = learner_on(narrow, alpha=0.3)
        assert learner.solve(samples(1, 2), None, views=2) == {"alpha": 0.3}
        assert "no validation data and no class with two training images, alpha stays 0.3" in caplog.text

        caplog.clear()
        assert learner_on(narrow, leave_one_out=False).solve(samples(3, 1), None) == {"alpha": 1.0}
        assert "no validation data, alpha stays 1" in caplog.text

    caplog.clear()
    assert learner_on(narrow, alphas=[]).solve(samples(3, 1), validation()) == {"alpha": 1.0}
    assert not caplog.text


def test_one_view_of_one_image_is_zero_shot(narrow: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    learner = learner_on(narrow)
    learner.solve(samples(1, 1), validation())
    assert "the result is zero-shot" in caplog.text
    test = filled("gda/test", (4, DIM), 1.0)
    torch.testing.assert_close(learner.logits(test), learner._zero_shot_logits(F.normalize(test, dim=-1)))


def test_a_class_without_samples_keeps_its_zero_shot_score(narrow: Backbone) -> None:
    embeddings, labels = samples(4, 1)
    keep = labels != 2
    learner = learner_on(narrow)
    learner.solve((embeddings[keep], labels[keep]), None)

    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(learner.weight[2], learner.weight[others].mean(0))
    test = filled("gda/test", (4, DIM), 1.0)
    features = F.normalize(test, dim=-1)
    gain = (learner.logits(test) - learner._zero_shot_logits(features)).detach()
    torch.testing.assert_close(gain[:, 2], gain[:, others].mean(-1), rtol=1e-4, atol=1e-4)
