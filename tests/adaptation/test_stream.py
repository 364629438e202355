"""Streams over data sets, configurations and the tools: what stops goes on, and figures are those of the parts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vlprompt import create_adapter, create_backbone, create_learner, load_dataset, save
from vlprompt.adaptation import Adapter
from vlprompt.adaptation.config import AdaptConfig
from vlprompt.adaptation.experiment import draw_stream, run_adaptation
from vlprompt.adaptation.generate import generate_views
from vlprompt.adaptation.stream import adapt_dataset
from vlprompt.backbones import Backbone
from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError, DataError
from vlprompt.data import ImageDataset
from vlprompt.data.images import pixel_key
from vlprompt.diffusion import ViewStore


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("scenes/size@sketch", "val").subset(range(0, 60, 6))


@pytest.fixture(scope="module")
def adapters(backbone: Backbone, data: ImageDataset) -> dict[str, Adapter]:
    names = {"tpt": {"share": 0.5}, "mta": {}, "tda": {"share": 0.5}, "other": {"seed": 5}}
    return {
        label: create_adapter(
            "zero" if label == "other" else label, backbone, data.classnames, views=4, **options
        )
        for label, options in names.items()
    }


def test_a_stream_gives_what_predict_gives(adapters: dict[str, Adapter], data: ImageDataset) -> None:
    seen: list[tuple[int, int]] = []
    found = adapt_dataset(adapters, data, batch_size=4, progress=lambda *step: seen.append(step))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    for label, adapter in adapters.items():
        adapter.reset()
        alone = adapter.predict([image for image, _ in data])
        torch.testing.assert_close(found[label].probs, alone.probs, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[label].kept, alone.kept)


def test_a_stopped_stream_goes_on_where_it_was(
    adapters: dict[str, Adapter], data: ImageDataset, tmp_path: Path
) -> None:
    whole = adapt_dataset(adapters, data, batch_size=4)

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt_dataset(adapters, data, folder=tmp_path, batch_size=4, progress=stop)
    for adapter in adapters.values():
        adapter.reset()  # another process would know nothing
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(times) == 2
    again = adapt_dataset(adapters, data, folder=tmp_path, batch_size=4)
    assert all(torch.equal(again[label].probs, whole[label].probs) for label in adapters)
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in times} == times
    with pytest.raises(CheckpointError, match="other images or methods"):
        adapt_dataset(adapters, data.subset(range(1, 9)), folder=tmp_path, batch_size=4)


def test_other_class_names_and_empty_streams(adapters: dict[str, Adapter], data: ImageDataset) -> None:
    with pytest.raises(DataError, match="other class names than the adapter 'tpt'"):
        adapt_dataset(adapters, load_dataset("digits", "val"))
    with pytest.raises(DataError, match="nothing to adapt to, 0 images"):
        adapt_dataset(adapters, data.subset([]))


def config(tmp_path: Path, **sections: Any) -> AdaptConfig:
    raw = {
        "name": "t",
        "output": str(tmp_path / "runs"),
        "backbone": {"name": "tiny", "pretrained": "random"},
        "data": {"names": ["scenes/size@sketch", "scenes/size@night"], "split": "val", "subset": 5},
        "adapters": {"mta": {"views": 3}, "voting": {"name": "zero", "views": 3, "share": 0.5}},
        "seeds": [1, 2],
        **sections,
    }
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(raw))
    return AdaptConfig.read(path)


def test_a_run_records_what_it_measured(tmp_path: Path) -> None:
    asked = config(tmp_path)
    outcome = run_adaptation(asked)
    metrics = json.loads((outcome.folder / "metrics.json").read_text())
    assert len(metrics["cells"]) == 2 * 2 * 2
    cells = [c for c in metrics["cells"] if c["label"] == "voting"]
    for cell in cells:
        assert (cell["method"], cell["views"], cell["images"], cell["episodic"]) == ("zero", 3, 5, True)
        assert cell["options"]["share"] == 0.5
        assert cell["options"]["seed"] == cell["seed"] == cell["stream_seed"]
        assert set(cell["seconds_per_image"]) == {"generation", "encoding", "adaptation"}
        assert len(cell["classnames_hash"]) == len(cell["templates_hash"]) == 12
    by_seed = [np.mean([c["accuracy"] for c in cells if c["seed"] == s]) for s in (1, 2)]
    assert metrics["voting/average/accuracy"] == pytest.approx(float(np.mean(by_seed)))
    gain = [np.mean([c["accuracy"] - c["before_accuracy"] for c in cells if c["seed"] == s]) for s in (1, 2)]
    assert metrics["voting/average/accuracy_gain"] == pytest.approx(float(np.mean(gain)))
    assert (metrics["subset"], metrics["seeds"], metrics["split"]) == (5, [1, 2], "val")
    assert "5 images of each data set, seeds 1, 2" in outcome.table
    assert "without adaptation (zero_shot)" in outcome.table
    before = {p: p.stat().st_mtime_ns for p in outcome.folder.rglob("*.safetensors")}
    again = run_adaptation(asked, resume=True)
    assert again.metrics["cells"] == metrics["cells"]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_subsets_follow_the_seed(tmp_path: Path) -> None:
    asked = config(tmp_path)
    first, same, other = (draw_stream(asked, "scenes/size@night", s) for s in (1, 1, 2))
    assert first.samples == same.samples
    assert first.samples != other.samples
    assert len(first) == 5


def test_a_trained_prompt_is_a_start(tmp_path: Path) -> None:
    data = load_dataset("scenes/size", "val")
    learner = create_learner("coop", create_backbone("tiny", "random"), data.classnames, context_length=3)
    save(learner, tmp_path / "prompt")
    asked = config(
        tmp_path, prompt=str(tmp_path / "prompt"), seeds=[1], adapters={"tpt": {"views": 3, "share": 0.5}}
    )
    cell = run_adaptation(asked).metrics["cells"][0]
    assert (cell["start"], cell["method"], cell["optimizer"]) == ("coop", "tpt", "adamw")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(
            tmp_path,
            data={"names": ["scenes/siz"]},
            adapters={"tpt": {"steps": -1, "lrr": 1}, "x": {"name": "ttp"}, "difftpt": {}, "promptalign": {}},
            diffusion={"generator": "image-variatio", "on_the_fly": True},
        )
    for expected in (
        "adapters.tpt.steps: input should be greater than or equal to 0, got -1.",
        "adapters.tpt.lrr: unknown key; did you mean 'lr'?",
        "adapters.x: unknown adapter 'ttp'",
        "source: adapters.promptalign needs the learner's training data",
        "data.names: unknown data set 'scenes/siz'",
        "diffusion.generator: unknown generator 'image-variatio'",
    ):
        assert expected in str(caught.value)
    with pytest.raises(ConfigError, match="diffusion: 63 generated views per image are wanted"):
        config(tmp_path, adapters={"difftpt": {}})
    with pytest.raises(ConfigError, match=r"diffusion\.store: required, unless"):
        config(tmp_path, adapters={"difftpt": {}}, diffusion={"options": {"pipeline": "x"}})


def test_tools_run_a_configuration_and_refuse_a_wrong_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path)
    cfg = ["--cfg", str(tmp_path / "t.yaml"), "seeds=[1]", "data.subset=2"]
    tool("adapt").main([*cfg, "adapters.mta.views=2"])
    printed = capsys.readouterr().out
    assert "| mta |" in printed
    assert Path(printed.splitlines()[-1].split(": mta/average/accuracy")[0]).is_file()
    with pytest.raises(DataError, match="none"):
        tool("adapt").main([*cfg, f"data.names=[folder:{tmp_path / 'none'}]"])
    with pytest.raises(ConfigError, match="generating ahead needs a store"):
        tool("generate").main(cfg)


def tool(name: str) -> ModuleType:
    """Return a program of tools/ as a module."""
    return importlib.import_module(f"tools.{name}")


def test_views_generated_ahead_are_used_and_damage_is_named(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    diffusion = {"options": {"pipeline": str(tmp_path / "absent")}, "store": str(tmp_path / "views")}
    options = {"views": 3, "generated": 2, "share": 0.5}
    asked = config(
        tmp_path,
        adapters={"difftpt": options},
        diffusion=diffusion,
        seeds=[1],
        data={"names": ["scenes/size@sketch"], "split": "val", "subset": 3},
    )
    with pytest.raises(DataError, match="generated views are not in"):
        run_adaptation(asked)
    with pytest.raises(BackboneError, match="can't be loaded"):
        generate_views(asked)
    store = ViewStore(tmp_path / "views")
    for image, _ in draw_stream(asked, "scenes/size@sketch", 1):
        for k in range(2):
            store.put(pixel_key(image), k, Image.new("RGB", (20, 20), (100 * k, 50, 50)))
    cell = run_adaptation(asked, resume=True).metrics["cells"][0]
    assert cell["views"] == 5


def test_the_embedded_generator_serves_both_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    store = tmp_path / "views"
    overrides = [
        f"output={tmp_path / 'runs'}",
        f"diffusion.store={store}",
        "diffusion.options.steps=1",
        "data.names=[scenes/shape@sketch]",
        "data.subset=2",
        "seeds=[1]",
        "adapters.tpt.views=3",
        "adapters.difftpt.views=3",
        "adapters.difftpt.generated=2",
    ]
    cfg = ["--cfg", "difftpt_tiny.yaml", *overrides]
    tool("adapt").main(cfg)  # generates what is missing
    made = {p: p.stat().st_mtime_ns for p in store.rglob("*.png")}
    assert len(made) == 2 * 2
    folder = Path(capsys.readouterr().out.splitlines()[-1].split(": ")[0]).parent
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [c["views"] for c in metrics["cells"]] == [3, 5]
    assert metrics["generated_views"]["kind"] == "tiny-diffusion"
    assert metrics["generated_views"]["seed"] == 0
    assert metrics["cells"][1]["seconds_per_image"]["generation"] > 0
    assert metrics["cells"][1]["before_accuracy"] == metrics["cells"][0]["before_accuracy"]
    tool("generate").main([*cfg, "--check", "2"])  # nothing is left to be made
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*.png")} == made
    assert "names" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="steps: stored 1, asked for 2"):
        tool("generate").main([*cfg, "diffusion.options.steps=2"])
    offline = [*cfg, "diffusion.on_the_fly=false", "adapters.difftpt.views=4"]
    tool("adapt").main(offline)
