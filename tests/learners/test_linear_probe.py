"""The linear probe is scikit-learn's logistic regression, with its strength chosen on validation data alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vlprompt import fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.learners import Learner, create_learner
from vlprompt.learners.linear_probe import LinearProbe

Samples = tuple[Tensor, Tensor]
NAMES = ("dog", "cat", "bird", "fish")


def samples(backbone: Backbone, seed: int, count: int, classes: int = 4, noise: float = 3.0) -> Samples:
    """Clouds around one centre per class, with float32 embeddings as a tower gives them."""
    centres = torch.randn(classes, backbone.dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return centres[labels] + noise * torch.randn(count, backbone.dim, generator=generator), labels


def probabilities(learner: Learner, embeddings: Tensor) -> np.ndarray:
    with torch.no_grad():
        return learner.logits(embeddings).softmax(-1).numpy()


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_equals_scikit_learn(backbone: Backbone, classes: int) -> None:
    train, test = samples(backbone, 1, 40, classes), samples(backbone, 2, 30, classes)
    learner = create_learner("linear_probe", backbone, NAMES[:classes])
    found = learner.solve(train, None)
    assert found == {"C": 1.0, "val_accuracy": None}
    direct = LogisticRegression(C=1.0, max_iter=1000).fit(train[0].numpy(), train[1].numpy())
    expected = direct.predict_proba(test[0].numpy())
    np.testing.assert_allclose(probabilities(learner, test[0]), expected, rtol=0, atol=1e-5)


def test_strength_is_chosen_on_validation_data(backbone: Backbone) -> None:
    train, val = samples(backbone, 1, 40), samples(backbone, 2, 400)
    learner = create_learner("linear_probe", backbone, NAMES)
    found = learner.solve(train, val)

    def score(strength: float) -> float:
        model = LogisticRegression(C=strength, max_iter=1000).fit(train[0].numpy(), train[1].numpy())
        return float(model.score(val[0].numpy(), val[1].numpy()))

    assert found["val_accuracy"] == score(found["C"])
    assert all(found["val_accuracy"] >= score(10.0**power) for power in range(-6, 7, 2))
    assert score(1.0) < found["val_accuracy"], "these data should want another strength than the default"
    wrong = val[0], (val[1] + 1) % 4
    assert learner.solve(train, wrong)["C"] != found["C"], "validation labels made no difference"


def test_what_is_fitted_comes_from_the_training_samples_alone(backbone: Backbone) -> None:
    train, val = samples(backbone, 1, 40), samples(backbone, 2, 40)
    learner = create_learner("linear_probe", backbone, NAMES)
    strength = learner.solve(train, val)["C"]
    direct = LogisticRegression(C=strength, max_iter=1000).fit(train[0].numpy(), train[1].numpy())
    np.testing.assert_allclose(learner.weight.detach().numpy(), direct.coef_, rtol=0, atol=1e-5)
    again = create_learner("linear_probe", backbone, NAMES)
    again.solve(train, val)
    assert torch.equal(again.weight, learner.weight)


@pytest.mark.parametrize("shown", [[0, 1, 3], [1, 2]])
def test_a_class_without_samples_never_wins(backbone: Backbone, shown: list[int]) -> None:
    embeddings, labels = samples(backbone, 1, 60, noise=0.5)
    keep = torch.isin(labels, torch.tensor(shown))
    learner = create_learner("linear_probe", backbone, NAMES)
    learner.solve((embeddings[keep], labels[keep]), None)
    hidden = [c for c in range(4) if c not in shown]
    assert float(probabilities(learner, embeddings)[:, hidden].max()) < 1e-6
    guess = learner.logits(embeddings).argmax(-1)
    assert set(guess.tolist()) == set(shown)
    assert bool((guess[keep] == labels[keep]).all())


def test_one_class_is_no_classifier(backbone: Backbone) -> None:
    embeddings, labels = samples(backbone, 1, 8)
    learner = create_learner("linear_probe", backbone, NAMES)
    with pytest.raises(DataError, match="at least two classes"):
        learner.solve((embeddings, torch.zeros_like(labels)), None)


def test_without_validation_data_it_says_that_nothing_was_chosen(
    backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    create_learner("linear_probe", backbone, NAMES).solve(samples(backbone, 1, 8), None)
    assert "linear_probe: there are no validation data, C stays 1." in caplog.text


def test_evaluation_follows_a_new_solution(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("linear_probe", backbone, NAMES).eval()
    with torch.no_grad():
        assert float(learner(images).abs().max()) == 0
        learner.solve(samples(backbone, 1, 40), None)
        assert float(learner(images).abs().max()) > 0


class Recorder(LinearProbe):
    """A solver that notes what it is called with."""

    def solve(self, train: Samples, val: Samples | None, seed: int = 1, views: int = 1) -> dict[str, Any]:
        self.call = (train, val, seed, views)
        return {}


def test_a_solver_gets_every_view_and_how_many_there_are(backbone: Backbone) -> None:
    """Rows come view by view: the n images, then the n images again."""
    data = load_dataset("digits", "train", shots=2, seed=1)
    learner = Recorder(backbone, data.classnames)
    fit(learner, data, augmentation="crop_flip", views=3, seed=7)

    (embeddings, labels), val, seed, views = learner.call
    assert (val, seed, views) == (None, 7, 3)
    assert embeddings.shape == (60, backbone.dim)
    assert labels.tolist() == list(data.labels) * 3
