"""PromptSRC against the authors' code: its losses, its teacher, and an average of prompts alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import read_golden, small_clip
from tests.golden.visual_learners import agree, check_gradients, put
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.data import ImageDataset
from vlprompt.learners import Learner
from vlprompt.learners._templates import IMAGENET_TEMPLATES
from vlprompt.learners.promptsrc import gaussian_weights
from vlprompt.training.callbacks import Callback, TrainingView

GOLDEN = read_golden("promptsrc_small")
NAMES = ["dog", "red circle", "hummingbird"]
RECIPE = {"epochs": 4, "batch_size": 5, "lr": 0.02, "warmup_epochs": 0}


class StoppedError(Exception):
    """Ends a run in the middle."""


class Watch(Callback):
    """Keeps the prompts of every epoch, and may stop after one."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.stop_after = stop_after

    def on_epoch(self, trainer: TrainingView, record: dict[str, float]) -> None:
        self.states.append({n: t.clone() for n, t in trainer.module.trainable_state().items()})

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        if self.stop_after is not None and len(self.states) > self.stop_after:
            raise StoppedError


@pytest.fixture
def train() -> ImageDataset:
    return load_dataset("digits", "train", shots=1, seed=1)


def learner_for(backbone: Backbone, train: ImageDataset) -> Learner:
    return create_learner(
        "promptsrc", backbone, train.classnames, teacher="templates", average_mean=3.0, average_std=1.5
    )


def test_losses_and_gradients_equal_the_authors_code(tokenizer: TextTokenizer) -> None:
    golden = GOLDEN["cases"]["4+4"]
    learner = create_learner(
        "promptsrc", small_clip(GOLDEN, tokenizer), GOLDEN["classnames"], **golden["options"]
    ).train()
    put("4+4", {"deep_context": 0.02, "visual": 0.02}, learner)
    images = filled("images", (3, 3, *learner.backbone.image_size), 1.0)
    losses = learner.loss({"image": images, "label": torch.tensor(GOLDEN["labels"])})
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert list(losses) == list(golden["losses"])
    for name, value in golden["losses"].items():
        agree(name, losses[name], torch.tensor(value), 1e-4)
    agree("loss", total, torch.tensor(golden["loss"]), 1e-4)
    agree("logits", learner(images), torch.tensor(golden["logits"]), 1e-4)
    agree("teacher", learner.teacher_weights()[:, ::8], torch.tensor(golden["teacher_weights"]), 1e-4)
    check_gradients(golden["gradients"], learner)


@pytest.mark.parametrize("golden", GOLDEN["averaging"])
def test_weights_of_the_average_equal_the_authors(golden: dict[str, float]) -> None:
    weights = gaussian_weights(golden["epochs"], golden["mean"], golden["std"])
    agree("weights", weights, torch.tensor(golden["weights"], dtype=torch.float64), 1e-7)


def test_weights_sum_to_one_where_densities_underflow() -> None:
    weights = gaussian_weights(3, 200.0, 1.0)
    assert weights.sum() == pytest.approx(1.0)
    assert weights.argmax() == 2


def test_training_ends_with_the_gaussian_average_of_prompts_only(
    backbone: Backbone, train: ImageDataset
) -> None:
    frozen = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    learner, watch = learner_for(backbone, train), Watch()
    fit(learner, train, callbacks=[watch], **RECIPE)
    densities = torch.exp(-0.5 * ((torch.arange(1.0, 5.0) - 3.0) / 1.5) ** 2)
    shares = densities / densities.sum()
    for name, tensor in learner.trainable_state().items():
        expected = sum(s * state[name] for s, state in zip(shares, watch.states, strict=True))
        torch.testing.assert_close(tensor, expected)
        assert not torch.equal(tensor, watch.states[-1][name])
    assert all(torch.equal(t, frozen[n]) for n, t in backbone.model.state_dict().items())


def test_the_average_survives_an_interruption(
    backbone: Backbone, train: ImageDataset, tmp_path: Path
) -> None:
    whole, halved = learner_for(backbone, train), learner_for(backbone, train)
    fit(whole, train, callbacks=[], folder=tmp_path / "whole", **RECIPE)
    every_epoch = {**RECIPE, "checkpoint_seconds": 0}
    with pytest.raises(StoppedError):
        fit(halved, train, callbacks=[Watch(stop_after=1)], folder=tmp_path / "halved", **every_epoch)
    again = learner_for(backbone, train)
    fit(again, train, callbacks=[], folder=tmp_path / "halved", resume=True, **every_epoch)
    for name, tensor in whole.trainable_state().items():
        assert torch.equal(again.trainable_state()[name], tensor)


def test_without_averaging_the_last_prompts_stay(backbone: Backbone, train: ImageDataset) -> None:
    learner = create_learner("promptsrc", backbone, train.classnames, teacher="templates", average=False)
    watch = Watch()
    fit(learner, train, callbacks=[watch], **{**RECIPE, "epochs": 2})
    for name, tensor in learner.trainable_state().items():
        assert torch.equal(tensor, watch.states[-1][name])


def test_the_teacher_averages_features_before_or_after_normalising(backbone: Backbone) -> None:
    assert len(set(IMAGENET_TEMPLATES)) == 60
    features = torch.stack([backbone.text.encode_strings([t.format("dog") for t in IMAGENET_TEMPLATES[:5]])])[
        0
    ]
    options = {"templates": IMAGENET_TEMPLATES[:5], "teacher": "templates"}
    published = create_learner("promptsrc", backbone, NAMES, **options)
    first = create_learner("promptsrc", backbone, NAMES, normalise_first=True, **options)
    torch.testing.assert_close(published.teacher_weights()[0], F.normalize(features.mean(0), dim=0))
    expected = F.normalize(F.normalize(features, dim=-1).mean(0), dim=0)
    torch.testing.assert_close(first.teacher_weights()[0], expected)
    torch.testing.assert_close(first.teacher_weights(), backbone.class_weights(NAMES, IMAGENET_TEMPLATES[:5]))


def test_the_teacher_is_frozen_exact_and_asked_once(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("promptsrc", backbone, NAMES).train()
    batch = {"image": images, "label": torch.arange(6) % 3}
    learner.loss(batch)
    kept = learner.teacher_weights()
    learner.loss(batch)
    assert learner.teacher_weights() is kept
    assert not kept.requires_grad
    exact = create_learner("promptsrc", backbone, NAMES).teacher_weights()
    torch.testing.assert_close(kept, exact)
    other = learner.with_classes(["ring", "cross"])
    assert other.teacher_weights().shape[0] == 2
