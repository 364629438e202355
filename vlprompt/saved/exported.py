"""Reading exported classifiers: a file that names images without a backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from vlprompt.backbones.preprocessing import transform_of
from vlprompt.core.names import check_classnames
from vlprompt.core.options import describe_problems
from vlprompt.core.paths import user_path
from vlprompt.saved.export import FACTS, ExportError, run_onnx, session

__all__ = ["ExportedClassifier"]


class _Facts(BaseModel):
    """What the metadata must say; more is allowed."""

    model_config = ConfigDict(extra="allow")

    method: str
    classnames: list[str]
    preprocess: dict[str, Any]


class ExportedClassifier:
    """A classifier from an ONNX file that :func:`vlprompt.export` wrote.

    Args:
        path: The file.

    Attributes:
        classnames: C names.
        method: Registry name of the learner it was.
        device: Where it runs: the processor.

    Raises:
        ExportError: If onnxruntime is missing, the file is no model, or none of ours.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | Path) -> None:
        place = user_path(path)
        if not place.is_file():
            raise ExportError(f"no such file: {place}.")

        self._session = session(place)
        facts = _read_facts(place, self._session.get_modelmeta().custom_metadata_map.get(FACTS))
        self.method = facts.method
        self.classnames = check_classnames(facts.classnames, str(place))
        self._transform = _transform(place, facts.preprocess)
        self._check_size(place)

    def _check_size(self, path: Path) -> None:
        """Refuse a file whose preparation gives images of another size than its model reads."""
        (given,) = self._session.get_inputs()
        wanted = list(given.shape[1:])
        try:
            shape = list(self._transform(Image.new("RGB", (8, 8))).shape)
        except Exception as error:  # foreign values meet torchvision's checks, which raise many kinds
            raise ExportError(
                f"{path}: its metadata ask for images that can't be prepared: {error}."
            ) from error
        if shape != wanted:
            raise ExportError(
                f"{path}: its metadata prepare images of shape {shape}, its model reads {wanted}."
            )

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return (3, H, W) of an image of any size, as the learner prepared it."""
        return self._transform(image)

    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, C) logits of (B, 3, H, W) prepared images."""
        return run_onnx(self._session, images.cpu())


def _read_facts(path: Path, text: str | None) -> _Facts:
    if text is None:
        raise ExportError(
            f"{path} was not written by vlprompt: it does not say how images are prepared and what its classes are."
        )
    try:
        return _Facts.model_validate(json.loads(text))
    except ValidationError as error:
        raise ExportError(f"{path}: {' '.join(describe_problems(error, _Facts)[:3])}") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: its metadata are no readable JSON: {error}.") from error


def _transform(path: Path, facts: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    try:
        return transform_of(PreprocessCfg(**facts))
    except Exception as error:  # foreign values meet open_clip's checks, which are assertions
        raise ExportError(f"{path}: its metadata ask for images that can't be prepared: {error}.") from error
