"""Configurations of the search of concepts for detectors, validated as a whole before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.core.errors import VLPromptError
from vlprompt.core.options import describe_problems, options_model
from vlprompt.detection import DETECTORS
from vlprompt.detection.data import DetectionData, read_coco
from vlprompt.detection.scenes import scene_boxes
from vlprompt.experiments.old_config import ToolConfig
from vlprompt.training.options import TrainOptions

__all__ = ["BoxDataOptions", "DetectConfig", "SearchOptions", "StageOptions", "load_boxes"]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class BoxDataOptions(BaseModel):
    """The ``data:`` section: names are ``scenes/TASK[@STYLE]``, or ``coco:JSON:FOLDER`` for every split."""

    model_config = _STRICT

    train: str = "scenes/shape"
    val: str | None = Field(None, description="for curves and select=best; None: none")
    test: dict[str, str] = Field(min_length=1, description="label to a data set of the same classes")
    images: list[Annotated[int, Field(ge=1)] | None] = Field(
        default=[None], min_length=1, description="training images drawn; null: all"
    )


class SearchOptions(BaseModel):
    """The ``search:`` section: the concepts."""

    model_config = _STRICT

    length: int = Field(1, ge=1, description="L, vectors per concept")
    init: Literal["text", "normal", "visual"] = "text"


class StageOptions(BaseModel):
    """The ``second_stage:`` section: parameters of the detector that learn after the search, together with concepts."""

    model_config = _STRICT

    unfreeze: list[str] = Field(min_length=1, description="shell patterns of parameter names")
    train: dict[str, Any] = Field(default_factory=dict, description="what differs from the train section")


class DetectConfig(ToolConfig):
    """A whole run; what ``tools/detect.py --cfg`` reads."""

    name: str = Field("detect", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    detector: dict[str, Any] = Field(
        default_factory=lambda: {"name": "owl-tiny"}, description="name and the detector's own options"
    )
    data: BoxDataOptions
    search: SearchOptions = Field(default_factory=SearchOptions)
    train: TrainOptions = Field(default_factory=TrainOptions)
    second_stage: StageOptions | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [1], min_length=1)

    @property
    def detector_options(self) -> dict[str, Any]:
        """The detector's own options."""
        return {k: v for k, v in self.detector.items() if k != "name"}

    def second_train(self) -> TrainOptions:
        """Return the second stage's training options."""
        own = self.second_stage.train if self.second_stage is not None else {}
        return TrainOptions.model_validate({**self.train.model_dump(), **own})

    def problems(self) -> list[str]:
        """Return what is wrong with the detector, the second stage and data, one sentence each."""
        problems = []
        try:
            model = options_model(DETECTORS.get(str(self.detector.get("name"))).target)
            model.model_validate(self.detector_options)
        except ValidationError as error:
            problems += describe_problems(error, model, "detector")
        except VLPromptError as error:
            problems.append(f"detector.name: {error}")
        try:
            self.second_train()
        except ValidationError as error:
            problems += describe_problems(error, TrainOptions, "second_stage.train")
        if self.train.select == "best" and self.data.val is None:
            problems.append("data.val: train.select=best chooses on validation data.")
        return problems


def load_boxes(name: str, split: str) -> DetectionData:
    """Return one split of a data set by name.

    Raises:
        DataError: If the name is of no known kind, or the files are not what they should be.
        UnknownNameError: For unknown drawn scenes.
    """
    if name.startswith("coco:"):
        annotations, _, folder = name.removeprefix("coco:").partition(":")
        return read_coco(annotations, folder or Path(annotations).parent)
    return scene_boxes(name, split)
