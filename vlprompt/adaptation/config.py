"""Configurations of test-time adaptation: the methods, the images that they adapt to, and the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation.plans import StreamPlan
from vlprompt.adaptation.record import Tuning
from vlprompt.core.errors import VLPromptError
from vlprompt.core.names import checked_names
from vlprompt.core.options import describe_problems, options_model
from vlprompt.data.names import check_name
from vlprompt.diffusion import GENERATORS
from vlprompt.experiments.backbone import backbone_problems
from vlprompt.experiments.config import STRICT, BackboneOptions, ExperimentConfig, ImageOptions, Seeds

__all__ = [
    "AdaptationConfig",
    "DiffusionOptions",
    "ProtocolOptions",
    "SourceOptions",
    "StreamOptions",
]

_TUNING = "tuning"  # of a method, beside its options
_SOURCE, _STATISTICS = "source", "statistics"  # options of adapters that other sections provide


class StreamOptions(ImageOptions):
    """The ``data:`` section: images to adapt to."""

    name: str | list[str] = Field(description="catalogue name(s), folder:PATH, csv:PATH or tar:PATTERN")
    split: Literal["train", "val", "test"] = Field("test", description="choose hyper-parameters on val")
    test_images: int | None = Field(
        None, ge=1, description="images drawn of each data set; empty: all of them, shuffled"
    )
    classnames: list[str] | dict[str, str] | None = Field(
        None, description="replace class names, all or by old name"
    )
    templates: list[str] | None = Field(None, description="replace the hand-written templates")
    on_bad_embedding: Literal["error", "skip"] = Field(
        "error",
        description="an image whose embedding is NaN or infinite stops the run, or is refused and counted",
    )
    batch_size: int = Field(16, ge=1, description="images in memory at the same time, with all their views")

    @field_validator("classnames", mode="before")
    @classmethod
    def _check_classnames(cls, value: Any) -> Any:
        return checked_names(value)

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("it needs at least one data set.")
        return value

    @property
    def names(self) -> list[str]:
        """The data sets as a list."""
        return [self.name] if isinstance(self.name, str) else list(self.name)


class ProtocolOptions(BaseModel):
    """The ``protocol:`` section."""

    model_config = STRICT

    seeds: Seeds = Field(
        default_factory=lambda: [1], description="of the drawn images, of their order and of the views"
    )
    stream: StreamPlan = Field(default_factory=StreamPlan, description="how the images come; see StreamPlan")
    orders: int = Field(
        1,
        ge=1,
        description="orders of each stream, for methods that depend on it; encoded once for all of them",
    )

    @field_validator("stream")
    @classmethod
    def _check_stream(cls, value: StreamPlan) -> StreamPlan:
        if value.kind in ("temporal", "mixed"):
            raise ValueError(
                f"kind: {value.kind} streams are drawn in Python (vlprompt.adaptation.plans), because they need to "
                "know which images are of which set; a configuration takes iid, dirichlet, separate or tasks."
            )
        return value


class DiffusionOptions(BaseModel):
    """The ``diffusion:`` section: where generated views come from."""

    model_config = STRICT

    generator: str = "image-variation"
    options: dict[str, Any] = Field(
        default_factory=dict, description="of the generator: pipeline, steps, ..."
    )
    store: str | None = Field(None, description="folder that keeps what was generated")
    seed: int = Field(0, ge=0, description="of all noise")
    on_the_fly: bool = Field(
        False, description="generate while methods run; else cells of their own fill the store first"
    )
    checked_images: int = Field(
        50,
        ge=0,
        description="images of each data set and seed whose stored views are classified: do they look like the image?",
    )


class SourceOptions(BaseModel):
    """The ``source:`` section: training data whose statistics PromptAlign aligns with."""

    model_config = STRICT

    name: str
    split: Literal["train", "val"] = "train"
    shots: int | None = Field(None, ge=1, description="images per class; empty: all")
    seed: int = Field(1, ge=0, description="of the draw of shots")


class AdaptationConfig(ExperimentConfig):
    """A whole experiment: several methods on the same images."""

    expected_task: ClassVar[str] = "adaptation"

    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    prompt: str | None = Field(
        None, description="a saved learner to start from: its folder, or that of the run that trained it"
    )
    data: StreamOptions
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="label to a method's options; name is the label unless it is set; tuning is G, F or D",
    )
    protocol: ProtocolOptions = Field(default_factory=ProtocolOptions)
    diffusion: DiffusionOptions | None = None
    source: SourceOptions | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _drop_empty_methods(cls, value: Any) -> Any:
        # methods.tda=null on the command line leaves out a method of the file.
        if not isinstance(value, Mapping):
            return value
        return {label: options for label, options in value.items() if options is not None}

    @classmethod
    def raw_problems(cls, content: Mapping[str, Any]) -> list[str]:
        """See :meth:`ExperimentConfig.raw_problems`: names and options of methods, data sets and generators."""
        return [
            *super().raw_problems(content),
            *backbone_problems(content),
            *_method_problems(content),
            *_data_problems(content),
            *_diffusion_problems(content),
        ]

    def problems(self) -> list[str]:
        """See :meth:`ExperimentConfig.problems`: what methods need of other sections."""
        problems = []
        for label in self.methods:
            if self.needs_statistics(label):
                problems += self._statistics_problems(label)

        if self.generated and self.diffusion is None:
            problems.append(
                f"diffusion: {self.generated} generated views per image are wanted; say from where."
            )

        return problems

    def method(self, label: str) -> tuple[str, dict[str, Any]]:
        """Return the registry name and the options of a method."""
        options = dict(self.methods[label])
        name = str(options.pop("name", label))
        options.pop(_TUNING, None)
        return name, options

    def tuning(self, label: str) -> Tuning:
        """Return how a method's options were chosen; one value everywhere, unless the file says otherwise."""
        tuning: Tuning = self.methods[label].get(_TUNING, "G")
        return tuning

    def fields(self, label: str) -> dict[str, Any]:
        """Return the options that a method takes, each with its default."""
        name, _ = self.method(label)
        return dict(options_model(ADAPTERS.get(name).target).model_fields)

    def needs_views(self, label: str) -> bool:
        """Return whether a method takes generated views."""
        return _SOURCE in self.fields(label)

    def needs_statistics(self, label: str) -> bool:
        """Return whether the experiment must measure source statistics for a method."""
        _, options = self.method(label)
        return _STATISTICS in self.fields(label) and _STATISTICS not in options

    @property
    def generated(self) -> int:
        """How many generated views per image the methods want at most."""
        counts = [0]
        for label in self.methods:
            if self.needs_views(label):
                _, options = self.method(label)
                counts.append(int(options.get("generated", self.fields(label)["generated"].default)))
        return max(counts)

    @property
    def fills_store(self) -> bool:
        """Whether views are generated before the methods run, by cells of their own."""
        return self.diffusion is not None and not self.diffusion.on_the_fly and self.generated > 0

    def _statistics_problems(self, label: str) -> list[str]:
        problems = []
        if self.source is None:
            problems.append(f"source: methods.{label} needs the learner's training data, or statistics=PATH.")
        if self.prompt is None:
            problems.append(f"prompt: methods.{label} starts from a learner with visual prompts; name one.")
        return problems


def _method_problems(content: Mapping[str, Any]) -> list[str]:
    """Check names and options of methods."""
    problems = []
    for label, row in _section(content, "methods").items():
        if not isinstance(row, Mapping):  # the type is checked elsewhere, and null leaves the method out
            continue

        options = dict(row)
        name = str(options.pop("name", label))
        tuning = options.pop(_TUNING, "G")
        if tuning not in ("G", "F", "D"):
            problems.append(
                f"methods.{label}.{_TUNING}: {tuning!r}; G (one value everywhere), F (one per family of data sets) "
                "or D (one per data set)."
            )
        try:
            model = options_model(ADAPTERS.get(name).target)
        except VLPromptError as error:
            problems.append(f"methods.{label}: {error}")
            continue

        if _SOURCE in options:
            problems.append(f"methods.{label}.{_SOURCE}: generated views come from the section diffusion.")
            del options[_SOURCE]

        if _STATISTICS in model.model_fields:
            options.setdefault(_STATISTICS, "")

        try:
            model.model_validate(options)
        except ValidationError as error:
            problems += describe_problems(error, model, f"methods.{label}")

    return problems


def _data_problems(content: Mapping[str, Any]) -> list[str]:
    """Check names of data sets, without reading any."""
    names = _section(content, "data").get("name", [])
    keys = [("data.name", name) for name in ([names] if isinstance(names, str) else names or [])]
    source = _section(content, "source")
    if "name" in source:
        keys.append(("source.name", source["name"]))

    problems = []
    for key, name in keys:
        try:
            check_name(str(name))
        except VLPromptError as error:
            problems.append(f"{key}: {error}")
    return problems


def _diffusion_problems(content: Mapping[str, Any]) -> list[str]:
    """Check the generator's name and options, and that views have a place."""
    section = _section(content, "diffusion")
    if not section:
        return []

    problems = []

    if not section.get("on_the_fly") and section.get("store") is None:
        problems.append(
            "diffusion.store: required, unless views are generated on the fly (diffusion.on_the_fly=true)."
        )

    generator = str(section.get("generator", DiffusionOptions.model_fields["generator"].default))
    try:
        model = options_model(GENERATORS.get(generator).target)
        model.model_validate(section.get("options", {}))
    except ValidationError as error:
        problems += describe_problems(error, model, "diffusion.options")
    except VLPromptError as error:
        problems.append(f"diffusion.generator: {error}")

    return problems


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = content.get(name)
    return section if isinstance(section, Mapping) else {}
