"""A folder of a pipeline that brings Python code: nothing of it runs, and the refusal says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlprompt.core.errors import BackboneError
from vlprompt.diffusion import create_generator
from vlprompt.diffusion.custom_code import refuse_custom_code
from vlprompt.diffusion.pipelines import load_pipeline

INDEXES: dict[str, dict[str, Any]] = {
    "class": {"_class_name": ["mine", "Mine"]},
    "component": {"_class_name": "StableDiffusionImg2ImgPipeline", "unet": ["mine", "Mine"]},
    "beside": {"_class_name": "StableDiffusionImg2ImgPipeline", "vae": ["mine", "Mine"]},
}


@pytest.fixture(params=INDEXES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A pipeline whose code would leave a folder behind."""
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    code = (
        f"import os\nos.mkdir({str(tmp_path / 'it_ran')!r})\n"
        "from diffusers import DiffusionPipeline\nclass Mine(DiffusionPipeline):\n    pass\n"
    )
    for place in ("mine.py", "unet/mine.py"):
        (pipeline / place).write_text(code)
    index = {**INDEXES[request.param], "_diffusers_version": "0.30.0"}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    return pipeline


def test_it_is_refused_before_diffusers_sees_it(folder: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
    for kind in ("img2img", "image-variation"):
        with pytest.raises(BackboneError, match="brings code of its own, which is never run"):
            create_generator(kind, pipeline=str(folder))
    with pytest.raises(BackboneError, match=r"model_index\.json"):
        load_pipeline("StableDiffusionPipeline", str(folder))
    assert not (folder.parent / "it_ran").exists()


@pytest.mark.parametrize("text", ["", "[]x", "5", "null"])
def test_a_damaged_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(BackboneError, match="model_index"):
        refuse_custom_code(str(tmp_path))


def test_ordinary_pipelines_pass(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
             "safety_checker": [None, None], "requires_safety_checker": False}  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refuse_custom_code(str(tmp_path))
    refuse_custom_code(str(tmp_path / "nowhere"))
    refuse_custom_code("someone/pipeline-that-is-in-no-cache")
