"""Configurations of the search of concepts for detectors, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError

from vlprompt.core.errors import VLPromptError
from vlprompt.core.options import describe_problems, options_model
from vlprompt.core.paths import user_path
from vlprompt.detection import DETECTORS
from vlprompt.detection.sources import check_boxes_name, has_splits
from vlprompt.experiments.concept_study import ConceptConfig, ConceptData
from vlprompt.experiments.config import STRICT

__all__ = ["BoxData", "ConceptOptions", "DetectionConfig"]


class BoxData(ConceptData):
    """The ``data:`` section: scenes that are drawn, or boxes in COCO's format (see :func:`load_boxes`)."""

    name: str = Field(
        "scenes/shape",
        description="scenes/TASK[@STYLE], or coco:JSON:FOLDER with {split} in place of the split",
    )


class ConceptOptions(BaseModel):
    """The ``concepts:`` section: what is searched, and where the search starts."""

    model_config = STRICT

    length: int = Field(1, ge=1, description="L, vectors per concept")
    init: Literal["text", "normal", "visual"] = Field(
        "text", description="the names' text features, noise of their spread, or what the training boxes show"
    )


class DetectionConfig(ConceptConfig):
    """A whole experiment: concepts for one detector."""

    expected_task: ClassVar[str] = "detection"

    detector: dict[str, Any] = Field(
        default_factory=lambda: {"name": "owl-tiny"}, description="name and the detector's own options"
    )
    data: BoxData = Field(default_factory=BoxData)
    concepts: ConceptOptions = Field(default_factory=ConceptOptions)

    @classmethod
    def raw_problems(cls, content: Mapping[str, Any]) -> list[str]:
        """See :meth:`ExperimentConfig.raw_problems`: the detector's name and options, names of data sets."""
        problems = super().raw_problems(content)
        if isinstance(content.get("detector"), Mapping):
            problems += _detector_problems(content["detector"])
        if isinstance(content.get("data"), Mapping):
            problems += _data_problems(content["data"])
        return problems

    @property
    def detector_name(self) -> str:
        """The detector's registry name."""
        return str(self.detector["name"])

    @property
    def detector_options(self) -> dict[str, Any]:
        """The detector's own options."""
        return {key: value for key, value in self.detector.items() if key != "name"}

    def test_names(self) -> dict[str, str]:
        """Return label to name of every test set; a data set without splits has none of its own."""
        tests: dict[str, str] = {}
        if has_splits(self.data.name):
            tests[self.data.split] = self.data.name
        return {**tests, **self.data.also_test}

    def weight_paths(self) -> list[str]:
        """Return the files and folders that the detector's weights are read from."""
        values = [self.detector.get(key) for key in ("pretrained", "weights")]
        return [value for value in values if isinstance(value, str) and user_path(value).exists()]

    def problems(self) -> list[str]:
        """See :meth:`ExperimentConfig.problems`: splits that a data set doesn't have."""
        problems = super().problems()
        name = self.data.name
        if not has_splits(name):
            advice = "name one file for each split: coco:{split}.json:images"
            if not self.data.also_test:
                problems.append(
                    f"data.name: {name!r} is one file and has no test split; {advice}, or add also_test."
                )
            if self.data.validate_on == "val":
                problems.append(
                    f"data.validate_on: {name!r} is one file and has no validation split; {advice}."
                )

        for label, other in self.data.also_test.items():
            if self.data.split == "val" and not has_splits(other):
                problems.append(
                    f"data.also_test.{label}: {other!r} is one file and has no validation split, which data.split asks "
                    "for; name one file for each split: coco:{split}.json:images, or leave it out."
                )

        return problems


def _detector_problems(section: Mapping[str, Any]) -> list[str]:
    if "name" not in section:
        return ["detector.name: required, but missing."]

    try:
        model = options_model(DETECTORS.get(str(section["name"])).target)
    except VLPromptError as error:
        return [f"detector.name: {error}"]

    try:
        model.model_validate({key: value for key, value in section.items() if key != "name"})
    except ValidationError as error:
        return describe_problems(error, model, "detector")

    return []


def _data_problems(section: Mapping[str, Any]) -> list[str]:
    names = {"data.name": section.get("name")}
    if isinstance(section.get("also_test"), Mapping):
        names |= {f"data.also_test.{label}": name for label, name in section["also_test"].items()}

    problems = []
    for key, name in names.items():
        if not isinstance(name, str):  # the model says so
            continue
        try:
            check_boxes_name(name)
        except VLPromptError as error:
            problems.append(f"{key}: {error}")
    return problems
