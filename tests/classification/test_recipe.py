"""What is trained where nobody says how: the paper's options, or a search on held-back shots."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vlprompt import create_backbone, create_learner, evaluate, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.classification.config import ClassificationConfig, load_config
from vlprompt.classification.recipe import find_recipe, hold_back
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.experiments.config import compose
from vlprompt.experiments.tasks import run
from vlprompt.learners import LEARNERS, Learner
from vlprompt.learners.recipe import Recipe
from vlprompt.training.options import TrainOptions


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def shots() -> ImageDataset:
    return load_dataset("digits", "train", shots=8, seed=1)


@pytest.fixture(scope="module")
def cache() -> FeatureCache:
    return FeatureCache()


def learner_of(name: str, backbone: Backbone, data: ImageDataset) -> Learner:
    return create_learner(name, backbone, data.classnames, data.templates)


def test_a_quarter_of_the_shots_is_held_back_by_class_and_seed(shots: ImageDataset) -> None:
    kept, held = hold_back(shots, seed=1)
    assert np.bincount(kept.labels).tolist() == [6] * 10
    assert np.bincount(held.labels).tolist() == [2] * 10
    keys = {shots.key(i) for i in range(len(shots))}
    assert {part.key(i) for part in (kept, held) for i in range(len(part))} == keys
    assert hold_back(shots, seed=1)[1].labels == held.labels
    again = hold_back(shots, seed=2)[1]
    assert {again.key(i) for i in range(20)} != {held.key(i) for i in range(20)}


def test_a_class_with_one_sample_keeps_it() -> None:
    data = load_dataset("digits", "train", shots=1, seed=1)
    kept, held = hold_back(data, seed=1)
    assert (len(kept), len(held)) == (10, 0)


@pytest.mark.parametrize("name", ["clip_adapter", "cones"])
def test_without_options_a_learner_beats_zero_shot(
    name: str, tiny: Backbone, shots: ImageDataset, cache: FeatureCache
) -> None:
    test = load_dataset("digits", "test")
    baseline = evaluate(learner_of("zero_shot", tiny, shots), test, cache=cache)["accuracy"]
    learner = learner_of(name, tiny, shots)
    result = fit(learner, shots, cache=cache, callbacks=())
    assert evaluate(learner, test, cache=cache)["accuracy"] > baseline + 0.05
    assert result.metrics["recipe/accuracy"] >= result.metrics["recipe/zero_shot_accuracy"]
    assert result.metrics["recipe/lr"] > learner.recipe.train["lr"]


def test_the_search_is_a_function_of_the_seed(
    tiny: Backbone, shots: ImageDataset, cache: FeatureCache
) -> None:
    states = []
    for _ in range(2):
        learner = learner_of("clip_adapter", tiny, shots)
        fit(learner, shots, cache=cache, callbacks=(), seed=3)
        states.append(learner.trainable_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_trials_of_the_search_warn_of_nothing(
    tiny: Backbone, shots: ImageDataset, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    level = logging.getLogger("vlprompt").level
    rates: list[float] = []

    def warn(
        learner: Learner, train: ImageDataset, val: ImageDataset | None, options: Mapping[str, Any]
    ) -> None:
        rates.append(options["lr"])
        logging.getLogger("vlprompt.learners").warning("raise train.lr")

    learner = learner_of("coop", tiny, shots)
    find_recipe(learner, shots, None, 1, cache, warn)
    assert len(rates) == len(learner.recipe.factors) + 2
    assert "raise train.lr" not in caplog.text
    assert logging.getLogger("vlprompt").level == level


def test_options_are_taken_as_they_are_given(
    tiny: Backbone, shots: ImageDataset, cache: FeatureCache
) -> None:
    learner = learner_of("clip_adapter", tiny, shots)
    result = fit(learner, shots, cache=cache, callbacks=(), epochs=1, lr=0.001)
    assert "recipe/lr" not in result.metrics
    assert len(result.history) == 1

    result = fit(learner, shots, cache=cache, callbacks=(), recipe="auto", epochs=2)
    assert len(result.history) == 2
    assert "recipe/lr" in result.metrics


def test_the_papers_options_are_used_on_the_papers_backbones(
    shots: ImageDataset, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a backbone that says that it is OpenAI's ViT-B/16 nothing is searched."""
    backbone = create_backbone("tiny")
    monkeypatch.setitem(backbone.fingerprint, "architecture", "ViT-B-16")
    monkeypatch.setitem(backbone.fingerprint, "pretrained", "openai")
    learner = learner_of("clip_adapter", backbone, shots)
    result = fit(learner, shots, cache=cache, callbacks=())
    assert "recipe/lr" not in result.metrics
    assert len(result.history) == learner.recipe.train["epochs"]


def test_epochs_of_papers_follow_the_shots() -> None:
    recipe = Recipe({"lr": 0.1}, epochs_by_shots=((1, 50), (2, 100), (8, 200)))
    epochs = [recipe.paper_options(shots)["epochs"] for shots in (1, 2, 4, 8, 16)]
    assert epochs == [50, 100, 100, 200, 200]

    # CLIP-LoRA: 500 steps for each shot.
    assert Recipe(steps_per_shot=500).paper_options(4)["steps"] == 2000


def test_a_length_that_is_given_replaces_the_paper_s(
    tiny: Backbone, shots: ImageDataset, cache: FeatureCache
) -> None:
    learner = learner_of("coop", tiny, shots)
    learner.recipe = Recipe({"lr": 0.002}, steps_per_shot=500)  # type: ignore[misc]  # this learner's alone
    result = fit(learner, shots, cache=cache, callbacks=(), recipe="paper", epochs=2)
    assert len(result.history) == 2


@pytest.mark.parametrize("name", LEARNERS.names())
def test_recipes_are_valid_training_options(name: str) -> None:
    recipe = LEARNERS.get(name).target.recipe
    TrainOptions(**recipe.paper_options(16))


def test_what_needs_validation_data_says_so_and_holds_shots_back(
    tiny: Backbone, shots: ImageDataset, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    learner = learner_of("tip_adapter", tiny, shots)
    with caplog.at_level(logging.WARNING, logger="vlprompt.run"):
        result = fit(learner, shots, cache=cache, callbacks=())
    assert "20 of 80 shots are held back" in caplog.text
    assert "chosen/alpha" in result.metrics

    validation = load_dataset("digits", "val", shots=4, seed=1)
    caplog.clear()
    fit(learner_of("tip_adapter", tiny, shots), shots, validation, cache=cache, callbacks=())
    assert "held back" not in caplog.text


def test_a_file_without_a_train_section_has_the_recipe() -> None:
    raw = {"task": "classification", "learner": {"name": "coop"}}
    config = ClassificationConfig.parse(raw, {}, "here")
    assert config.train.options() == {"recipe": "auto"}
    (study,) = config.studies()
    assert study.config.train.options() == {"recipe": "auto"}

    stated = ClassificationConfig.parse({**raw, "train": {"lr": 0.1}}, {}, "here").train.options()
    assert stated["lr"] == 0.1
    assert stated["recipe"] == "none"
    assert stated["epochs"] == 50


def test_the_shipped_comparison_has_every_learner_without_any_option() -> None:
    for name in ("compare_defaults_tiny.yaml", "compare_defaults_photos.yaml"):
        studies = load_config(name).studies()
        assert sorted(study.method for study in studies) == LEARNERS.names()
        assert all(study.config.train.options() == {"recipe": "auto"} for study in studies)
        assert all(study.config.learner_options == {} for study in studies)
        assert all(study.config.data.validate_on == "none" for study in studies)


@pytest.mark.slow
def test_the_comparison_in_small_shows_learners_above_zero_shot(tmp_path: Path) -> None:
    content = {
        **compose("compare_defaults_tiny.yaml"),
        "output": str(tmp_path),
        "methods": {"zero_shot": {}, "tip*": {}, "gda": {}, "zs_lp": {}, "lp_plus": {}},
        "expect": [],
    }
    cfg = tmp_path / "small.yaml"
    cfg.write_text(yaml.safe_dump(content))
    figures = run(cfg, ["data.name=digits"]).metrics
    for name in ("tip_adapter", "tip_adapter_f", "gda", "zs_lp", "lp_plus"):
        assert figures[f"{name}/accuracy"] > figures["zero_shot/accuracy"] + 0.05, name
