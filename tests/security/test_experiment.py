"""Experiments of security under the run engine: figures, isolation, executors, kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.experiments.foretold import check_foretold
from vlprompt.backbones import Backbone
from vlprompt.core.slugs import slug
from vlprompt.data import load_dataset
from vlprompt.experiments.runner import RunOutcome, run_experiment
from vlprompt.security.config import SecurityConfig
from vlprompt.security.data import ScanData
from vlprompt.security.experiment import SecurityExperiment
from vlprompt.security.scanners import create_scanner
from vlprompt.security.victims import SuspectVerdicts, Training, training_set

ROOT = Path(__file__).parents[2]
FILES = ("metrics.json", "results.jsonl", "report.html", "table.md", "table.csv")

SMALL: dict[str, Any] = {
    "task": "security",
    "name": "small",
    "methods": {"zero_shot": {}, "narrow": {"name": "activation_clustering", "components": 3}},
    "compositions": {"triggers": ["clean", "blended", "sig"], "unseen": 0.25},
    "variants": {"one trigger": {"triggers": ["clean", "sig"], "unseen": 0.0}},
    "suspect": {"epochs": 1, "cleaners": ["narrow", "zero_shot"], "rate": 0.3},
    "protocol": {"seeds": [1]},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a data set of 120 handwritten digits: a folder with four classes."""
    root = tmp_path_factory.mktemp("images")
    data = load_dataset("digits", "train")
    for number, label in enumerate(data.labels):
        folder = root / f"digit_{label}"
        folder.mkdir(exist_ok=True)
        if label < 4 and len(list(folder.iterdir())) < 30:
            data[number][0].save(folder / f"{number:04d}.png")
        elif label >= 4:
            folder.rmdir()
    return f"folder:{root}"


def experiment(output: Path, images: str, **changes: Any) -> SecurityExperiment:
    content = {**SMALL, "data": {"name": images}, "output": str(output), **changes}
    return SecurityExperiment(SecurityConfig.parse(content, {}, "test"))


def content_of(outcome: RunOutcome) -> dict[str, bytes]:
    return {name: (outcome.folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, images: str) -> RunOutcome:
    return run_experiment(experiment(tmp_path_factory.mktemp("runs"), images))


def test_victims_need_the_scanners_that_clean_and_nobody_else(tmp_path: Path, images: str) -> None:
    cells = {}
    for cell in experiment(tmp_path, images).cells():
        cells[cell.name.replace(slug(images), "data")] = cell
    assert list(cells) == [
        "zero_shot_data_seed1",
        "narrow_data_seed1",
        "victim_poisoned_data_seed1",
        "victim_cleaned_narrow_data_seed1",
        "victim_cleaned_zero_shot_data_seed1",
        "victim_mended_zero_shot_data_seed1",  # clusters name no object
        f"victim_{slug('perfectly cleaned')}_data_seed1",
        "victim_clean_data_seed1",
        f"zero_shot_{slug('one trigger')}_data_seed1",  # only the first method is varied
    ]
    needs = {}
    for name, cell in cells.items():
        if cell.needs:
            needs[name] = tuple(need.replace(slug(images), "data") for need in cell.needs)
    assert needs == {
        "victim_cleaned_narrow_data_seed1": ("narrow_data_seed1",),
        "victim_cleaned_zero_shot_data_seed1": ("zero_shot_data_seed1",),
        "victim_mended_zero_shot_data_seed1": ("zero_shot_data_seed1",),
    }


@pytest.mark.slow
def test_figures_and_tables(outcome: RunOutcome, images: str) -> None:
    check_foretold(outcome.folder)
    metrics = {key.replace(images, "data"): value for key, value in outcome.metrics.items()}
    assert {"data/zero_shot/auroc/seen", "data/narrow/suspect/auroc"} <= set(metrics)
    assert "data/narrow/auroc" not in metrics, "it scans whole sets only"
    assert "data/zero_shot, one trigger/auroc/sig" in metrics
    assert "data/zero_shot, one trigger/auroc/blended" not in metrics
    assert "data/zero_shot, one trigger/suspect/auroc" not in metrics
    assert metrics["protocol"] == "scan"
    assert metrics["triggers"] == ["clean", "blended", "sig"]
    assert outcome.headline == f"{images}/zero_shot/auroc"

    innocent = metrics["data/victim of a clean set/attack_success"]
    poisoned = metrics["data/victim of the poisoned set/attack_success"]
    assert metrics["data/victim of the poisoned set/attack_gain"] == poisoned - innocent
    mended = metrics["data/victim of the set mended by zero_shot/images"]
    assert mended == metrics["data/victim of a clean set/images"], "mending loses no image"
    assert metrics["data/victim of the set cleaned by zero_shot/images"] < mended

    assert "| zero_shot, one trigger |" in outcome.text
    assert "victim of the set cleaned by narrow" in outcome.text
    assert "victim of the set mended by narrow" not in outcome.text
    frame = outcome.frame()
    assert set(frame["part"].dropna()) == {
        "suspect", "poisoned", "cleaned", "mended", "perfectly cleaned", "clean",
    }  # fmt: skip


@pytest.mark.slow
def test_a_finished_run_is_kept(outcome: RunOutcome, images: str) -> None:
    before = content_of(outcome)
    again = run_experiment(experiment(outcome.folder.parent.parent, images))
    assert again.finished_before
    assert again.text == outcome.text
    assert content_of(again) == before


@pytest.mark.slow
def test_two_processes_give_the_very_files_of_one(outcome: RunOutcome, images: str, tmp_path: Path) -> None:
    parallel = run_experiment(experiment(tmp_path, images), on="processes:2")
    assert parallel.failures == []
    for name, content in content_of(parallel).items():
        assert content == content_of(outcome)[name], name


@pytest.mark.slow
def test_a_failing_scanner_costs_itself_and_its_victims(
    tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, rows: Any, labels: Any) -> None:
        raise RuntimeError("no clusters today")

    with monkeypatch.context() as patch:
        patch.setattr("vlprompt.security.scanners.activation_clustering.ActivationClustering.judge_set", fail)
        broken = run_experiment(experiment(tmp_path, images))
    assert broken.exit_code == 1
    assert broken.metrics["runs_failed"] == 2
    assert "no clusters today" in broken.failures[0]
    assert "victim_cleaned_narrow" in broken.failures[1]
    assert "it needs narrow_" in broken.failures[1]
    assert f"{images}/victim of the set cleaned by zero_shot/accuracy" in broken.metrics

    mended = run_experiment(experiment(tmp_path, images))
    assert mended.exit_code == 0
    assert f"{images}/victim of the set cleaned by narrow/accuracy" in mended.metrics


def test_a_cell_is_the_same_wherever_it_runs(tmp_path: Path, images: str) -> None:
    """Neither the cells before it nor the rows that they encoded reach its figures."""
    methods = {"linear_probe": {}, "zero_shot": {}}
    suspect = {"cleaners": ["zero_shot"], "epochs": 1, "rate": 0.3}

    def build() -> SecurityExperiment:
        return experiment(tmp_path, images, methods=methods, suspect=suspect)

    alone = build()
    first, last = alone.cells()[:2]
    expected = alone.run(last, tmp_path / "alone").record()

    after_another = build()
    after_another.run(first, tmp_path / "first")
    assert after_another.run(last, tmp_path / "second").record() == expected
    verdicts = SuspectVerdicts.read(tmp_path / "alone")
    assert torch.equal(verdicts.score, SuspectVerdicts.read(tmp_path / "second").score)


def test_a_trained_scanner_leaves_its_history_and_no_checkpoint(tmp_path: Path, images: str) -> None:
    dbom = {"learner": {"hidden": 16}, "train": {"epochs": 2}}
    single = experiment(tmp_path, images, methods={"dbom": dbom}, suspect=None, variants={})
    outcome = run_experiment(single)
    (folder,) = (outcome.folder / "cells").iterdir()
    assert {path.name for path in folder.iterdir()} == {"cell.json", "history.jsonl", "timings.json"}
    assert "composition" in (outcome.folder / "report.html").read_text()
    assert outcome.headline in outcome.metrics


def test_other_images_are_another_run(tmp_path: Path, images: str) -> None:
    before = experiment(tmp_path, images).sources()
    assert list(before) == [images]
    path = next(Path(images.removeprefix("folder:")).rglob("*.png"))
    content = path.read_bytes()
    path.unlink()
    try:
        assert experiment(tmp_path, images).sources() != before
    finally:
        path.write_bytes(content)
    (sentence,) = experiment(tmp_path, "folder:/nowhere/at/all").missing()
    assert "/nowhere/at/all" in sentence


def test_training_images_get_several_triggers_and_test_images_one(tmp_path: Path, images: str) -> None:
    compositions = {**SMALL["compositions"], "unseen": 0.0}
    config = experiment(tmp_path, images, compositions=compositions).config
    data = ScanData(images, 1, config.data, config.compositions, config.suspect)
    suspects = len(data.suspects)
    scanned = len(load_dataset(images, "train")) - suspects
    assert len(data.train) == 3 * scanned, "clean and with each of two triggers"
    assert len(data.val) == 2 * len(load_dataset(images, "val"))
    assert len(data.test) == 2 * len(load_dataset(images, "test"))
    bases = {sample.source.base for sample in data.train.samples}
    assert not bases & {sample.source.base for sample in data.suspects.samples}


def test_victims_learn_from_what_their_part_says(tmp_path: Path, images: str) -> None:
    config = experiment(tmp_path, images).config
    data = ScanData(images, 1, config.data, config.compositions, config.suspect)
    count = len(data.suspects)
    suspected = torch.arange(count) % 4 == 0
    verdicts = SuspectVerdicts(torch.zeros(count), suspected, torch.full((count,), 2))
    labels = torch.tensor(data.suspects.labels)

    sets = {}
    for part in ("poisoned", "cleaned", "mended", "perfectly cleaned", "clean"):
        sets[part] = training_set(Training(part), data, verdicts)
    assert torch.equal(sets["poisoned"][1], labels)
    assert torch.equal(sets["cleaned"][1], labels[~suspected])
    assert torch.equal(sets["mended"][1], torch.where(suspected, torch.tensor(2), labels))
    assert torch.equal(sets["mended"][0], sets["poisoned"][0])
    clean = torch.tensor(data.suspects.targets["trigger"]) == 0
    assert torch.equal(sets["perfectly cleaned"][0], sets["poisoned"][0][clean])
    assert torch.equal(sets["clean"][1], torch.tensor(data.suspects.targets["object"]))
    assert not torch.equal(sets["clean"][0], sets["poisoned"][0])


def test_verdicts_survive_their_file(tmp_path: Path) -> None:
    verdicts = SuspectVerdicts(torch.rand(5), torch.rand(5) > 0.5)
    verdicts.write(tmp_path)
    again = SuspectVerdicts.read(tmp_path)
    assert torch.equal(again.suspected, verdicts.suspected)
    assert again.object is None


def test_rows_on_disk_are_those_in_memory(tmp_path: Path, images: str, backbone: Backbone) -> None:
    config = experiment(tmp_path, images).config
    on_disk = config.data.model_copy(update={"cache_dir": str(tmp_path / "rows")})
    rows = []
    for options in (config.data, on_disk, on_disk):
        data = ScanData(images, 1, options, config.compositions, config.suspect)
        scanner = create_scanner("zero_shot", backbone, data.train.classnames, data.train.triggers)
        rows.append(scanner.rows(data.train, data.cache))
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert list((tmp_path / "rows").rglob("*.safetensors"))
