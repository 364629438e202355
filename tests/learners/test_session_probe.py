"""The probe of each session where images are few."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import numpy_rng
from vlprompt.learners import create_learner
from vlprompt.learners._regression import regress

NAMES = ("dog", "red circle", "hummingbird", "boat")


def test_one_image_of_each_class_is_solved_at_the_plain_strength(backbone: Backbone) -> None:
    learner = create_learner("session_probe", backbone, NAMES)
    features, labels = torch.eye(4, backbone.dim), torch.arange(4)
    assert learner.solve((features, labels), None) == {"C": 1.0, "val_score": None}
    expected = regress(features.double(), labels, 0, 1000)
    assert torch.allclose(learner.class_weights()[:, :-1].double(), expected.weight, atol=1e-6)
    assert learner.logits(features).argmax(-1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("views", [1, 3])
def test_a_class_of_one_image_is_never_held_back(backbone: Backbone, views: int) -> None:
    """The others are held back as before: a quarter of all, by the same draw."""
    labels = torch.tensor([0] * 6 + [1, 2] + [3] * 8)
    order = numpy_rng(1, "held-back images").permutation(16)
    alone = {6, 7} & set(order[:4].tolist())
    features = F.one_hot(labels, backbone.dim).float().repeat(views, 1)
    learner = create_learner("session_probe", backbone, NAMES)
    found = learner.solve((features, labels.repeat(views)), None, views=views)
    assert alone, "the draw tries nothing"
    assert found["val_score"] == 1.0
