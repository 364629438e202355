"""What a user may set of protocols and training, on one task or several: sections of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlprompt.classification.recipe import RecipeName
from vlprompt.core.options import matching
from vlprompt.experiments.config import STRICT, Seeds
from vlprompt.training.options import TrainSection

__all__ = [
    "DistilOptions",
    "LabelSpace",
    "MultiTaskOptions",
    "ProtocolOptions",
    "StudyTrainSection",
    "TargetOptions",
]

Split = Annotated[
    str,
    matching(
        r"B(0|[2-9]|[1-9]\d+)-C([2-9]|[1-9]\d+)|joint",
        "a split: joint, or Bb-Ck (b 0 or at least 2, k at least 2), such as B0-C4",
    ),
]
LabelSpace = Literal["per_task", "joint", "joint_dedup"]


class ProtocolOptions(BaseModel):
    """The ``protocol:`` section: which cells make up the result."""

    model_config = STRICT

    name: Literal[
        "coop-fewshot",
        "base-to-new",
        "cross-dataset",
        "domain-generalisation",
        "elevater",
        "multitask",
        "transfer",
        "meta",
        "class-incremental",
    ] = "coop-fewshot"
    shots: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [16], min_length=1)
    seeds: Seeds = Field(default_factory=lambda: [1])
    targets: list[str] = Field(
        default_factory=list,
        description="cross-dataset, domain-generalisation: data sets to score what data.name taught",
    )
    split: Split = Field(
        "B0-C4",
        description="class-incremental: Bb-Ck, b classes in the first session (0: k), then k each; joint: all at once",
    )
    order: Literal["seeded", "alphabetical"] = Field(
        "seeded", description="class-incremental: of the classes; seeded: a permutation for each seed"
    )
    baseline: str | dict[str, str | list[str]] | None = Field(
        None, description="method that the others' paired gains are over, or one or several for each method"
    )


class StudyTrainSection(TrainSection):
    """The ``train:`` section of a configuration of classification."""

    recipe: RecipeName = Field(
        "none",
        description="auto: keys that keep their default are the paper's on the paper's backbones, and searched on "
        "held-back shots elsewhere; paper: the paper's; none: the defaults above. A file without train: has auto",
    )

    def options(self) -> dict[str, Any]:
        """Return training options of :func:`vlprompt.fit`, with ``recipe``."""
        if self.recipe == "none":
            return self.model_dump()
        return self.model_dump(exclude_defaults=True)


class MultiTaskOptions(BaseModel):
    """The ``multitask:`` section of a configuration: how tasks share training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label_space: LabelSpace = Field(
        "per_task",
        description="classes a sample competes against: its task's, all tasks' (equal names kept apart, as in the "
        "authors' code), or all tasks' with equal names merged",
    )
    sampler: Literal["proportional", "balanced", "temperature"] = Field(
        "proportional", description="share of a task with n samples: n (the authors'), 1, or n^alpha"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="sampler temperature only")
    groups: dict[str, list[str]] = Field(
        default_factory=dict,
        description="group to data sets that are tuned together; empty: all of data.name",
    )

    @property
    def exponent(self) -> float:
        """The alpha that the sampler stands for."""
        return {"proportional": 1.0, "balanced": 0.0}.get(self.sampler, self.alpha)


class TargetOptions(BaseModel):
    """The ``target:`` section of a configuration: prompts that start from other prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    init_from: str | list[str] = Field(
        default_factory=list,
        description="saved prompts every learner of the run starts from (folders, or patterns with *); of several the "
        "element-wise mean",
    )
    names: list[str] = Field(
        default_factory=list,
        description="protocol multitask: data sets that are tuned from the source prompts",
    )
    shots: list[int] = Field(default_factory=list, description="of target.names; empty: those of the source")
    start: Literal["mean", "seed"] = Field(
        "mean",
        description="target.names start from the mean over the source's seeds, or from their own seed's",
    )
    compare_scratch: bool = Field(
        False, description="train the same from scratch too, and report paired gains"
    )

    @property
    def patterns(self) -> list[str]:
        """``init_from`` as a list."""
        return [self.init_from] if isinstance(self.init_from, str) else list(self.init_from)


class DistilOptions(BaseModel):
    """The ``distil:`` section of a configuration: a teacher, and images without labels; figures are transductive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str = Field(
        "",
        description="saved prompts, or the label of a run in before, whose learner answers in the place of labels",
    )
    backbone: dict[str, Any] = Field(
        default_factory=dict,
        description="what replaces what the teacher's file records of its backbone, such as {pretrained: PATH}",
    )
    data: str | None = Field(
        None,
        description="images that the student sees, without labels; empty: all training images of the data set, base "
        "and new classes alike, whatever the shots",
    )
