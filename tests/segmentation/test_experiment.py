"""Whole benchmarks: every cell, tables, overlays, what fails, what is kept, where cells run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlprompt
from tests.data.segmentation import pairs_layouts as lay
from tests.experiments.foretold import check_foretold
from tests.segmentation.runs import BENCHMARK, SKETCH, read, run, write_config
from vlprompt.core.errors import VLPromptError
from vlprompt.data.segmentation.base import MaskedImage
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.folder import RunFolder
from vlprompt.learners import create_learner
from vlprompt.segmentation.evaluate import load_trained
from vlprompt.segmentation.overlays import Sheet
from vlprompt.segmentation.protocols.benchmark import BenchmarkExperiment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    return write_config(tmp_path, BENCHMARK)


def _benchmark(cfg: Path, *overrides: str) -> BenchmarkExperiment:
    experiment = read(cfg, *overrides)
    assert isinstance(experiment, BenchmarkExperiment)
    return experiment


def test_a_run_leaves_tables_overlays_and_models_that_score_the_same(cfg: Path) -> None:
    outcome = run(cfg, "protocol.depths=[1,2]")
    assert outcome.failures == []
    check_foretold(outcome.folder)
    assert outcome.metrics["runs"] == 5  # zero-shot once, two depths by two seeds
    names = {p.relative_to(outcome.folder).as_posix() for p in outcome.folder.rglob("*") if p.is_file()}
    assert {"table.md", "table.csv", "table.tex", "report.html", "metrics.json", "results.jsonl",
            "dice-against-depth.svg", "overlays/small-scenes-masks-sketch.png"} <= names  # fmt: skip

    cells = _benchmark(cfg, "protocol.depths=[1,2]").cells()
    deep = [cell for cell in cells if cell.get("depth") == 2]
    folder = outcome.folder / "cells" / deep[0].name
    learned = vlprompt.load(folder / "prompt")
    data = vlprompt.load_segmentation(SKETCH, "test", images=6)
    by_hand = [outcome.results.select("dice", depth=2, seed=c["seed"], part=None).values()[0] for c in deep]
    assert vlprompt.evaluate_segmenter(learned, data).metrics["dice"] == pytest.approx(by_hand[0], abs=1e-6)
    assert learned.num_trainable() == 2 * 4 * 160

    key = f"small/vpt/depth2/{SKETCH}"
    assert outcome.metrics["small/vpt/depth2/trainable"] == 2 * 4 * 160
    assert outcome.metrics[f"{key}/dice"] == pytest.approx(np.mean(by_hand))
    zero = outcome.metrics[f"small/zero_shot/{SKETCH}/dice"]
    assert outcome.metrics[f"{key}/dice_gain"] == pytest.approx(np.mean(by_hand) - zero)
    assert outcome.headline == f"{key}/dice"
    text = outcome.text.replace("**", "")
    assert f"| small, vpt, depth 2 | 1,280 | {100 * np.mean(by_hand):.1f} ± " in text
    assert "| every pixel marked | 0 | " in text
    assert "distances (hd95) in pixels" in text
    hd95 = outcome.metrics[f"{key}/hd95"]
    assert f"{hd95:.1f} ± " in text


def test_a_finished_run_stays_and_a_failing_cell_stops_no_other(cfg: Path) -> None:
    overrides = ["methods.too_deep={name: vpt, depth: 9}", "protocol.seeds=[1]"]
    first = run(cfg, *overrides)
    assert first.exit_code == 1
    assert len(first.failures) == 1
    assert "too_deep" in first.failures[0]
    assert "allowed: 1 to 5" in first.failures[0]
    assert first.metrics["runs_failed"] == 1
    files = sorted(first.folder.glob("cells/*/cell.json"))
    assert len(files) == 2

    before = {path: path.stat().st_mtime_ns for path in files}
    content = json.loads(files[0].read_text())
    files[1].unlink()
    again = run(cfg, *overrides)
    assert files[0].stat().st_mtime_ns == before[files[0]]
    assert json.loads(files[0].read_text()) == content
    assert again.metrics == first.metrics

    with pytest.raises(VLPromptError, match="allowed: 1 to 5"):  # nothing else there is to show
        run(cfg, *overrides, "methods.zero_shot=null", "methods.vpt=null")


def test_null_takes_methods_and_models_out(cfg: Path) -> None:
    experiment = _benchmark(cfg, "methods.zero_shot=null", "models.other={name: cris}", "models.small=null")
    assert {(cell["model"], cell["method"]) for cell in experiment.cells()} == {("other", "vpt")}


def test_a_training_image_that_is_tested_on_is_left_out(tmp_path: Path, cfg: Path) -> None:
    root = tmp_path / "own"
    lay.medvlsm(root, {"train": 6, "val": 2, "test": 2}, ["polyp"])
    # Another name, the same image.
    (root / "images/001.png").write_bytes((root / "images/008.png").read_bytes())
    experiment = _benchmark(cfg, f"data.name=[prompts:{root}]", "protocol.images=null")
    train = experiment.data(experiment.cells()[-1], "train")
    assert len(train) == 5
    assert train.info["shared_content_dropped"] == 1


def test_other_images_are_another_run(tmp_path: Path, cfg: Path) -> None:
    root = tmp_path / "own"
    lay.medvlsm(root, {"train": 6, "val": 2, "test": 2}, ["polyp"])
    override = f"data.name=prompts:{root}"

    def folder() -> Path:
        experiment = _benchmark(cfg, override)
        return RunFolder(experiment.config, experiment.sources()).path

    before = folder()
    assert before == folder()
    (root / "images/001.png").write_bytes((root / "images/002.png").read_bytes() + b"\0")
    assert folder() != before


def test_several_numbers_of_images_are_compared(cfg: Path) -> None:
    outcome = run(cfg, "protocol.images=[2,4]", "protocol.seeds=[1]", "train.epochs=1", "overlays=0")
    assert outcome.metrics["runs"] == 3  # what learns nothing needs no images
    for images in (2, 4):
        assert f"small/vpt/images{images}/{SKETCH}/dice_gain" in outcome.metrics
        assert f"{images} training images:" in outcome.text
    two, four = (outcome.metrics[f"small/vpt/images{n}/{SKETCH}/dice"] for n in (2, 4))
    assert two != four
    assert (
        outcome.metrics[f"small/zero_shot/images2/{SKETCH}/dice"]
        == outcome.metrics[f"small/zero_shot/images4/{SKETCH}/dice"]
    )


@pytest.mark.slow
def test_every_accepted_key_changes_something(cfg: Path) -> None:
    few = ["protocol.seeds=[1]", "train.epochs=1"]
    metrics = run(cfg, *few).metrics
    without = run(cfg, *few, "boundary=false", "overlays=0", "protocol.baseline=null")
    assert f"small/vpt/{SKETCH}/hd95" in metrics
    assert f"small/vpt/{SKETCH}/dice_gain" in metrics
    assert not [key for key in without.metrics if key.endswith(("hd95", "dice_gain"))]
    assert "Gain over" not in without.text
    assert not (without.folder / "overlays").exists()
    changes = (
        "loss=smp_dice_bce", "data.phrase=a thing", "data.full_stop=true", "train.lr=0.5",
        "data.augmentation=slight", "data.options={size: 48}",
        "data.test_images=2",
    )  # fmt: skip
    few += ["methods.vpt.train=null", "methods.zero_shot=null", "boundary=false", "overlays=0"]
    key = f"small/vpt/{SKETCH}/dice"
    dice = run(cfg, *few).metrics[key]
    for change in changes:
        assert run(cfg, *few, change).metrics[key] != dice, change


def test_masks_of_weights_are_folded_into_the_backbone(tmp_path: Path, cfg: Path) -> None:
    backbone = vlprompt.create_backbone("tiny")
    learner = create_learner("amt", backbone, ("a", "b"))
    vlprompt.save(learner, tmp_path / "masks")
    experiment = _benchmark(cfg, f"backbone.masks={tmp_path / 'masks'}")
    assert experiment.backbone("small").fingerprint["masks"]
    assert str(tmp_path / "masks") in experiment.sources()


@pytest.mark.slow
def test_a_cell_is_the_same_alone_and_among_others_and_in_other_processes(tmp_path: Path) -> None:
    content = {**BENCHMARK, "methods": {**BENCHMARK["methods"], "coop": {}, "end_to_end": {}}}
    cfg = write_config(tmp_path, content)
    serial = run(cfg, "name=serial")
    parallel = run(cfg, "name=parallel", on="processes:2")
    assert parallel.failures == serial.failures == []
    for name in ("metrics.json", "results.jsonl"):
        assert (serial.folder / name).read_bytes() == (parallel.folder / name).read_bytes()

    experiment = _benchmark(cfg)
    cell = experiment.cells()[-1]
    alone = experiment.run(cell, tmp_path / "alone")
    together = json.loads((serial.folder / "cells" / cell.name / "cell.json").read_text())
    assert json.loads(json.dumps(alone.record())) == {k: together[k] for k in ("measurements", "facts")}


def test_parts_of_several_seeds_do_not_depend_on_which_came_first(cfg: Path) -> None:
    """Training images leave out what the validation images of the same seed show."""
    override = "protocol.images=null"
    cells = [cell for cell in _benchmark(cfg, override).cells() if cell["method"] == "vpt"]
    forwards = _benchmark(cfg, override)
    backwards = _benchmark(cfg, override)
    first = [forwards.data(cell, "train").fingerprint() for cell in cells]
    last = [backwards.data(cell, "train").fingerprint() for cell in reversed(cells)]
    assert first == last[::-1]


def test_best_images_are_drawn_as_the_files_of_cells_say(cfg: Path) -> None:
    outcome = run(cfg, "protocol.seeds=[1]")
    cell = Cell.at(model="small", method="vpt", data=SKETCH, images=4, seed=1)
    mask = np.asarray(Image.open(outcome.folder / "cells" / cell.name / "overlays" / "0.png"))
    data = vlprompt.load_segmentation(SKETCH, "test", images=6)
    learned = load_trained(outcome.folder / "cells" / cell.name / "prompt")
    expected = vlprompt.segmentation.evaluate.predict_mask(learned, data[0].image, data[0].phrase) > 0.5
    assert np.array_equal(mask == 255, expected)
    page = (outcome.folder / "report.html").read_text()
    assert 'alt="small-scenes-masks-sketch"' in page
    assert page.count("data:image/png;base64") == 1


_KILLED = """
import sys
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.tasks import read_experiment
outcome = run_experiment(read_experiment(sys.argv[1], sys.argv[2:]))
sys.exit(outcome.exit_code)
"""


def test_phrases_and_labels_of_any_kind_in_a_report(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20))
    pair = MaskedImage(image, np.zeros((20, 20), np.uint8), "costs $5 or ${x}$ \\frac", 0, "pair")
    sheet = Sheet([pair])
    Image.new("L", (20, 20)).save(tmp_path / "mask.png")
    sheet.add("a $\\oops method", [tmp_path / "mask.png"])
    label = '"><script>alert(1)<!script>'
    sheet.write(tmp_path / f"{label}.png")
    html = Sheet.html(tmp_path / f"{label}.png")
    assert "<script" not in html
    assert html.count('"') == 6
