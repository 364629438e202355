"""Baselines on rows whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import load_dataset
from vlprompt.data.compositions import composition_dataset
from vlprompt.metrics.backdoor import verdict_metrics
from vlprompt.security.effect import Victim, attack_success, pixels_of, train_victim
from vlprompt.security.poison import PoisonPlan, poisoned
from vlprompt.security.scanners import SCANNERS, create_scanner, list_scanners


def spread(shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of two classes, a tenth of the first shifted far along one direction."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 12, generator=generator)
    labels = torch.arange(200) % 2
    bad = torch.zeros(200, dtype=torch.bool)
    bad[torch.arange(0, 200, 20)] = True
    rows[bad] += shift * torch.nn.functional.one_hot(torch.tensor(3), 12)
    return rows + 5 * labels[:, None], labels, bad


def test_all_scanners_are_there() -> None:
    assert list_scanners() == ["activation_clustering", "dbom", "linear_probe", "spectral", "zero_shot"]
    assert all(entry.paper and entry.summary for entry in SCANNERS)
    with pytest.raises(UnknownNameError, match="Did you mean 'spectral'"):
        create_scanner("spectrl", None, ["a", "b"])  # type: ignore[arg-type]


def test_spectral_finds_outliers_and_equals_its_definition(backbone: Backbone) -> None:
    scanner = create_scanner("spectral", backbone, ["a", "b"], rate=0.1)
    rows, labels, bad = spread(20.0)
    score = scanner.judge_set(rows, labels).score
    assert set((score >= scanner.threshold).nonzero()[:, 0].tolist()) >= set(bad.nonzero()[:, 0].tolist())
    assert int((score[labels == 0] >= scanner.threshold).sum()) == 15
    for label in (0, 1):
        x = rows[labels == label].double().numpy()
        x = x - x.mean(0)
        values, vectors = np.linalg.eigh(x.T @ x)
        strength = (x @ vectors[:, values.argmax()]) ** 2
        assert np.array_equal(np.argsort(strength), score[labels == label].argsort().numpy())
    with pytest.raises(DataError, match="whole labelled data set"):
        scanner.judge(rows)


def test_activation_clustering_suspects_the_small_cluster(backbone: Backbone) -> None:
    scanner = create_scanner("activation_clustering", backbone, ["a", "b"])
    rows, labels, bad = spread(20.0)
    suspected = scanner.judge_set(rows, labels).score >= scanner.threshold
    assert torch.equal(suspected[labels == 0], bad[labels == 0])
    with pytest.raises(DataError, match="whole labelled data set"):
        scanner.judge(rows)


def test_zero_shot_asks_for_every_composition(backbone: Backbone, images: Tensor) -> None:
    triggers = ["clean", "badnets", "sig"]
    scanner = create_scanner("zero_shot", backbone, ["dog", "cat"], triggers)
    judged = scanner.judge(backbone.image_embeddings(images))
    texts = ["a photo of a dog.", "a photo of a cat.", "a photo of a dog with a white patch.",
             "a photo of a cat with a white patch.", "a photo of a dog with a striped grating.",
             "a photo of a cat with a striped grating."]  # fmt: skip
    logits = backbone.logit_scale * backbone.encode_image(images) @ backbone.encode_text(texts).T
    probs = logits.softmax(-1)
    torch.testing.assert_close(judged.score, 1 - probs[:, :2].sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(judged.object[:, 1], probs[:, [1, 3, 5]].sum(1), rtol=0, atol=1e-5)


def test_the_linear_probe_separates_what_can_be_separated(backbone: Backbone) -> None:
    base = {split: load_dataset("digits", split).subset(range(0, 240, 4)) for split in ("train", "val")}
    train, val = (composition_dataset(base[s], ["clean", "blended"], unseen=0.0) for s in ("train", "val"))
    scanner = create_scanner("linear_probe", backbone, train.classnames, train.triggers)
    scanner.fit(train, val)
    judged = scanner.judge(scanner.rows(val))
    figures = verdict_metrics(judged, val, scanner.threshold)
    assert figures["auroc"] > 0.95
    assert figures["fpr"] <= 0.05
    assert "trigger_accuracy" not in figures


def test_a_victim_learns_the_attack_and_forgets_nothing_when_clean() -> None:
    train = load_dataset("digits", "train").subset(range(0, 898, 3))
    test = load_dataset("digits", "val").subset(range(0, 350, 6))
    plan = PoisonPlan(triggers=("sig",), rate=0.2, target=1)
    figures = {}
    for name, rate in (("poisoned", 0.2), ("clean", 0.0)):
        data = poisoned(train, plan.model_copy(update={"rate": rate}))
        victim = train_victim(pixels_of(data), torch.tensor(data.labels), 10, epochs=8)
        figures[name] = attack_success(victim, test, plan)
    assert figures["poisoned"]["attack_success/sig"] > 0.9
    assert figures["clean"]["attack_success"] < 0.5
    assert figures["clean"]["accuracy"] > 0.5


def test_a_victim_is_put_back_whole() -> None:
    victim, other = Victim(4, seed=1), Victim(4, seed=2)
    pixels = torch.rand(5, 3, 16, 16)
    other.load_trainable_state(victim.trainable_state())
    assert torch.equal(victim.predict(pixels), other.predict(pixels))
