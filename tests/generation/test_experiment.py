from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.experiments.foretold import check_foretold
from vlprompt.concepts.embedding import Concepts
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.files import write_tensors
from vlprompt.data.scenes.attributes import held_out_pairs
from vlprompt.data.scenes.concepts import scene_concept_names, scene_concepts
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.tasks import read_experiment
from vlprompt.generation.config import FolderConcept, GenerationConfig
from vlprompt.generation.experiment import GenerationExperiment, read_concept

ROOT = Path(__file__).resolve().parents[2]


def test_concepts_are_held_out_and_splits_are_disjoint() -> None:
    test, val = scene_concepts(5), scene_concepts(3, "val")
    names = [c.name.split(",")[0] for c in (*test, *val)]
    assert len(set(names)) == 8
    assert scene_concept_names(5) == [concept.name for concept in test]
    assert len({c.word for c in test}) == 5
    spoken = {f"{colour} {shape}" for shape, colour in held_out_pairs("shape_colour")}
    assert {n for n in names if n in spoken}  # shapes that are said otherwise than they are called are few
    assert (len(test[0].images), len(test[0].held_out)) == (4, 16)
    again = scene_concepts(5)
    assert all(
        np.array_equal(a, b)
        for x, y in zip(test, again, strict=True)
        for a, b in zip(x.held_out, y.held_out, strict=True)
    )
    images = [np.asarray(p).tobytes() for p in (*test[0].images, *test[0].held_out)]
    assert len(set(images)) == 20
    with pytest.raises(DataError, match="got count 99"):
        scene_concepts(99)


def config_text(weights: Path, output: Path | str, **sections: str) -> str:
    lines = {
        "task": "generation",
        "name": "small",
        "output": str(output),
        "host": f"{{weights: {weights}, steps: 2, device: cpu}}",
        "data": "{concepts: 1, images: 2, held_out: 2}",
        "samples": "2",
        "protocol": "{baseline: ti}",
        "methods": "{ti: {name: textual-inversion}, cones: {train: {lr: 0.1}}}",
        "train": "{epochs: 2, batch_size: 2, optimizer: adamw, schedule: constant, warmup_epochs: 0}",
        **sections,
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    from vlprompt.diffusion.denoiser import Denoiser

    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    write_tensors(path, Denoiser(seed=1).state_dict())
    return path


def experiment_of(folder: Path, weights: Path, **sections: str) -> GenerationExperiment:
    folder.mkdir(exist_ok=True)
    cfg = folder / "run.yaml"
    cfg.write_text(config_text(weights, folder / "runs", **sections))
    experiment = read_experiment(cfg)
    assert isinstance(experiment, GenerationExperiment)
    return experiment


def test_a_run_writes_files_tables_and_report(weights: Path, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, weights)
    outcome = run_experiment(experiment)
    assert outcome.failures == []
    check_foretold(outcome.folder)
    cells = sorted(outcome.folder.glob("cells/*"))
    assert len(cells) == 2
    for cell in cells:
        concept = Concepts.load(cell / "concept.safetensors", "generator")
        assert torch.isfinite(concept.vectors).all()
        assert len(list((cell / "samples").glob("*.png"))) == 2
        assert "seconds" not in (cell / "history.jsonl").read_text()
    for name in ("samples.png", "config.yaml", "table.md", "timings.md"):
        assert (outcome.folder / name).is_file()
    page = (outcome.folder / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "similarity by step" in page

    values = outcome.results.select("similarity", method="cones").values()
    assert outcome.metrics["cones/best"] == max(values)
    assert outcome.metrics["cones/first"] == values[0]
    assert outcome.metrics["ti/arrived"] == 1
    assert outcome.headline == "cones/best"
    timings = json.loads((outcome.folder / "timings.json").read_text())
    assert timings["ti"]["seconds_per_step"] > 0
    assert not [key for key in outcome.metrics if "seconds" in key or "speedup" in key]
    assert run_experiment(experiment).metrics == outcome.metrics


@pytest.mark.campaign
def test_cells_are_equal_to_the_bit_alone_in_any_order_and_in_other_processes(
    weights: Path, tmp_path: Path, one_thread: None
) -> None:
    sections = {"methods": "{ti: {name: textual-inversion}, cones: {unfreeze: ['unet.conv_in.*']}}"}
    experiment = experiment_of(tmp_path / "serial", weights, **sections)
    results = run_experiment(experiment).results
    other = experiment_of(tmp_path / "processes", weights, **sections)
    assert run_experiment(other, on="processes:2").results.text() == results.text()

    alone = GenerationExperiment(experiment.config)
    for cell in reversed(alone.cells()):
        measured = alone.run(cell, tmp_path / cell.name).measurements
        expected = results.select(method=cell["method"], concept=cell["concept"]).values()
        assert [m.value for m in measured] == expected


def test_seeds_are_repetitions(weights: Path, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, weights, protocol="{seeds: [1, 7]}", methods="{cones: {}}")
    outcome = run_experiment(experiment)
    first, second = (outcome.results.select(seed=seed).values() for seed in (1, 7))
    assert first != second
    assert {"cones/best_std", "cones/best_ci95"} <= set(outcome.metrics)
    assert outcome.metrics["cones/best"] == pytest.approx((max(first) + max(second)) / 2)


def test_a_method_that_fails_leaves_the_host_as_it_was(weights: Path, tmp_path: Path) -> None:
    """A rate that makes training overflow, with parameters of the host unfrozen."""
    broken = "{name: cones, unfreeze: ['unet.conv_in.*'], train: {lr: 1e38, epochs: 30}}"
    experiment = experiment_of(tmp_path, weights, methods=f"{{broken: {broken}, cones: {{}}}}",
                               protocol="{baseline: cones}")  # fmt: skip
    before = {name: p.clone() for name, p in experiment.host.network.named_parameters()}
    outcome = run_experiment(experiment)
    assert outcome.metrics["runs_failed"] == 1
    assert all(torch.equal(p, before[name]) for name, p in experiment.host.network.named_parameters())
    assert len(outcome.results.select(method="cones")) == 3


def test_mistakes_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "host: {kind: stable-diffusion}\nprotocol: {baseline: other}\ndata: {concepts: 99}\n"
        "methods: {a: {name: cone}, b: {name: cones, mod: full}, c: {name: cones, train: {epoch: 3}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.read(path)
    problems = caught.value.problems
    for text in (
        "unknown personaliser 'cone'",
        "did you mean 'mode'",
        "did you mean 'epochs'",
        "protocol.baseline",
        "pipeline",
        "data.concepts",
    ):
        assert any(text in problem for problem in problems), text
    assert len(problems) == 6

    path.write_text("methods: {cones: {}}\ntrain: {select: best, schedule: plateau, init: 'gram:x'}\n")
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.read(path)
    assert len(caught.value.problems) == 3
    path.write_text("methods: {cones: {train: {seed: 3}}}\ntrain: {seed: 4}\n")
    with pytest.raises(ConfigError, match=r"write protocol.seeds=\[4\]"):
        GenerationConfig.read(path)


def test_folders_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for i, image in enumerate(scene_concepts(1)[0].images):
        image.save(folder / f"{i}.png")
    concept = read_concept("m", FolderConcept(folder=str(folder), word="star", held_out=1))
    assert (concept.word, len(concept.images), len(concept.held_out)) == ("star", 3, 1)
    with pytest.raises(DataError, match=r"data\.folders\.m: .* has 4 images, and 4 are held out"):
        read_concept("m", FolderConcept(folder=str(folder), word="star", held_out=4))

    raw: dict[str, Any] = {
        "methods": {"cones": {}},
        "data": {"folders": {"m": {"folder": str(folder), "word": "star"}}},
    }
    experiment = GenerationExperiment(GenerationConfig.parse(raw, {}, "test"))
    before = experiment.sources()
    (folder / "0.png").unlink()
    assert experiment.sources() != before
    raw["data"]["folders"]["m"]["folder"] = str(tmp_path / "gone")
    raw["host"] = {"kind": "stable-diffusion", "pipeline": "no/such-pipeline"}
    absent = GenerationExperiment(GenerationConfig.parse(raw, {}, "test"))
    assert absent.missing() == [
        f"{tmp_path / 'gone'} does not exist.",
        "the pipeline 'no/such-pipeline' is not on this machine; the first run fetches it.",
    ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "generation").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_files_are_valid_and_name_their_command(path: Path) -> None:
    GenerationConfig.read(path)
    assert f"vlprompt run {path.name}" in path.read_text()
