"""Configurations of personalised generation, validated as a whole before anything runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.core.errors import VLPromptError
from vlprompt.core.options import describe_problems, options_model
from vlprompt.experiments.old_config import BackboneOptions, ToolConfig
from vlprompt.generation import PERSONALISERS
from vlprompt.training.options import TrainOptions

__all__ = ["ConceptOptions", "FolderConcept", "HostOptions", "MethodOptions", "PersonaliseConfig"]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class HostOptions(BaseModel):
    """The ``host:`` section: the frozen text-to-image model."""

    model_config = _STRICT

    kind: Literal["tiny-diffusion", "stable-diffusion"] = "tiny-diffusion"
    pipeline: str | None = Field(None, description="stable-diffusion: a Hugging Face name or a local folder")
    revision: str | None = None
    weights: str | None = Field(None, description="tiny-diffusion: a packed file instead of the shipped one")
    steps: int = Field(8, ge=1, description="denoising steps of drawn images")
    guidance: float = Field(1.0, ge=0, description="of drawn images; 1 switches it off")
    device: str | None = None


class FolderConcept(BaseModel):
    """A concept of one's own: a folder of images."""

    model_config = _STRICT

    folder: str
    word: str = Field(description="what it is, coarsely, where the search starts: dog")
    held: int = Field(0, ge=0, description="so many of its images, the last by name, are kept for scores")


class ConceptOptions(BaseModel):
    """The ``concepts:`` section: what to learn; drawn scenes unless there are folders."""

    model_config = _STRICT

    folders: dict[str, FolderConcept] = Field(default_factory=dict, description="name to images")
    scenes: int = Field(5, ge=1, description="drawn concepts that pretraining never saw")
    split: Literal["val", "test"] = Field("test", description="choose settings on val")
    images: int = Field(4, ge=1, description="drawn images to learn from")
    held: int = Field(16, ge=1, description="drawn images to score with")


class MethodOptions(BaseModel):
    """One row of the comparison."""

    model_config = _STRICT

    name: str
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own, see its class")
    train: dict[str, Any] = Field(default_factory=dict, description="what differs from the train section")


class PersonaliseConfig(ToolConfig):
    """A whole run; what ``tools/personalise.py --cfg`` reads."""

    name: str = Field("personalise", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    host: HostOptions = Field(default_factory=HostOptions)
    judge: BackboneOptions = Field(
        default_factory=BackboneOptions, description="whose image features similarity is measured in"
    )
    concepts: ConceptOptions = Field(default_factory=ConceptOptions)
    methods: dict[str, MethodOptions] = Field(min_length=1, description="label to a way of learning")
    train: TrainOptions = Field(default_factory=TrainOptions, description="epochs are steps")
    images: int = Field(16, ge=1, description="drawn each time the similarity is measured")
    baseline: str | None = Field(None, description="label whose best similarity is the one to reach")
    seed: int = Field(1, ge=0, description="of drawn images")

    def train_options(self, label: str) -> TrainOptions:
        """Return a method's training options."""
        return TrainOptions.model_validate({**self.train.model_dump(), **self.methods[label].train})

    def problems(self) -> list[str]:
        """Return what is wrong with hosts, methods and names, one sentence each."""
        problems = []
        for label, method in self.methods.items():
            try:
                model = options_model(PERSONALISERS.get(method.name).target)
                model.model_validate(method.options)
                self.train_options(label)
            except ValidationError as error:
                known = TrainOptions if error.title == "TrainOptions" else model
                where = "train" if known is TrainOptions else "options"
                problems += describe_problems(error, known, f"methods.{label}.{where}")
            except VLPromptError as error:
                problems.append(f"methods.{label}.name: {error}")
        if self.baseline is not None and self.baseline not in self.methods:
            problems.append(f"baseline: {self.baseline!r} is none of the methods: {', '.join(self.methods)}.")
        if self.host.kind == "stable-diffusion" and self.host.pipeline is None:
            problems.append("host.pipeline: required for stable-diffusion: a Hugging Face name or a folder.")
        return problems
