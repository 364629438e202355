"""Baselines on rows whose answer is known, and the whole table on few images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, DataError, UnknownNameError
from vlprompt.data import FeatureCache, load_dataset
from vlprompt.security.compositions import composition_dataset
from vlprompt.security.config import DetectorsConfig
from vlprompt.security.effect import Victim, attack_success, pixels_of, train_victim
from vlprompt.security.experiment import _Cell, compare_detectors
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


def test_zero_shot_asks_for_every_pair(backbone: Backbone, images: Tensor) -> None:
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
    from vlprompt.metrics.backdoor import judgement_metrics

    judged = scanner.judge(scanner.rows(val))
    figures = judgement_metrics(judged, val, scanner.threshold)
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


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return {
        "data": ["digits"],
        "seeds": [1],
        "output": str(tmp_path / "runs"),
        "detectors": {"zero_shot": {}, "narrow": {"name": "activation_clustering", "components": 3}},
        "pairs": {"triggers": ["clean", "blended", "sig"]},
        "variants": {"one trigger": {"triggers": ["clean", "sig"], "unseen": 0.0}},
        "suspect": {"epochs": 1, "cleaners": ["narrow", "zero_shot"], "rate": 0.2},
    }


@pytest.mark.slow
def test_a_table_is_written_and_continued(config: dict[str, Any]) -> None:
    outcome = compare_detectors(DetectorsConfig(**config))
    assert {"digits/zero_shot/auroc/seen", "digits/narrow/suspect/auroc"} <= set(outcome.metrics)
    victims = [k for k in outcome.metrics if k.endswith("/attack_success")]
    assert len(victims) == 6  # poisoned, cleaned by either, mended by zero_shot, perfectly cleaned, clean
    assert "digits/zero_shot, one trigger/auroc/sig" in outcome.metrics
    assert "digits/zero_shot, one trigger/auroc/blended" not in outcome.metrics
    assert "digits/narrow, one trigger/auroc/sig" not in outcome.metrics, "only the first scanner is varied"
    assert "| zero_shot, one trigger |" in outcome.table
    assert "| zero_shot |" in outcome.table
    assert "victim of the set cleaned by narrow" in outcome.table
    assert "victim of the set mended by narrow" not in outcome.table, "clusters name no object"
    sizes = [
        outcome.metrics[f"digits/victim of {v}/images"]
        for v in ("the set mended by zero_shot", "a clean set")
    ]
    assert sizes[0] == sizes[1], "mending loses no image"
    path = next((outcome.folder / "cells").iterdir())
    cell = json.loads(path.read_text())
    cell["zero_shot"]["auroc/seen"] = 0.125
    path.write_text(json.dumps(cell))
    again = compare_detectors(DetectorsConfig(**config), resume=True)
    assert again.metrics["digits/zero_shot/auroc/seen"] == 0.125


def test_a_variant_changes_its_pairs_and_nothing_else(config: dict[str, Any]) -> None:
    config["variants"] = {"few": {"copies": 1, "native_size": 64}, "none": {}}
    whole = DetectorsConfig(**config)
    few = whole.varied("few")
    assert (few.pairs.copies, few.pairs.native_size) == (1, 64)
    assert few.pairs.triggers == whole.pairs.triggers
    assert few.detectors == {"zero_shot, few": {"name": "zero_shot"}}
    assert few.suspect is None
    assert few.variants == {}, "a variant has none itself"
    assert whole.varied("none").pairs == whole.pairs
    assert whole.labels() == ["zero_shot", "narrow", "zero_shot, few", "zero_shot, none"]


def test_training_images_get_several_triggers_and_test_images_one(
    config: dict[str, Any], backbone: Backbone, tmp_path: Path
) -> None:
    config["pairs"]["unseen"] = 0.0
    cell = _Cell(DetectorsConfig(**config), backbone, "digits", 1, FeatureCache(tmp_path))
    assert len(cell.train) == 3 * len(cell.own), "clean and with each of two triggers"
    assert len(cell.val) == 2 * len(load_dataset("digits", "val"))
    assert len(cell.test) == 2 * len(load_dataset("digits", "test"))


def test_every_mistake_of_a_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "data: [scenes/shpe]\ndetectors: {dbom: {lerner: {}}, spectrl: {}}\npairs: {triggers: [badnets]}\n"
        "suspect: {cleaners: [linear_probe]}\nsplit: train\n"
        "variants: {few: {copies: 0, size: 8}, odd: {triggers: [badnets]}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        DetectorsConfig.read(path)
    text = str(caught.value)
    assert len(caught.value.problems) == 9
    for expected in (
        "detectors.dbom.lerner: unknown key; did you mean 'learner'?",
        "detectors.spectrl: unknown scanner 'spectrl'",
        "data: unknown data set 'scenes/shpe'",
        "pairs.triggers: a list of triggers begins with 'clean'",
        "suspect.cleaners: 'linear_probe' is none of the detectors",
        "split: figures are of val or test, got 'train'",
        "variants.few.copies: ",
        "variants.few.size: unknown key",
        "variants.odd.triggers: a list of triggers begins with 'clean'",
    ):
        assert expected in text
