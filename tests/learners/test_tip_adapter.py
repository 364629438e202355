"""Tip-Adapter and Tip-Adapter-F: the authors' numbers, and a search that sees validation data only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load, load_dataset, save
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.data import Augmentation
from vlprompt.learners import Learner

GOLDEN = read_golden("tip_adapter_small")
NAMES = ["dog", "red circle", "hummingbird"]
BOTH = ("tip_adapter", "tip_adapter_f")


@dataclass(frozen=True)
class Validation:
    """Validation samples as a learner's calibrate sees them."""

    embeddings: Tensor
    labels: Tensor

    def validation_data(self) -> tuple[Tensor, Tensor]:
        return self.embeddings, self.labels


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


def filled_cache(name: str, backbone: Backbone, **options: Any) -> Learner:
    learner = create_learner(name, backbone, NAMES, **options)
    views = torch.randn(2, 5, backbone.dim, generator=torch.Generator().manual_seed(1))
    learner.prepare(views, torch.tensor([0, 0, 1, 2, 1]))
    return learner


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    images = filled("train", (12, 3, 64, 64), 1.0)
    views = [images + filled(f"train/{v}", images.shape, 1.0) / 2 for v in range(3)]
    val = images[[0, 2, 4, 6, 8, 10, 1, 3, 5, 7]] + 0.8 * filled("val", (10, 3, 64, 64), 1.0)
    encode = golden_backbone.image_embeddings
    embeddings = small_embeddings(GOLDEN, golden_backbone)

    names, options = GOLDEN["classnames"], golden["options"]
    learner = create_learner("tip_adapter_f", golden_backbone, names, golden["templates"], **options)
    learner.prepare(torch.stack([encode(v) for v in views]), torch.tensor(GOLDEN["train_labels"]))
    close(learner.keys.flatten()[::7], golden["keys_every_7th"])
    logits = learner.logits(embeddings)
    loss = F.cross_entropy(logits, torch.tensor(GOLDEN["labels"]))
    loss.backward()
    close(logits, golden["logits_at_start"])
    close(loss, golden["loss"])
    close(learner.keys.grad.norm(dim=-1), golden["key_gradient_norms"])
    close(learner.keys.grad.flatten()[::7], golden["key_gradient_every_7th"])

    chosen = learner.calibrate([Validation(encode(val), torch.tensor(GOLDEN["val_labels"]))])
    assert chosen == pytest.approx(golden["chosen"], abs=1e-6)
    close(learner.logits(embeddings), golden["logits_after_search"])


@pytest.mark.parametrize("name", BOTH)
def test_an_empty_cache_is_zero_shot(name: str, backbone: Backbone, images: Tensor) -> None:
    learner = create_learner(name, backbone, NAMES).eval()
    torch.testing.assert_close(learner(images), create_learner("zero_shot", backbone, NAMES).eval()(images))


def test_the_vote_is_the_paper_s_matrix_product(backbone: Backbone, images: Tensor) -> None:
    learner = filled_cache("tip_adapter", backbone, alpha=2.5, beta=3.0).eval()
    features = F.normalize(backbone.image_embeddings(images), dim=-1)
    values = F.one_hot(torch.tensor([0, 0, 1, 2, 1])).float()
    expected = backbone.logit_scale * features @ learner.class_weights().T
    expected = expected + 2.5 * torch.exp(-3.0 * (1 - features @ learner.keys.T)) @ values
    torch.testing.assert_close(learner(images), expected)


def test_fit_makes_keys_of_all_views_and_chooses_on_validation_only(backbone: Backbone) -> None:
    train, val = (load_dataset("digits", split, shots=2, seed=1) for split in ("train", "val"))
    learner = create_learner("tip_adapter", backbone, train.classnames, beta_steps=7, alpha_steps=5)
    result = fit(learner, train, val, augmentation="crop_flip", views=3, seed=4)

    views = [
        torch.stack(
            [
                Augmentation("crop_flip").augment(train[i][0], backbone.preprocess, 4, train.key(i), v)
                for i in range(len(train))
            ]
        )
        for v in range(3)
    ]
    mean = torch.stack([backbone.image_embeddings(v) for v in views]).mean(0)
    torch.testing.assert_close(learner.keys.detach(), F.normalize(mean, dim=-1), rtol=0, atol=1e-5)

    embeddings = backbone.image_embeddings(torch.stack([backbone.preprocess(image) for image, _ in val]))
    scores = {}
    for beta in (0.1 + i * 6.9 / 7 for i in range(7)):
        for alpha in (0.1 + i * 2.9 / 5 for i in range(5)):
            fixed = create_learner("tip_adapter", backbone, train.classnames, alpha=alpha, beta=beta)
            fixed.prepare(learner.keys[None], torch.tensor(train.labels))
            right = fixed.logits(embeddings).argmax(-1) == torch.tensor(val.labels)
            scores[alpha, beta] = float(right.float().mean())
    chosen = result.metrics["chosen/alpha"], result.metrics["chosen/beta"]
    best = max(scores.values())
    assert result.metrics["val/accuracy"] == pytest.approx(best)
    assert chosen == pytest.approx(next(pair for pair, score in scores.items() if score == best))


@pytest.mark.parametrize("name", BOTH)
def test_without_validation_the_published_values_stay(name: str, backbone: Backbone) -> None:
    train = load_dataset("digits", "train", shots=2, seed=1)
    learner = create_learner(name, backbone, train.classnames)
    result = fit(learner, train, epochs=1, callbacks=[])
    assert (float(learner.alpha), float(learner.beta)) == pytest.approx((1.17, 1.0))
    assert not [k for k in result.metrics if k.startswith("chosen/")]


def test_fine_tuning_starts_from_the_cache_and_moves_the_keys_alone(backbone: Backbone) -> None:
    train, val = (load_dataset("digits", split, shots=2, seed=1) for split in ("train", "val"))
    plain, tuned, still = (
        create_learner(n, backbone, train.classnames, alpha=3.0, beta_steps=5)
        for n in ("tip_adapter", "tip_adapter_f", "tip_adapter_f")
    )
    recipe = {"optimizer": "adamw", "lr": 0.01, "eps": 1e-4, "schedule": "cosine", "warmup_epochs": 0}
    fit(plain, train, val)
    fit(still, train, val, epochs=0)
    result = fit(tuned, train, val, epochs=5, batch_size=10, callbacks=[], **recipe)
    assert torch.equal(still.keys, plain.keys)
    assert not torch.equal(tuned.keys, plain.keys)
    assert torch.equal(tuned.values, plain.values)
    assert result.history[-1]["cross_entropy"] < result.history[0]["cross_entropy"]
    assert [n for n, p in tuned.named_parameters() if p.requires_grad] == ["keys"]
    assert not [n for n, p in plain.named_parameters() if p.requires_grad]


def test_a_resumed_run_ends_with_the_same_cache(backbone: Backbone, tmp_path: Path) -> None:
    train, val = (load_dataset("digits", split, shots=2, seed=1) for split in ("train", "val"))
    states = []
    for _ in range(2):
        learner = create_learner("tip_adapter_f", backbone, train.classnames, beta_steps=5)
        options = {"epochs": 2, "batch_size": 8, "select": "best", "callbacks": []}
        fit(learner, train, val, folder=tmp_path, resume=True, **options)
        states.append(learner.trainable_state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("name", BOTH)
def test_saved_and_loaded_it_votes_the_same(
    name: str, backbone: Backbone, images: Tensor, tmp_path: Path
) -> None:
    learner = filled_cache(name, backbone, alpha=2.0).eval()
    learner.calibrate([Validation(backbone.image_embeddings(images), torch.arange(6) % 3)])
    loaded = load(save(learner, tmp_path), backbone)
    assert torch.equal(loaded(images), learner(images))
    assert loaded.trainable_state().keys() == {"keys", "values", "alpha", "beta"}


BROKEN = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "values"}, "values is missing"),
    "unknown": (lambda s: {**s, "context": s["keys"]}, "context is unknown"),
    "narrow": (lambda s: {**s, "keys": s["keys"][:, :-1]}, "keys has shape"),
    "flat": (lambda s: {**s, "keys": s["keys"][0, 0]}, "keys has shape"),
    "short values": (lambda s: {**s, "values": s["values"][:-1]}, "values has shape"),
    "another class": (lambda s: {**s, "values": s["values"] + 1}, "classes outside 0 .. 2"),
    "no classes": (lambda s: {**s, "values": s["values"].float()}, "expected numbers of classes"),
    "vector alpha": (lambda s: {**s, "alpha": torch.ones(1)}, "alpha has shape"),
    "not finite": (lambda s: {**s, "beta": torch.tensor(float("nan"))}, "beta is not finite"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_states_that_do_not_fit_are_refused(what: str, backbone: Backbone) -> None:
    change, message = BROKEN[what]
    state = filled_cache("tip_adapter", backbone).trainable_state()
    with pytest.raises(CheckpointError, match=message):
        create_learner("tip_adapter", backbone, NAMES).load_trainable_state(change(state))


def test_a_filled_cache_takes_no_other_length(backbone: Backbone) -> None:
    learner = filled_cache("tip_adapter_f", backbone)
    kept = learner.keys
    learner.load_trainable_state(learner.trainable_state())
    assert learner.keys is kept  # an optimiser that holds the keys keeps holding them
    state = {k: v[:3] if v.dim() else v for k, v in learner.trainable_state().items()}
    with pytest.raises(CheckpointError, match=r"keys has shape \(3, 48\), expected \(5, 48\)"):
        learner.load_trainable_state(state)


def test_other_classes_are_refused(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="one set of parameters per class"):
        filled_cache("tip_adapter", backbone).with_classes(["ring", "cross"])
