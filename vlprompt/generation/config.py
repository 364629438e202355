"""Configurations of personalised generation, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError

from vlprompt.core.errors import UnknownNameError, VLPromptError
from vlprompt.core.options import describe_problems, options_model
from vlprompt.core.paths import user_path
from vlprompt.data.scenes.concepts import scene_concept_names
from vlprompt.experiments.config import STRICT, BackboneOptions, ExperimentConfig, Seeds
from vlprompt.generation import PERSONALISERS
from vlprompt.training.options import TrainOptions, TrainSection

__all__ = [
    "ConceptData",
    "FolderConcept",
    "GenerationConfig",
    "GenerationProtocol",
    "HostOptions",
    "Method",
]


class HostOptions(BaseModel):
    """The ``host:`` section: the frozen text-to-image model."""

    model_config = STRICT

    kind: Literal["tiny-diffusion", "stable-diffusion"] = "tiny-diffusion"
    pipeline: str | None = Field(None, description="stable-diffusion: a Hugging Face name or a local folder")
    revision: str | None = Field(None, description="stable-diffusion: branch, tag or commit on the Hub")
    weights: str | None = Field(None, description="tiny-diffusion: a packed file instead of the shipped one")
    steps: int = Field(8, ge=1, description="denoising steps of samples")
    guidance: float = Field(1.0, ge=0, description="of samples; 1 switches it off")
    device: str | None = Field(None, description="where to run; empty: a GPU if there is one")


class FolderConcept(BaseModel):
    """A concept in a folder of images."""

    model_config = STRICT

    folder: str
    word: str = Field(description="what it is, coarsely, where the search starts: dog")
    held_out: int = Field(
        0, ge=0, description="so many of its images, the last by name, are only scored with"
    )


class ConceptData(BaseModel):
    """The ``data:`` section: which concepts are learned; those of drawn scenes unless there are folders."""

    model_config = STRICT

    folders: dict[str, FolderConcept] = Field(default_factory=dict, description="name to images")
    concepts: int = Field(5, ge=1, description="scenes: concepts that pretraining never saw")
    split: Literal["val", "test"] = Field("test", description="scenes: choose settings on val")
    images: int = Field(4, ge=1, description="scenes: images to learn from")
    held_out: int = Field(16, ge=1, description="scenes: images to score with")

    def names(self) -> list[str]:
        """Return the names of the concepts; nothing is read or drawn.

        Raises:
            DataError: If scenes have not so many.
        """
        return list(self.folders) or scene_concept_names(self.concepts, self.split)


class GenerationProtocol(BaseModel):
    """The ``protocol:`` section."""

    model_config = STRICT

    name: Literal["personalise"] = "personalise"
    seeds: Seeds = Field(default_factory=lambda: [1], description="of training and of samples")
    baseline: str | None = Field(
        None, description="method whose best similarity is the one to reach; empty: the first"
    )


@dataclass(frozen=True)
class Method:
    """One way of learning a concept, as a configuration names it.

    Attributes:
        label: In tables.
        name: In the registry.
        options: Its own, see its class.
        train: What differs from the ``train`` section.
    """

    label: str
    name: str
    options: dict[str, Any]
    train: dict[str, Any]


class GenerationConfig(ExperimentConfig):
    """A whole experiment: several methods on the same concepts of the same host."""

    expected_task: ClassVar[str] = "generation"

    host: HostOptions = Field(default_factory=HostOptions)
    scorer: BackboneOptions = Field(
        default_factory=BackboneOptions, description="whose image features similarity is measured in"
    )
    data: ConceptData = Field(default_factory=ConceptData)
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="label to a method's options; name is the label unless it is set, train: what differs for it",
    )
    protocol: GenerationProtocol = Field(default_factory=GenerationProtocol)
    train: TrainSection = Field(default_factory=TrainSection, description="epochs are steps")
    samples: int = Field(16, ge=1, description="images drawn each time the similarity is measured")

    @property
    def baseline(self) -> str:
        """Label of the method whose best similarity is the one to reach."""
        return self.protocol.baseline or next(iter(self.methods))

    def method(self, label: str) -> Method:
        """Return a method by its label."""
        return _method(label, self.methods[label])

    def train_options(self, label: str, seed: int) -> TrainOptions:
        """Return a method's training options."""
        section = {**self.train.model_dump(), **self.method(label).train}
        return TrainOptions(**TrainSection.model_validate(section).model_dump(), seed=seed)

    def paths(self) -> list[str]:
        """Return the files and folders that are read: concepts, and starting weights that are named by a path."""
        weights = [self.host.weights, self.host.pipeline, *self.scorer.paths()]
        paths = [path for path in weights if path is not None and user_path(path).exists()]
        if self.host.weights is not None:
            paths.append(self.host.weights)
        paths += [concept.folder for concept in self.data.folders.values()]
        return list(dict.fromkeys(paths))

    @classmethod
    def raw_problems(cls, content: Mapping[str, Any]) -> list[str]:
        """See :meth:`ExperimentConfig.raw_problems`: names and options of methods."""
        problems = super().raw_problems(content)
        methods = content.get("methods")
        if isinstance(methods, Mapping):
            for label, section in methods.items():
                if isinstance(section, Mapping):
                    problems += _method_problems(_method(str(label), section))

        return problems

    def problems(self) -> list[str]:
        """See :meth:`ExperimentConfig.problems`: the host, the baseline, the scorer, concepts, training."""
        problems = super().problems()
        if self.protocol.baseline is not None and self.protocol.baseline not in self.methods:
            unknown = UnknownNameError("method", self.protocol.baseline, self.methods)
            problems.append(f"protocol.baseline: {unknown}")

        if self.host.kind == "stable-diffusion" and self.host.pipeline is None:
            problems.append("host.pipeline: required for stable-diffusion: a Hugging Face name or a folder.")
        if self.scorer.masks is not None:
            problems.append("scorer.masks: similarity is measured by the backbone as it is; leave it out.")

        try:
            self.data.names()
        except VLPromptError as error:
            problems.append(f"data.concepts: {error}")

        return [*problems, *self._training_problems()]

    def _training_problems(self) -> list[str]:
        """Refuse what would choose by the images that are scored with: there are no others."""
        problems = []
        for label in self.methods:
            try:
                options = self.train_options(label, seed=0)
            except ValidationError:  # named already
                continue

            if options.select == "best":
                problems.append(f"{label}: train.select: there is no validation data; the last step counts.")

            if options.schedule == "plateau" or options.stop_patience is not None:
                problems.append(
                    f"{label}: train.schedule=plateau and train.stop_patience need validation data; there is none."
                )

            if options.init:
                problems.append(
                    f"{label}: train.init: a search starts where the method's init says; leave it out."
                )

        return problems


def _method(label: str, section: Mapping[str, Any]) -> Method:
    options = {key: value for key, value in section.items() if key not in ("name", "train")}
    return Method(label, str(section.get("name", label)), options, dict(section.get("train") or {}))


def _method_problems(method: Method) -> list[str]:
    where = f"methods.{method.label}"
    try:
        model = options_model(PERSONALISERS.get(method.name).target)
    except VLPromptError as error:
        return [f"{where}.name: {error}"]

    problems = []

    for kind, section, key in (
        (model, method.options, where),
        (TrainSection, method.train, f"{where}.train"),
    ):
        try:
            kind.model_validate(section)
        except ValidationError as error:
            problems += describe_problems(error, kind, key)

    return problems
