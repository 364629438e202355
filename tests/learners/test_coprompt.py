"""CoPrompt against the authors' code, MaPLe where nothing is added, and which view and sentence it is held to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.trajectories import check_start, check_trajectory
from tests.golden.visual_learners import put
from tests.golden.weights import filled
from vlprompt import create_learner, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.classification.sources import TrainingSource
from vlprompt.data import Augmentation, FeatureCache
from vlprompt.training.options import TrainOptions

GOLDEN = read_golden("coprompt_small")
NAMES = ["dog", "red circle", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.fixture
def batch(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": torch.arange(6) % 3}


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    learner = create_learner(
        "coprompt", golden_backbone, GOLDEN["classnames"], [GOLDEN["template"]], **golden["options"]
    )
    spread = {"deep_context": 0.02}
    for name in learner.trainable_state():
        if name.startswith("projections"):
            spread[name] = 0.02 if name.endswith("bias") else 0.03
        elif "adapter" in name:
            spread[name] = 0.06
    put(case, spread, learner)

    close(filled("images", (4,), 1.0), GOLDEN["first_image_values"])
    shape = (3, 3, *golden_backbone.image_size)
    batch = {
        "image": filled("images", shape, 1.0),
        "second": filled("second", shape, 1.0),
        "label": torch.tensor(GOLDEN["labels"]),
    }
    check_start(golden, learner, batch)
    check_trajectory(golden["trajectory"], learner, batch, lr=0.0035)


def test_with_nothing_added_it_is_maple(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    maple = create_learner("maple", backbone, NAMES, depth=3).train()
    learner = create_learner(
        "coprompt", backbone, NAMES, depth=3, weight=0.0, image_ratio=0.0, text_ratio=0.0
    ).train()
    assert torch.equal(maple(batch["image"]), learner(batch["image"]))
    for model in (maple, learner):
        torch.stack(list(model.loss(batch).values())).sum().backward()
    own = dict(learner.named_parameters())
    for name, parameter in maple.learned_parameters().items():
        assert torch.equal(parameter.grad, own[name].grad)


def test_an_adapter_is_mixed_into_each_embedding(backbone: Backbone, images: Tensor) -> None:
    maple = create_learner("maple", backbone, NAMES, depth=3)
    learner = create_learner("coprompt", backbone, NAMES, depth=3, image_ratio=0.3, text_ratio=0.6)
    for mine, plain, adapter, ratio in (
        (learner.embed_images(images), maple.embed_images(images), learner.image_adapter, 0.3),
        (learner.class_embeddings(), maple.class_embeddings(), learner.text_adapter, 0.6),
    ):
        first, last = adapter[0].weight, adapter[2].weight
        expected = ratio * torch.relu(torch.relu(plain @ first.T) @ last.T) + (1 - ratio) * plain
        torch.testing.assert_close(mine, expected)


def test_one_sentence_a_step_is_drawn_for_all_classes(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    templates = ["a photo of a {}.", "itap of a {}.", "the origami {}."]
    learner = create_learner("coprompt", backbone, NAMES, templates, weight=1.0).train()
    weights = learner.class_weights()
    expected = []
    for template in templates:
        texts = backbone.encode_text([template.format(name) for name in NAMES])
        expected.append(round((1 - F.cosine_similarity(weights, texts).mean()).item(), 5))
    torch.manual_seed(0)
    found = [round(learner.loss(batch)["consistency_text"].item(), 5) for _ in range(20)]
    assert sorted(set(found)) == pytest.approx(sorted(expected), abs=2e-5)
    learner.eval()
    assert learner.loss(batch)["consistency_text"].item() == pytest.approx(expected[0], abs=2e-5)


@pytest.mark.parametrize("views", [0, 3])
def test_the_frozen_tower_sees_another_view(backbone: Backbone, views: int) -> None:
    """A run's batches hold each image's next view, or what the frozen tower makes of it where views come again."""
    train = load_dataset("digits", "train", shots=1, seed=1)
    learner = create_learner("coprompt", backbone, train.classnames, weight=1.0)
    options = TrainOptions(batch_size=4, seed=5)
    source = TrainingSource(learner, train, Augmentation("crop_flip"), views, options, FeatureCache(None))
    batches = source.batches(states=[])
    rows = np.array([2, 0, 3])
    for epoch in (0, 2):
        batch, following = batches.fetch(rows, epoch), batches.fetch(rows, epoch + 1)
        frozen = backbone.image_embeddings(following["image"])
        if views:
            torch.testing.assert_close(batch["frozen"], frozen, rtol=0, atol=1e-4)
        else:
            assert torch.equal(batch["second"], following["image"])
        apart = learner.eval().loss(batch)["consistency_image"]
        own = F.normalize(learner.embed_images(batch["image"]), dim=-1)
        expected = 1 - (own * F.normalize(frozen, dim=-1)).sum(-1).mean()
        torch.testing.assert_close(apart, expected, rtol=1e-3, atol=1e-5)
