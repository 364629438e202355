from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlprompt import create_backbone
from vlprompt.concepts.embedding import Concepts
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data import load_segmentation
from vlprompt.data.segmentation.base import MaskDataset
from vlprompt.segmentation import Segmenter, create_segmenter
from vlprompt.segmentation.concepts import (
    named,
    score_concepts,
    search_masks,
    segmenter_identity,
)
from vlprompt.segmentation.concepts_experiment import ConceptMaskConfig, run_mask_concepts
from vlprompt.segmentation.evaluate import evaluate_segmenter
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


def test_a_run_writes_concepts_table_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: MaskDataset
) -> None:
    import vlprompt.segmentation.concepts_experiment as module

    def small(name: str, split: str = "train", **options: Any) -> MaskDataset:
        return load_segmentation(name, split, **{**options, "images": 6})

    monkeypatch.setattr(module, "load_segmentation", small)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: small\noutput: {tmp_path / 'runs'}\n"
        "data: {test: {plain: scenes/masks}, validate_on: val}\n"
        "train: {epochs: 1, batch_size: 4, optimizer: adamw, select: best, select_metric: dice}\n"
        "second_stage: {unfreeze: ['decoder.*']}\n"
    )
    config = ConceptMaskConfig.read(path)
    outcome = run_mask_concepts(config)
    for row in ("class names", "phrases", "concepts, all images", "concepts, all images, second stage"):
        assert row in outcome.table
        assert f"{row}/plain/dice" in outcome.metrics
    saved = Concepts.load(outcome.folder / "imagesall-seed1" / "concepts.safetensors", "segmenter")
    saved.check_host(segmenter_identity(create_segmenter("clipseg", create_backbone("tiny"))))
    assert saved.names == data.classnames
    assert run_mask_concepts(config, resume=True).metrics == outcome.metrics


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("segmenter: clipsag\ndata: {train: scenes/mask, test: {a: scenes/masks}}\n")
    with pytest.raises(ConfigError) as caught:
        ConceptMaskConfig.read(path)
    assert len(caught.value.problems) == 2
    assert "clipseg" in caught.value.problems[0]
    path.write_text("data: {test: {a: scenes/masks}}\ntrain: {epoch: 1}\n")
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        ConceptMaskConfig.read(path)
