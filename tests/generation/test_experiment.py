from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlprompt.concepts.embedding import Concepts
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.files import write_tensors
from vlprompt.data.scenes.attributes import held_out_pairs
from vlprompt.data.scenes.concepts import scene_concepts
from vlprompt.generation.config import PersonaliseConfig
from vlprompt.generation.experiment import run_personalisation


def test_concepts_are_held_out_and_splits_are_disjoint() -> None:
    test, val = scene_concepts(5), scene_concepts(3, "val")
    names = [c.name.split(",")[0] for c in (*test, *val)]
    assert len(set(names)) == 8
    assert len({c.word for c in test}) == 5
    spoken = {f"{colour} {shape}" for shape, colour in held_out_pairs("shape_colour")}
    assert {n for n in names if n in spoken}  # shapes that are said otherwise than they are called are few
    assert (len(test[0].images), len(test[0].held)) == (4, 16)
    again = scene_concepts(5)
    assert all(
        np.array_equal(a, b)
        for x, y in zip(test, again, strict=True)
        for a, b in zip(x.held, y.held, strict=True)
    )
    images = [np.asarray(p).tobytes() for p in (*test[0].images, *test[0].held)]
    assert len(set(images)) == 20
    with pytest.raises(DataError, match="got count 99"):
        scene_concepts(99)


def write_config(folder: Path, weights: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"name: small\noutput: {folder / 'runs'}\nhost: {{weights: {weights}, steps: 2, device: cpu}}\n"
        "concepts: {scenes: 1, images: 2, held: 2}\nimages: 2\nbaseline: ti\n"
        "methods:\n  ti: {name: textual-inversion}\n  cones: {name: cones, train: {lr: 0.1}}\n"
        "train: {epochs: 2, batch_size: 2, optimizer: adamw, schedule: constant, warmup_epochs: 0}\n"
    )
    return path


def test_a_run_writes_files_table_and_report(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from vlprompt.diffusion.denoiser import Denoiser

    write_tensors(tmp_path / "w.safetensors", Denoiser(seed=1).state_dict())
    config = PersonaliseConfig.read(write_config(tmp_path, tmp_path / "w.safetensors"))
    outcome = run_personalisation(config)
    files = sorted(p.name for p in (outcome.folder / "concepts").glob("*.safetensors"))
    assert len(files) == 2
    concept = Concepts.load(outcome.folder / "concepts" / files[0], "generator")
    assert torch.isfinite(concept.vectors).all()
    for name in ("metrics.json", "results.md", "samples.png", "config.yaml"):
        assert (outcome.folder / name).is_file()
    page = (outcome.folder / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "similarity by step" in page
    assert {"ti/last", "cones/last", "cones/seconds_per_step"} <= set(outcome.metrics)
    again = run_personalisation(config, resume=True)
    assert again.metrics["concepts"] == outcome.metrics["concepts"]


def test_mistakes_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "host: {kind: stable-diffusion}\nbaseline: other\n"
        "methods: {a: {name: cone}, b: {name: cones, options: {mod: full}}, c: {name: cones, train: {epoch: 3}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        PersonaliseConfig.read(path)
    problems = caught.value.problems
    for text in (
        "unknown personaliser 'cone'",
        "did you mean 'mode'",
        "did you mean 'epochs'",
        "baseline",
        "pipeline",
    ):
        assert any(text in problem for problem in problems), text
    assert len(problems) == 5


def test_folders_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprompt.generation.experiment import _concepts

    (tmp_path / "mine").mkdir()
    for i, image in enumerate(scene_concepts(1)[0].images):
        image.save(tmp_path / "mine" / f"{i}.png")
    config: dict[str, Any] = {"methods": {"cones": {"name": "cones"}}}
    own = {"folder": str(tmp_path / "mine"), "word": "star", "held": 1}
    (concept,) = _concepts(PersonaliseConfig.model_validate({**config, "concepts": {"folders": {"m": own}}}))
    assert (concept.word, len(concept.images), len(concept.held)) == ("star", 3, 1)
    with pytest.raises(DataError, match=r"concepts\.folders\.m: .* has 4 images, 4 are held"):
        _concepts(
            PersonaliseConfig.model_validate({**config, "concepts": {"folders": {"m": {**own, "held": 4}}}})
        )
