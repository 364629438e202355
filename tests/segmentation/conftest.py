"""A small CLIPSeg in transformers' layout, with weights that any machine can make again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.weights import filled
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.files import write_tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "tunevlseg_clipseg_small.json"


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="session")
def checkpoint(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIPSeg as transformers would have saved it, weights by the golden file's recipe."""
    folder = tmp_path_factory.mktemp("clipseg")
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    write_tensors(folder / "model.safetensors", {n: _weight(n, s) for n, s in golden["shapes"].items()})
    return folder


@pytest.fixture(scope="session")
def small(checkpoint: Path) -> Backbone:
    """Its towers. Nothing may change them."""
    return create_backbone("clipseg", str(checkpoint))


def _weight(name: str, shape: list[int]) -> Tensor:
    parent, last = name.rsplit(".", 1)
    if name == "clip.logit_scale":
        return torch.tensor(2.6592)
    if "norm" in parent or "layrnorm" in parent:
        return filled(name, shape, 0.1, 1.0 if last == "weight" else 0.0)
    if "embedding" in name and "patch" not in name:
        return filled(name, shape, 0.3)
    if last == "bias":
        return filled(name, shape, 0.05)
    return filled(name, shape, torch.Size(shape[1:]).numel() ** -0.5)
