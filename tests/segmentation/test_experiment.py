"""Whole runs: every cell, tables, images, what fails, what is kept, the search, the tool."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import vlprompt
from tests.data.segmentation import pairs_layouts as lay
from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.segmentation.config import load_segment_config
from vlprompt.segmentation.experiment import Session, one_cell, run_segmentation

ROOT = Path(__file__).parents[2]
MODEL = {"backbone": "tiny", "weights": "random", "reduce": 8, "hidden": 16}
RUN: dict[str, Any] = {
    "name": "small",
    "models": {"small": {"name": "clipseg", **MODEL}},
    "strategies": {"zero_shot": {}, "vpt": {"train": {"lr": 0.05}}},
    "data": {"names": ["scenes/masks@sketch"], "images": 4, "val_images": 3, "test_images": 6},
    "train": {"epochs": 2, "batch_size": 4},
    "seeds": [1, 2],
    "overlays": 2,
}


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**RUN, "output": str(tmp_path / "runs")}))
    return path


def test_a_run_leaves_tables_images_and_models_that_score_the_same(cfg: Path) -> None:
    config = load_segment_config(cfg, ["depths=[1,2]"])
    outcome = run_segmentation(config)
    assert outcome.failures == []
    assert outcome.metrics["runs"] == 5  # zero-shot once, two depths by two seeds
    names = {p.relative_to(outcome.folder).as_posix() for p in outcome.folder.rglob("*") if p.is_file()}
    assert {"results.md", "results.csv", "results.tex", "report.html", "metrics.json", "cells.json",
            "dice-against-depth.svg", "overlays/small-scenes-masks-sketch.png"} <= names  # fmt: skip
    cell = next(c for c in Session(config, outcome.folder).plan() if c.strategy == "vpt" and c.depth == 2)
    folder = outcome.folder / "cells" / cell.name
    numbers = json.loads((folder / "cell.json").read_text())
    learned = vlprompt.load(folder / "prompt")
    data = vlprompt.load_segmentation("scenes/masks@sketch", "test", images=6)
    assert vlprompt.evaluate_segmenter(learned, data).metrics["dice"] == pytest.approx(
        numbers["dice"], abs=1e-6
    )
    assert numbers["trainable"] == learned.num_trainable() == 2 * 4 * 160
    by_hand = [
        json.loads((outcome.folder / "cells" / c.name / "cell.json").read_text())["dice"]
        for c in Session(config, outcome.folder).plan()
        if c.depth == 2
    ]
    place = "small/vpt/depth2/scenes/masks@sketch"
    assert outcome.metrics[f"{place}/dice"] == pytest.approx(np.mean(by_hand))
    zero = outcome.metrics["small/zero_shot/scenes/masks@sketch/dice"]
    assert outcome.metrics[f"{place}/dice_gain"] == pytest.approx(np.mean(by_hand) - zero)
    assert f"| small vpt depth 2 (1,280) | {100 * np.mean(by_hand):.1f} ± " in outcome.table.replace("**", "")
    assert "| every pixel marked (0) | " in outcome.table


def test_finished_cells_are_kept_and_a_failing_one_stops_no_other(cfg: Path) -> None:
    overrides = ["strategies.too_deep={name: vpt, depth: 9}", "seeds=[1]"]
    config = load_segment_config(cfg, overrides)
    first = run_segmentation(config)
    assert len(first.failures) == 1
    assert "too_deep" in first.failures[0]
    assert "allowed: 1 to 5" in first.failures[0]
    assert first.metrics["runs_failed"] == 1
    files = sorted(first.folder.glob("cells/*/cell.json"))
    assert len(files) == 2
    before = {p: p.stat().st_mtime_ns for p in files}
    done = json.loads(files[0].read_text())
    files[1].unlink()
    again = run_segmentation(config, resume=True)
    assert files[0].stat().st_mtime_ns == before[files[0]]
    assert json.loads(files[0].read_text()) == done
    assert {k: v for k, v in again.metrics.items() if k.endswith("dice")} == {
        k: v for k, v in first.metrics.items() if k.endswith("dice")
    }
    only = one_cell(config, strategy="too_deep")
    with pytest.raises(VLPromptError, match="allowed: 1 to 5"):  # nothing else there is to show
        run_segmentation(only)


def test_a_training_image_that_is_tested_on_is_left_out(tmp_path: Path, cfg: Path) -> None:
    root = tmp_path / "own"
    lay.medvlsm(root, {"train": 6, "val": 2, "test": 2}, ["polyp"])
    (root / "images/001.png").write_bytes(
        (root / "images/008.png").read_bytes()
    )  # another name, the same image
    config = load_segment_config(cfg, [f"data.names=[prompts:{root}]", "data.images=null"])
    train = Session(config, tmp_path / "x").data(f"prompts:{root}", "train", 1)
    assert len(train) == 5
    assert train.info["shared_content_dropped"] == 1


def test_every_mistake_of_a_configuration_at_once(cfg: Path) -> None:
    overrides = [
        "models.small.hiden=3", "models.small.backbone=tyni", "strategies.vpt.detph=2", "strategies.vpt.train.epoch=1",
        "data.names=[scenes/mask]", "data.augmentation=slite", "data.argmax=true", "baseline=zero",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_segment_config(cfg, overrides)
    text = str(caught.value)
    assert len(caught.value.problems) == 8
    for part in (
        "models.small.hiden: unknown key; did you mean 'hidden'", "Did you mean 'tiny'", "did you mean 'depth'",
        "strategies.vpt.train.epoch: unknown key; did you mean 'epochs'", "Did you mean 'scenes/masks'",
        "Did you mean 'slight'", "data.queries=all", "Did you mean 'zero_shot'",
    ):  # fmt: skip
        assert part in text, part
    with pytest.raises(
        ConfigError, match=r"search\.space\.depth: give low and high with low < high, or choices"
    ):
        load_segment_config(cfg, ["search.space={depth: {low: 3}}"])


def test_one_cell_is_the_first_that_learns(cfg: Path) -> None:
    config = one_cell(load_segment_config(cfg))
    assert list(config.strategies) == ["vpt"]
    assert config.seeds == [1]
    with pytest.raises(VLPromptError, match="Did you mean 'vpt'"):
        one_cell(config, strategy="vtp")


def test_search_continues_where_it_was_killed_as_if_it_had_not_been(cfg: Path, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    from vlprompt.segmentation import search as module

    overrides = [
        "search.trials=4",
        "search.startup=2",
        "seeds=[1]",
        "train.epochs=1",
        "search.space={train.lr: {low: 0.01, high: 0.1, log: true}, depth: {low: 1, high: 2}}",
    ]
    whole = module.search(load_segment_config(cfg, [*overrides, "name=whole"]))
    (name,) = whole.best
    assert name == "small_vpt_scenes-masks@sketch_4images"  # zero-shot has nothing to vary
    killed = load_segment_config(cfg, [*overrides, "name=killed"])
    train, calls = Session.train, []

    def dies(self: Session, *arguments: Any, **options: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(self, *arguments, **options)

    Session.train = dies  # type: ignore[method-assign]  # the kill
    try:
        with pytest.raises(KeyboardInterrupt):
            module.search(killed)
    finally:
        Session.train = train  # type: ignore[method-assign]
    again = module.search(killed, resume=True)
    assert again.best == whole.best
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{again.folder / 'search.db'}")
    assert [t.state.name for t in study.trials].count("COMPLETE") == 4
    assert [t.state.name for t in study.trials].count("FAIL") == 1
    best = min((t.value, t.params) for t in study.trials if t.value is not None)
    assert (again.best[name]["value"], again.best[name]["params"]) == best
    found = load_segment_config(again.folder / f"best_{name}.yaml")
    assert found.train_options("vpt")["lr"] == best[1]["train.lr"]
    assert found.strategy("vpt").options["depth"] == best[1]["depth"]


Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Tool:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["segment.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "segment.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return run


def test_tool_trains_evaluates_and_predicts(tool: Tool, cfg: Path, tmp_path: Path) -> None:
    status, out, _ = tool("train", "--cfg", cfg, "--strategy", "vpt")
    assert status == 0
    prompt = out.rsplit("learned: ", 1)[1].strip()
    status, out, _ = tool("evaluate", prompt, "scenes/masks@inverted", "--split", "val", "--csv", "pairs.csv")
    assert status == 0
    assert "scenes/masks@inverted (val, 100 pairs)" in out
    assert len((tmp_path / "pairs.csv").read_text().splitlines()) == 101
    Image.new("RGB", (90, 40), "white").save("wide.png")
    status, out, _ = tool(
        "predict", "wide.png", "a red circle", "--prompt", prompt, "--out", "m.png", "--overlay", "o.png"
    )
    assert status == 0
    mask = Image.open("m.png")
    assert (mask.size, mask.mode) == ((90, 40), "L")
    assert set(np.unique(np.asarray(mask))) <= {0, 255}
    assert Image.open("o.png").size == (90, 40)


def test_tool_explains_mistakes(tool: Tool, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save("a.png")
    for arguments, message in (
        (("predict", "b.png", "x"), "the file does not exist"),
        (("predict", "a.png", " "), "empty"),
        (("predict", "a.png", "red " * 99), "101 tokens, the text tower reads 77"),
        (("evaluate", "nowhere", "scenes/masks"), "no such file"),
        (("bench", "--cfg", "tunevlseg_tny.yaml"), "Did you mean 'tunevlseg_tiny.yaml'"),
        (("convert", "indexed", ".", ".", "--out", "o", "--class", "cat", "x"), "a value is a whole number"),
    ):
        status, _, err = tool(*arguments)
        assert status == 2, arguments
        assert message in err, err


def test_tool_checks_a_folder_before_it_is_used(tool: Tool, tmp_path: Path) -> None:
    lay.medvlsm(tmp_path / "own", {"train": 6, "val": 2, "test": 2}, ["polyp"])
    status, out, _ = tool("check", f"prompts:{tmp_path / 'own'}")
    assert status == 0
    assert "train: 6 pairs of 6 images, 0 unusable" in out
    lay.mask_file(tmp_path / "own/masks/003_0.png", np.eye(5, dtype=np.uint8))
    (tmp_path / "own/images/001.png").write_bytes((tmp_path / "own/images/008.png").read_bytes())
    status, out, _ = tool("check", f"prompts:{tmp_path / 'own'}")
    assert status == 1
    assert "003_0.png is 5 x 5, its image" in out
    assert "train and test share 1 images, for example 001.png = 008.png" in out
