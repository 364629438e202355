"""Whole runs of test-time adaptation: figures are those of the parts, cells depend on nothing but their coordinates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.experiments.foretold import check_foretold
from vlprompt import create_backbone, create_learner, load_dataset, save
from vlprompt.adaptation.config import AdaptationConfig
from vlprompt.adaptation.draws import draw_stream
from vlprompt.adaptation.experiment import AdaptationExperiment
from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError, DataError
from vlprompt.data.images import pixel_key
from vlprompt.diffusion import ViewStore
from vlprompt.experiments.runner import RunOutcome, describe_plan, run_experiment

ROOT = Path(__file__).parents[2]
FILES = ("metrics.json", "results.jsonl", "report.html", "table.md", "table.csv", "table.tex")


def write(tmp_path: Path, **sections: Any) -> Path:
    raw = {
        "task": "adaptation",
        "name": "t",
        "output": str(tmp_path / "runs"),
        "backbone": {"name": "tiny", "pretrained": "random"},
        "data": {"name": ["scenes/size@sketch", "scenes/size@night"], "split": "val", "test_images": 5},
        "methods": {"mta": {"views": 3}, "voting": {"name": "zero", "views": 3, "share": 0.5}},
        "protocol": {"seeds": [1, 2]},
        **sections,
    }
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def experiment(tmp_path: Path, *overrides: str, **sections: Any) -> AdaptationExperiment:
    return AdaptationExperiment(AdaptationConfig.read(write(tmp_path, **sections), overrides))


def run(tmp_path: Path, *overrides: str, **sections: Any) -> RunOutcome:
    return run_experiment(experiment(tmp_path, *overrides, **sections))


def test_a_run_records_what_it_measured(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    check_foretold(outcome.folder)
    metrics = json.loads((outcome.folder / "metrics.json").read_text())
    assert outcome.headline == "mta/average/accuracy"
    assert metrics["runs"] == 4

    by_seed, gains = [], []
    for seed in (1, 2):
        lines = outcome.results.select(method="voting", seed=seed)
        after = lines.select("accuracy").values()
        before = lines.select("before_accuracy").values()
        assert len(after) == len(before) == 2
        by_seed.append(np.mean(after))
        gains.append(np.mean([a - b for a, b in zip(after, before, strict=True)]))
    assert metrics["voting/average/accuracy"] == pytest.approx(float(np.mean(by_seed)))
    assert metrics["voting/average/accuracy_gain"] == pytest.approx(float(np.mean(gains)))
    assert {"voting/scenes/size@night/before_ece", "voting/average/accuracy_gain_ci95"} <= metrics.keys()

    adapter = metrics["voting/adapter"]
    assert (adapter["method"], adapter["views"], adapter["granularity"]) == ("zero", 3, "image")
    assert adapter["options"]["share"] == 0.5
    assert (metrics["test_images"], metrics["seeds"], metrics["split"]) == (5, [1, 2], "val")
    assert metrics["scenes/size@night/images"] == 5
    assert len(metrics["scenes/size@night/classnames_hash"]) == 12

    assert "5 images of each data set, seeds 1, 2" in outcome.text
    assert "| without adaptation (zero_shot) |" in outcome.text
    assert "Gain over without adaptation (zero_shot)" in outcome.text
    page = (outcome.folder / "report.html").read_text()
    assert "Test-time adaptation on scenes/size@sketch, scenes/size@night" in page
    assert "Most confident mistakes" in page


def test_seconds_stand_in_timings_alone(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    for cell in (outcome.folder / "cells").iterdir():
        seconds = json.loads((cell / "timings.json").read_text())
        assert seconds["mta/encoding_per_image"] > 0
        assert seconds["voting/adaptation_per_image"] > 0
    assert "second" not in (outcome.folder / "metrics.json").read_text()
    assert "second" not in (outcome.folder / "results.jsonl").read_text()


@pytest.mark.parametrize(
    "override",
    [
        "backbone.pretrained=null",
        "data.split=test",
        "data.test_images=4",
        "data.templates=['one {}.']",
        "data.classnames={small: little}",
        "protocol.seeds=[3]",
        "methods.voting.share=1.0",
    ],
)
def test_a_key_that_is_accepted_changes_the_results(tmp_path: Path, override: str) -> None:
    overrides = ["data.name=scenes/size@sketch", "protocol.seeds=[1]"]
    usual, changed = run(tmp_path, *overrides), run(tmp_path, *overrides, override)
    assert changed.folder != usual.folder
    assert changed.metrics != usual.metrics


def test_batches_are_written_one_by_one(tmp_path: Path) -> None:
    outcome = run(tmp_path, "data.batch_size=2", "data.name=scenes/size@sketch", "protocol.seeds=[1]")
    files = sorted(path.name for path in outcome.folder.glob("cells/*/predictions/*"))
    assert files == [f"{first:07d}.safetensors" for first in (0, 2, 4)]  # no method learns from the stream


def test_subsets_follow_the_seed(tmp_path: Path) -> None:
    config = experiment(tmp_path).config
    first, same, other = (draw_stream(config, "scenes/size@night", seed) for seed in (1, 1, 2))
    assert first.samples == same.samples
    assert first.samples != other.samples
    assert len(first) == 5


def test_a_trained_prompt_is_a_start(tmp_path: Path) -> None:
    data = load_dataset("scenes/size", "val")
    learner = create_learner("coop", create_backbone("tiny", "random"), data.classnames, context_length=3)
    for name in ("prompt", "other"):
        save(learner, tmp_path / "saved" / name)
    methods = {"tpt": {"views": 3, "share": 0.5}}
    sections: dict[str, Any] = {"prompt": str(tmp_path / "saved" / "prompt"), "methods": methods}
    outcome = run(tmp_path, "protocol.seeds=[1]", **sections)
    adapter = outcome.metrics["tpt/adapter"]
    assert (adapter["start"], adapter["method"], adapter["optimizer"]) == ("coop", "tpt", "adamw")
    assert str(tmp_path / "saved" / "prompt") in json.loads((outcome.folder / "sources.json").read_text())

    # The folder above holds the prompt of a run; a pattern of several learners is refused.
    sections["prompt"] = str(tmp_path / "saved")
    assert run(tmp_path, "protocol.seeds=[1]", "name=above", **sections).metrics["tpt/adapter"] == adapter
    sections["prompt"] = str(tmp_path / "saved" / "*")
    with pytest.raises(ConfigError, match="holds 2 learners; name one of"):
        run(tmp_path, **sections)
    sections["prompt"] = str(tmp_path / "absent")
    assert f"{tmp_path / 'absent'} does not exist." in experiment(tmp_path, **sections).missing()


def test_rows_without_adaptation_name_the_words_that_were_chosen(tmp_path: Path) -> None:
    methods = {
        "tpt": {"views": 2},
        "other": {"name": "tpt", "views": 2, "init": "a sketch of a"},
        "mta": {"views": 2},
    }
    text = run(tmp_path, "data.name=scenes/size@sketch", "protocol.seeds=[1]", methods=methods).text
    for start in ("coop", "coop: a sketch of a", "zero_shot"):
        assert text.count(f"| without adaptation ({start}) |") == 1


def test_statistics_of_training_images_are_a_cell_of_their_own(tmp_path: Path) -> None:
    data = load_dataset("scenes/size", "val")
    learner = create_learner("maple", create_backbone("tiny", "random"), data.classnames, depth=2)
    save(learner, tmp_path / "prompt")
    asked = experiment(
        tmp_path,
        "data.name=scenes/size@sketch",
        prompt=str(tmp_path / "prompt"),
        source={"name": "scenes/size", "shots": 1},
        methods={"promptalign": {"views": 3}},
    )
    first, *others = asked.cells()
    assert first.where == {"data": "scenes/size", "stage": "source"}
    assert all(cell.needs == (first.name,) for cell in others)
    outcome = run_experiment(asked)
    assert outcome.metrics["source_images"] == len(data.classnames)
    assert (outcome.folder / "cells" / first.name / "statistics.safetensors").is_file()
    assert outcome.metrics["promptalign/scenes/size@sketch/accuracy"] >= 0


def test_a_data_set_that_is_missing_stops_no_other(tmp_path: Path) -> None:
    asked = experiment(tmp_path, f"data.name=[scenes/size@night,'folder:{tmp_path / 'none'}']")
    assert any("none" in sentence for sentence in asked.missing())
    outcome = run_experiment(asked)
    assert outcome.exit_code == 1
    assert len(outcome.failures) == 1
    assert "none" in outcome.failures[0]
    assert outcome.metrics["runs_failed"] == 2
    assert "mta/scenes/size@night/accuracy" in outcome.metrics
    assert "mta/average/accuracy" not in outcome.metrics


@pytest.mark.slow
def test_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    asked = experiment(tmp_path)
    one = run_experiment(asked)
    content = {name: (one.folder / name).read_bytes() for name in FILES if name != "report.html"}
    two = run_experiment(asked, on="processes:2", restart=True)
    assert {name: (two.folder / name).read_bytes() for name in content} == content


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    outcome = run(tmp_path, "protocol.seeds=[1]")
    times = {path: path.stat().st_mtime_ns for path in outcome.folder.rglob("*") if path.is_file()}
    again = run(tmp_path, "protocol.seeds=[1]")
    assert again.finished_before
    assert again.text == outcome.text
    assert {path: path.stat().st_mtime_ns for path in times} == times


DIFFTPT = {"difftpt": {"views": 3, "generated": 2, "share": 0.5}}


def test_a_full_store_needs_no_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pipeline = tmp_path / "absent"
    asked = experiment(
        tmp_path,
        "protocol.seeds=[1]",
        methods=DIFFTPT,
        diffusion={"options": {"pipeline": str(pipeline)}, "store": str(tmp_path / "views")},
        data={"name": "scenes/size@sketch", "split": "val", "test_images": 3},
    )
    assert [cell.get("stage") for cell in asked.cells()] == ["views", None]
    assert asked.cells()[1].needs == (asked.cells()[0].name,)
    assert f"missing: the diffusion pipeline {pipeline} does not exist." in describe_plan(asked)
    with pytest.raises(BackboneError, match="can't be loaded"):
        run_experiment(asked)

    store = ViewStore(tmp_path / "views")
    for image, _ in draw_stream(asked.config, "scenes/size@sketch", 1):
        for number in range(2):
            store.put(pixel_key(image), number, Image.new("RGB", (20, 20), (100 * number, 50, 50)))
    metrics = run_experiment(asked).metrics
    assert metrics["difftpt/adapter"]["views"] == 5
    assert 0 <= metrics["views/scenes/size@sketch/alike"] <= 1


def test_views_that_were_deleted_are_said_to_be_missing(tmp_path: Path) -> None:
    diffusion = {"generator": "tiny-diffusion", "on_the_fly": False, "store": str(tmp_path / "views")}
    asked = experiment(tmp_path, "protocol.seeds=[1]", methods=DIFFTPT, diffusion=diffusion)
    with pytest.raises(DataError, match=r"10 of 10 generated views are not in .*diffusion\.on_the_fly=true"):
        asked.run(asked.cells()[1], tmp_path / "cell")


def test_views_are_generated_before_and_on_the_fly(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    store = tmp_path / "views"
    overrides = [
        f"output={tmp_path / 'runs'}",
        f"diffusion.store={store}",
        "diffusion.options.steps=1",
        "data.name=scenes/shape@sketch",
        "data.test_images=2",
        "protocol.seeds=[1]",
        "methods.tpt.views=3",
        "methods.difftpt.views=3",
        "methods.difftpt.generated=2",
    ]

    def shipped(*further: str) -> RunOutcome:
        config = AdaptationConfig.read("difftpt_tiny.yaml", [*overrides, *further])
        return run_experiment(AdaptationExperiment(config))

    outcome = shipped()  # generates what is missing
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*.png")}
    assert len(times) == 2 * 2
    metrics = outcome.metrics
    assert [metrics[f"{label}/adapter"]["views"] for label in ("tpt", "difftpt")] == [3, 5]
    assert metrics["generated_views"]["kind"] == "tiny-diffusion"
    assert metrics["generated_views"]["seed"] == 0
    (timings,) = (outcome.folder / "cells").glob("*/timings.json")
    assert json.loads(timings.read_text())["difftpt/generation_per_image"] > 0
    key = "{}/scenes/shape@sketch/before_accuracy"
    assert metrics[key.format("difftpt")] == metrics[key.format("tpt")]

    before = shipped("diffusion.on_the_fly=false")  # nothing is left to be made
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.png")} == times
    assert before.metrics["difftpt/scenes/shape@sketch/ece"] == metrics["difftpt/scenes/shape@sketch/ece"]
    assert before.metrics["views/scenes/shape@sketch/alike"] >= 0
    unchecked = shipped("diffusion.on_the_fly=false", "diffusion.checked_images=0")
    assert "views/scenes/shape@sketch/alike" not in unchecked.metrics
    with pytest.raises(CheckpointError, match="steps: stored 1, asked for 2"):
        shipped("diffusion.on_the_fly=false", "diffusion.options.steps=2")
