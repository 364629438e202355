from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.foretold import check_foretold
from vlprompt.concepts.embedding import Concepts
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.detection.config import DetectionConfig
from vlprompt.detection.data import DetectionData, write_coco
from vlprompt.detection.experiment import DetectionExperiment
from vlprompt.detection.sources import load_boxes
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.tasks import read_experiment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def coco_folder(data: DetectionData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of noise as train, val and test split, and a test set of the same classes."""
    folder = tmp_path_factory.mktemp("coco")
    for split in ("train", "val", "test"):
        write_coco(data, folder / split)
    write_coco(data, folder / "other")
    return folder


def config_text(coco: Path, output: Path | str, **sections: str) -> str:
    lines = {
        "task": "detection",
        "name": "small",
        "output": str(output),
        "detector": "{name: owl-tiny, weights: random}",
        "data": f"{{name: 'coco:{coco}/{{split}}/annotations.json', validate_on: val, "
        f"also_test: {{mine: 'coco:{coco}/other/annotations.json'}}}}",
        "protocol": "{images: [3], seeds: [1, 2]}",
        "train": "{epochs: 2, batch_size: 2, optimizer: adamw, select: best, select_metric: AP}",
        **sections,
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def experiment_of(folder: Path, coco: Path, **sections: str) -> DetectionExperiment:
    cfg = folder / "run.yaml"
    cfg.write_text(config_text(coco, folder / "runs", **sections))
    experiment = read_experiment(cfg)
    assert isinstance(experiment, DetectionExperiment)
    return experiment


SECOND = "{unfreeze: ['head.embed.*'], train: {lr: 0.01}}"


def test_a_run_writes_concepts_table_and_report(detectors: dict[str, Any], data: DetectionData, coco_folder: Path,
                                                tmp_path: Path) -> None:  # fmt: skip
    pytest.importorskip("pycocotools")
    experiment = experiment_of(tmp_path, coco_folder, second_stage=SECOND)
    outcome = run_experiment(experiment)
    assert outcome.failures == []
    check_foretold(outcome.folder)
    assert "class names" in outcome.text
    assert "concepts, 3 images, second stage" in outcome.text
    saved = Concepts.load(
        outcome.folder / "cells" / "concepts_images3_seed1" / "concepts.safetensors", "detector"
    )
    saved.check_host(detectors["owl-tiny"].identity)
    assert saved.names == data.classnames
    assert outcome.metrics["detector"] == detectors["owl-tiny"].identity
    assert {"class names/test/AP", "concepts, 3 images/mine/AP50_ci95"} <= set(outcome.metrics)
    assert outcome.headline == "concepts, 3 images/test/AP50"
    assert run_experiment(experiment).metrics == outcome.metrics


@pytest.mark.campaign
def test_cells_are_equal_to_the_bit_alone_in_any_order_and_in_other_processes(
    coco_folder: Path, tmp_path: Path, one_thread: None
) -> None:
    pytest.importorskip("pycocotools")
    tmp_path.joinpath("serial").mkdir()
    experiment = experiment_of(tmp_path / "serial", coco_folder, second_stage=SECOND)
    results = run_experiment(experiment).results

    tmp_path.joinpath("processes").mkdir()
    other = experiment_of(tmp_path / "processes", coco_folder, second_stage=SECOND)
    assert run_experiment(other, on="processes:2").results.text() == results.text()

    alone = DetectionExperiment(experiment.config)
    cell = Cell.at(method="concepts", images=3, seed=2)
    lines = results.select(method="concepts", images=3, seed=2).lines
    measured = alone.run(cell, tmp_path / "alone").measurements
    assert [m.value for m in measured] == [line.value for line in lines]


def test_a_detector_that_reads_no_text_has_no_class_names(coco_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    experiment = experiment_of(tmp_path, coco_folder)
    experiment.detector.drop_text()
    result = experiment.run(Cell.at(method="class names"), tmp_path)
    assert result.measurements == []


def test_other_files_are_another_run_and_absent_ones_are_named(data: DetectionData, tmp_path: Path) -> None:
    for split in ("train", "val", "test", "other"):
        write_coco(data, tmp_path / split)
    experiment = experiment_of(tmp_path, tmp_path)
    before = experiment.sources()
    assert len(before) == 4
    assert experiment.missing() == []

    (tmp_path / "test" / "000001.png").write_bytes(b"other")
    after = experiment.sources()
    assert [name for name in before if before[name] != after[name]] == [f"{experiment.config.data.name}/test"]

    (tmp_path / "val" / "annotations.json").unlink()
    (sentence,) = experiment.missing()
    assert sentence.endswith("val/annotations.json does not exist.")
    scenes = experiment_of(tmp_path, tmp_path, data="{name: scenes/shape}", train="{epochs: 1}")
    assert scenes.sources() == {}
    far = experiment_of(tmp_path, tmp_path, data="{name: scenes/shape}", train="{epochs: 1}",
                        detector="{name: owlv2, pretrained: no/such-model}")  # fmt: skip
    assert far.missing() == [
        "the weights 'no/such-model' are not on this machine; the first run fetches them."
    ]


def test_a_split_stands_in_the_paths_of_coco_files(
    data: DetectionData, coco_folder: Path, tmp_path: Path
) -> None:
    write_coco(replace(data, classnames=("x", "y", "z")), tmp_path / "test")
    name = f"coco:{tmp_path}/{{split}}/annotations.json:{tmp_path}/{{split}}"
    assert load_boxes(name, "test").classnames == ("x", "y", "z")
    with pytest.raises(DataError, match=r"train/annotations\.json"):
        load_boxes(name, "train")


def test_mistakes_are_all_named(data: DetectionData, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "detector: {name: owl-tny}\ndata: {name: scenes/shpe, also_test: {a: scenes/shape@sketsh}}\n"
        "train: {select: best}\nsecond_stage: {unfreeze: [x], train: {epoch: 1}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        DetectionConfig.read(path)
    assert len(caught.value.problems) == 5
    for text in (
        "'owl-tiny'",
        "data.name: ",
        "data.also_test.a: ",
        "did you mean 'epochs'",
        "data.validate_on",
    ):
        assert any(text in problem for problem in caught.value.problems), text

    path.write_text("detector: {name: owlvit, pretraned: x}\ndata: {name: 'coco:a.json', validate_on: val}\n")
    with pytest.raises(ConfigError) as caught:
        DetectionConfig.read(path)
    for text in ("did you mean 'pretrained'", "has no test split", "has no validation split"):
        assert any(text in problem for problem in caught.value.problems), text
    assert len(caught.value.problems) == 3

    mine = write_coco(data, tmp_path / "a")
    theirs = write_coco(replace(data, classnames=("x", "y", "z")), tmp_path / "b")
    experiment = experiment_of(tmp_path, tmp_path, train="{epochs: 1}",
                               data=f"{{name: 'coco:{mine}', also_test: {{a: 'coco:{theirs}'}}}}")  # fmt: skip
    with pytest.raises(DataError, match=r"data\.also_test\.a: annotations has other classes"):
        run_experiment(experiment)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "detection").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_files_are_valid_and_name_their_command(path: Path) -> None:
    DetectionConfig.read(path)
    assert f"vlprompt run {path.name}" in path.read_text()
