"""Configurations of test-time adaptation: the methods, the images that they adapt to, and the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation.attack import PGD
from vlprompt.adaptation.plans import StreamPlan
from vlprompt.adaptation.record import Tuning
from vlprompt.core.errors import VLPromptError
from vlprompt.core.names import checked_names
from vlprompt.core.options import describe_problems, options_model
from vlprompt.data.corruptions import expand_corruptions
from vlprompt.data.names import check_name
from vlprompt.diffusion import GENERATORS
from vlprompt.experiments.backbone import backbone_problems
from vlprompt.experiments.config import (
    STRICT,
    BackboneOptions,
    ExperimentConfig,
    ImageOptions,
    Seeds,
    Templates,
)

__all__ = [
    "AdaptationConfig",
    "AttackOptions",
    "DiffusionOptions",
    "IntruderOptions",
    "ProtocolOptions",
    "SourceOptions",
    "StreamOptions",
]

_TUNING = "tuning"  # of a method, beside its options
_SOURCE, _STATISTICS = "source", "statistics"  # options of adapters that other sections provide


class IntruderOptions(BaseModel):
    """The ``data.intruders:`` section: images that come among those of each data set in a mixed stream."""

    model_config = STRICT

    name: str | None = Field(
        None, description="catalogue name, folder:PATH or csv:PATH; empty: the data set itself"
    )
    classes: Literal["all", "base", "new"] = Field(
        "all", description="of that set: the first half of the classes (base), the rest (new) or all"
    )


class StreamOptions(ImageOptions):
    """The ``data:`` section: images to adapt to."""

    name: str | list[str] = Field(
        description="catalogue name(s), folder:PATH, csv:PATH or tar:PATTERN; NAME-c:common:5 is the fifteen "
        "common corruptions of NAME at severity 5, in their order"
    )
    split: Literal["train", "val", "test"] = Field("test", description="choose hyper-parameters on val")
    classes: Literal["all", "base", "new"] = Field(
        "all",
        description="classes that images are of and that methods know: base is the first half, new the rest",
    )
    intruders: IntruderOptions | None = Field(
        None, description="images that come among these, for protocol.stream.kind=mixed"
    )
    test_images: int | None = Field(
        None, ge=1, description="images drawn of each data set; empty: all of them, shuffled"
    )
    classnames: list[str] | dict[str, str] | None = Field(
        None, description="replace class names, all or by old name"
    )
    templates: Templates = Field(None, description="replace the hand-written templates")
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
        return _expanded(self.name)


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


class AttackOptions(BaseModel):
    """The ``attack:`` section: every method runs on attacked images too, and clean images are the same crops."""

    model_config = STRICT

    eps: float = Field(
        4 / 255,
        ge=0,
        le=1,
        description="largest change of a pixel, as a share of its range; 4/255 may be written so",
    )
    steps: int = Field(7, ge=0, description="of projected gradient descent, each of eps / 4")
    pixels: Literal["bytes", "floats"] = Field(
        "bytes", description="attacked images are rounded to bytes, or left as they are"
    )
    store: str | None = Field(
        None, description="folder that keeps attacked images for other runs; empty: the run's own"
    )
    batch_size: int = Field(
        1, ge=1, description="images attacked together; more are faster on an accelerator"
    )

    @field_validator("eps", mode="before")
    @classmethod
    def _parse_eps(cls, value: Any) -> Any:
        """Read ``4/255`` as papers write it."""
        if not isinstance(value, str) or value.count("/") != 1:
            return value
        above, below = value.split("/")
        try:
            return float(above) / float(below)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{value!r} is no fraction; expected for example 4/255.") from None

    def attack(self, seed: int) -> PGD:
        """Return what is run on every image of a seed."""
        return PGD(self.eps, self.steps, seed, self.pixels)

    def description(self) -> dict[str, Any]:
        """Return what results depend on, beside the seed."""
        return {"eps": self.eps, "steps": self.steps, "pixels": self.pixels}


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
    attack: AttackOptions | None = Field(
        None,
        description="measure robust accuracy beside clean accuracy; evaluation alone, no method sees a label",
    )

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
        if self.attack is not None and self.fills_store:
            problems.append(
                "attack: the store of generated views holds none of attacked images; set diffusion.on_the_fly=true."
            )

        return problems + self._stream_problems()

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

    def views(self, label: str) -> tuple[int, str]:
        """Return how many views of an image a method looks at, and how they are made; (1, "") for the image alone."""
        _, options = self.method(label)
        fields = self.fields(label)
        values = {
            name: options.get(name, fields[name].default) for name in ("views", "augment") if name in fields
        }
        return int(values.get("views", 1)), str(values.get("augment", ""))

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

    def _stream_problems(self) -> list[str]:
        kind = self.protocol.stream.kind
        problems = []
        if kind == "temporal" and len(self.data.names) < 2:
            problems.append(
                "data.name: a temporal stream is several data sets one after another; name them, for example "
                "[digits-c:fog:5, digits-c:snow:5]."
            )
        if kind == "mixed" and self.data.intruders is None:
            problems.append(
                "data.intruders: a mixed stream needs images that come among the known ones; name them."
            )
        if kind in ("temporal", "mixed") and self.attack is not None:
            problems.append(
                f"attack: a {kind} stream has images of several data sets; attack one data set, without "
                "protocol.stream."
            )
        if kind != "mixed" and self.data.intruders is not None:
            problems.append(f"data.intruders: for protocol.stream.kind=mixed; this stream is {kind}.")

        intruders = self.data.intruders
        if intruders is not None and intruders.name is None:
            classes = {self.data.classes, intruders.classes}
            if classes != {"base", "new"}:
                problems.append(
                    "data.intruders: without a name they are of the same data set, so data.classes and "
                    "data.intruders.classes are base and new, or new and base."
                )
        return problems

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
    data = _section(content, "data")
    keys = [("data.name", name) for name in _expanded(data.get("name") or [])]
    source = _section(content, "source")
    if "name" in source:
        keys.append(("source.name", source["name"]))
    intruders = _section(data, "intruders").get("name")
    if intruders is not None:
        keys.append(("data.intruders.name", intruders))

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


def _expanded(names: str | list[str]) -> list[str]:
    """Return names of data sets, those that stand for several replaced by these."""
    given = [names] if isinstance(names, str) else names
    return [name for one in given for name in expand_corruptions(str(one))]


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = content.get(name)
    return section if isinstance(section, Mapping) else {}
