"""Concepts in the place of a segmenter's phrases: the search, and experiments with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.segmentation import pairs_layouts as lay
from tests.segmentation.runs import read, run, write_config
from vlprompt import create_backbone
from vlprompt.concepts.embedding import Concepts
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data import load_segmentation
from vlprompt.data.segmentation.base import MaskDataset
from vlprompt.experiments.runner import RunOutcome
from vlprompt.segmentation import Segmenter, create_segmenter
from vlprompt.segmentation.concepts import (
    named,
    score_concepts,
    search_masks,
    segmenter_identity,
)
from vlprompt.segmentation.evaluate import evaluate_segmenter
from vlprompt.segmentation.protocols import concepts as protocol
from vlprompt.training.options import TrainOptions

TRAIN = TrainOptions(
    epochs=4, batch_size=4, optimizer="adamw", lr=0.02, weight_decay=0, schedule="constant", warmup_epochs=0
)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return create_segmenter("clipseg", create_backbone("tiny"), "zero_shot", weights="random")


@pytest.fixture(scope="module")
def data() -> MaskDataset:
    return load_segmentation("scenes/masks", "train", images=8, seed=1)


def test_a_search_that_starts_from_names_scores_as_names(segmenter: Segmenter, data: MaskDataset) -> None:
    none = TRAIN.model_copy(update={"epochs": 1, "lr": 1e-12})
    found = search_masks(segmenter, data, options=none)
    expected = evaluate_segmenter(segmenter, named(data), boundary=False).metrics
    scores = score_concepts(segmenter, found.module.concepts(), data)
    assert scores["dice"] == pytest.approx(expected["dice"], abs=1e-4)
    assert {s.phrase for s in named(data).samples} <= set(data.classnames)


def test_only_concepts_of_classes_that_are_shown_move(segmenter: Segmenter, data: MaskDataset) -> None:
    before = {n: p.clone() for n, p in segmenter.named_parameters()}
    found = search_masks(segmenter, data, options=TRAIN)
    losses = [record["loss"] for record in found.history]
    assert losses[-1] < losses[0]
    concepts = found.module.concepts
    moved = (concepts() - concepts.start).abs().sum((1, 2)) > 0
    assert set(moved.nonzero().flatten().tolist()) == {s.label for s in data.samples}
    assert all(torch.equal(p, before[n]) for n, p in segmenter.named_parameters())
    other = search_masks(segmenter, data, options=TRAIN, init="normal").module.concepts
    assert float((other.start - concepts.start).abs().max()) > 0.01


def test_the_second_stage_is_the_decoders(segmenter: Segmenter, data: MaskDataset) -> None:
    tuned = create_segmenter("clipseg", create_backbone("tiny"), "decoder", weights="random")
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    found = search_masks(tuned, data, options=TRAIN, unfreeze=["decoder.*norm*"])
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("norm" in n and n.startswith("decoder.") for n in changed)
    found.module.unfrozen.restore()
    assert all(torch.equal(p, before[n]) for n, p in tuned.named_parameters())
    with pytest.raises(ConfigError, match="strategy 'decoder'"):
        search_masks(segmenter, data, options=TRAIN, unfreeze=["decoder.*"])
    with pytest.raises(ConfigError, match="no parameter of the decoder; the towers stay frozen"):
        search_masks(tuned, data, options=TRAIN, unfreeze=["backbone.model.visual.ln_post.*"])
    tuned.requires_grad_(False)


def test_models_that_read_words_are_refused(data: MaskDataset) -> None:
    reader = create_segmenter("cris", create_backbone("tiny"), "zero_shot", weights="random")
    with pytest.raises(DataError, match="cris reads a phrase's words; a concept is one vector"):
        search_masks(reader, data, options=TRAIN)


def _config(folder: Path, **content: Any) -> Path:
    data = {"name": "scenes/masks", "validate_on": "val", **content.pop("data", {})}
    train = {"epochs": 1, "batch_size": 4, "optimizer": "adamw", "select": "best", "select_metric": "dice"}
    whole = {
        "task": "segmentation", "data": data, "train": train,
        "protocol": {"name": "concepts", "images": [6], "seeds": [1]},
        "second_stage": {"unfreeze": ["decoder.*"]},
    }  # fmt: skip
    return write_config(folder, {**whole, **content})


@pytest.fixture
def fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(name: str, split: str = "train", **options: Any) -> MaskDataset:
        return load_segmentation(name, split, **{"images": 6, **options})

    monkeypatch.setattr(protocol, "load_segmentation", few)


@pytest.mark.usefixtures("fewer_images")
def test_a_run_writes_concepts_table_and_report(tmp_path: Path, data: MaskDataset) -> None:
    cfg = _config(tmp_path)
    outcome = run(cfg)
    assert outcome.failures == []
    for row in ("class names", "phrases", "concepts, 6 images", "concepts, 6 images, second stage"):
        assert row in outcome.text
        assert f"{row}/test/dice" in outcome.metrics
    assert outcome.headline == "concepts, 6 images/test/dice"
    cell = outcome.folder / "cells" / "concepts_images6_seed1"
    saved = Concepts.load(cell / "concepts.safetensors", "segmenter")
    saved.check_host(segmenter_identity(create_segmenter("clipseg", create_backbone("tiny"))))
    assert saved.names == data.classnames
    again = run(cfg)
    assert again.finished_before
    assert again.metrics == outcome.metrics


@pytest.mark.usefixtures("fewer_images")
def test_a_cell_is_the_same_whichever_ran_before(tmp_path: Path) -> None:
    """The second stage tunes the host, which all cells share, and puts its values back."""
    cfg = _config(tmp_path)
    overrides = ("protocol.seeds=[1,2]",)
    outcome = run(cfg, *overrides)
    experiment = read(cfg, *overrides)
    cell = experiment.cells()[-1]
    alone = experiment.run(cell, tmp_path / "alone")
    together = json.loads((outcome.folder / "cells" / cell.name / "cell.json").read_text())
    assert json.loads(json.dumps(alone.record())) == {k: together[k] for k in ("measurements", "facts")}


def _vectors(outcome: RunOutcome) -> bytes:
    (path,) = outcome.folder.glob("cells/concepts_*/concepts.safetensors")
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_images")
def test_every_accepted_key_changes_something(tmp_path: Path) -> None:
    key = "concepts, 6 images/test/dice"
    # Without a warm-up, whose rate would hardly move anything in the single epoch.
    few = ("second_stage=null", "train.lr=0.1", "train.warmup_epochs=0")
    cfg = _config(tmp_path)
    whole = run(cfg, *few)
    metrics = whole.metrics
    changes = (
        "concepts.init=normal", "segmenter.weights=random", "protocol.seeds=[2]", "train.lr=0.5",
        "backbone.pretrained=random", "data.name=scenes/masks@sketch",
    )  # fmt: skip
    for change in changes:
        other = run(cfg, *few, change)
        # Dice moves in coarse steps; the vectors show every change.
        assert (other.metrics[key], _vectors(other)) != (metrics[key], _vectors(whole)), change
    histories = []
    for loss in ("dice_bce", "smp_focal"):
        outcome = run(cfg, *few, f"loss={loss}")
        histories.append((outcome.folder / "cells" / "concepts_images6_seed1" / "history.jsonl").read_text())
    assert histories[0] != histories[1]
    other = run(cfg, *few, "data.also_test={other: scenes/masks@sketch}")
    assert "class names/other/iou" in other.metrics
    assert other.metrics[key] == metrics[key]


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = _config(tmp_path, segmenter={"name": "clipsag"}, data={"name": "scenes/mask"})
    with pytest.raises(ConfigError) as caught:
        read(path, "backbone.name=tyni")
    assert len(caught.value.problems) == 3
    assert "clipseg" in caught.value.problems[0]
    for override, message in (
        ("train.epoch=1", "did you mean 'epochs'"),
        ("segmenter.redduce=4", "segmenter.redduce: unknown key; did you mean 'reduce'"),
        ("data.also_test={test: scenes/masks}", "choose another"),
        ("train.seed=3", "protocol.seeds=[3]"),
    ):
        with pytest.raises(ConfigError) as caught:
            read(_config(tmp_path), override)
        assert message in str(caught.value)


def test_another_data_set_has_the_same_classes(tmp_path: Path) -> None:
    lay.medvlsm(tmp_path / "own", {"train": 6, "val": 2, "test": 2}, ["polyp"])
    cfg = _config(tmp_path, data={"also_test": {"mine": f"prompts:{tmp_path / 'own'}"}})
    with pytest.raises(DataError, match=r"data\.also_test\.mine: .* has other classes than scenes/masks"):
        run(cfg)
