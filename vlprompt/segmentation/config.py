"""Configurations of segmentation: models, methods, data and a protocol, validated as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator
from typing_extensions import Self

from vlprompt.backbones import unknown_backbone
from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.options import check_options, describe_problems
from vlprompt.data.names import check_name
from vlprompt.data.segmentation.augment import JointAugmentation
from vlprompt.experiments.config import STRICT, BackboneOptions, ExperimentConfig, Seeds, merge
from vlprompt.segmentation import SEGMENTERS, STRATEGIES
from vlprompt.segmentation.adapters import SEGMENTATION_ADAPTERS
from vlprompt.segmentation.fit import SegmentTrainOptions, SegmentTrainSection
from vlprompt.segmentation.losses import LossName

__all__ = [
    "BenchmarkProtocol",
    "DataOptions",
    "MethodSpec",
    "ModelSpec",
    "SegmentationConfig",
    "backbone_problems",
    "name_problems",
    "option_problems",
]

_ARGUMENTS = ("root", "queries", "phrase", "full_stop", "leaks", "empty")  # of load_segmentation
_SET_ELSEWHERE = {"name", "split", "images", "seed", "dedupe", "download", *_ARGUMENTS}
_NO_INIT = "only classification starts from a meta-training; leave it out."


def _as_list(value: Any) -> Any:
    """Return one number as a list of it, for keys that take one or several."""
    return value if isinstance(value, (list, tuple)) else [value]


ImageCounts = Annotated[
    list[Annotated[int, Field(ge=1)] | None], Field(min_length=1), BeforeValidator(_as_list)
]
"""Numbers of training images that are drawn in all; None is all there are."""


class DataOptions(BaseModel):
    """The ``data:`` section: what to train and test on."""

    model_config = STRICT

    name: str | list[str] = Field(
        "scenes/masks",
        description="catalogue name(s), scenes/masks@STYLE, pairs:PATH, prompts:PATH or per_class:PATH",
    )
    split: Literal["val", "test"] = Field(
        "test", description="what is scored in the end; val while anything is being chosen"
    )
    val_images: int | None = Field(None, ge=1, description="validation images that are drawn; empty: all")
    test_images: int | None = Field(None, ge=1, description="test images that are drawn, for a quick look")
    root: str | None = Field(None, description="where data sets lie")
    queries: Literal["present", "all"] = Field(
        "present", description="ask images for the classes they show, or for all"
    )
    argmax: bool = Field(
        False, description="queries=all: let the classes compete too, and report argmax_miou"
    )
    phrase: str | dict[str, str] | None = Field(
        None, description="replaces every phrase, or those of some classes"
    )
    full_stop: bool = Field(False, description="put a full stop behind phrases without one")
    leaks: Literal["mend", "keep"] = Field(
        "mend", description="phrases that say that there is nothing: ask for the class, or keep them"
    )
    empty: Literal["keep", "drop", "error"] = Field("keep", description="pairs whose mask is empty")
    augmentation: str = Field("none", description="none or slight; slight rules caching out")
    options: dict[str, Any] = Field(
        default_factory=dict, description="of the data sets' sources: prompt, threshold, size, on_missing ..."
    )

    @field_validator("name")
    @classmethod
    def _check_names(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("name at least one data set.")
        return value

    @field_validator("augmentation")
    @classmethod
    def _check_augmentation(cls, value: str) -> str:
        try:
            JointAugmentation(value)
        except VLPromptError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("options")
    @classmethod
    def _check_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        wrong = sorted(_SET_ELSEWHERE & value.keys())
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} is no option of one kind of data set; it is set elsewhere or not at all."
            )
        return value

    @property
    def names(self) -> list[str]:
        """The data sets as a list."""
        return [self.name] if isinstance(self.name, str) else list(self.name)

    def arguments(self) -> dict[str, Any]:
        """Return what :func:`load_segmentation` takes for every split."""
        return {**{key: getattr(self, key) for key in _ARGUMENTS}, **self.options}


class BenchmarkProtocol(BaseModel):
    """The ``protocol:`` section: every method of every model on every data set."""

    model_config = STRICT

    name: Literal["benchmark"] = "benchmark"
    images: ImageCounts = Field(
        default=[None], description="training images drawn in all, one number or several; null: all"
    )
    seeds: Seeds = Field(default_factory=lambda: [1])
    baseline: str | None = Field("zero_shot", description="method that gains are counted from")
    depths: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list,
        description="prompt depths to compare, for methods that have one; drawn as a figure",
    )


@dataclass(frozen=True)
class ModelSpec:
    """One model of a run.

    Attributes:
        name: Its registry name.
        backbone: The towers.
        options: Its own.
        methods: Labels of the methods that it is run with; None for all.
    """

    name: str
    backbone: BackboneOptions
    options: dict[str, Any]
    methods: tuple[str, ...] | None


@dataclass(frozen=True)
class MethodSpec:
    """One method of a run.

    Attributes:
        name: Name of its strategy.
        options: The strategy's own.
        train: What it trains differently.
        adapt: Name and options of how it adapts to every test image; empty for not at all.
    """

    name: str
    options: dict[str, Any]
    train: dict[str, Any]
    adapt: dict[str, Any]


class SegmentationConfig(ExperimentConfig):
    """Models and methods, and what they are trained and tested on."""

    expected_task: ClassVar[str] = "segmentation"

    backbone: BackboneOptions = Field(
        default_factory=BackboneOptions, description="of every model that names none of its own"
    )
    models: dict[str, dict[str, Any]] = Field(
        default={"clipseg": {}},
        min_length=1,
        description="label to the model's options; name is the label unless it is given; backbone: a name or section; "
        "methods: labels of those to run, all if it is left out",
    )
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="label to the options of a strategy; name is the label unless it is given; train: what it trains "
        "differently; adapt: name and options of a segmentation adapter that every test image is answered by",
    )
    data: DataOptions = Field(default_factory=DataOptions)
    train: SegmentTrainSection = Field(default_factory=SegmentTrainSection)
    loss: LossName = "dice_bce"
    protocol: BenchmarkProtocol = Field(default_factory=BenchmarkProtocol)
    boundary: bool = Field(True, description="measure the distance of boundaries on the test data")
    overlays: int = Field(4, ge=0, description="test images that are drawn with their masks")

    @classmethod
    def parse(cls, raw: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> Self:
        """See :meth:`ExperimentConfig.parse`; a model or method that is null is taken out."""
        content = merge(raw, overrides)
        for section in ("models", "methods"):
            entries = content.get(section)
            if isinstance(entries, Mapping):
                content[section] = {
                    label: options for label, options in entries.items() if options is not None
                }

        return super().parse(content, {}, source)

    @classmethod
    def raw_problems(cls, content: Mapping[str, Any]) -> list[str]:
        """See :meth:`ExperimentConfig.raw_problems`: names and options of models, methods and data sets."""
        return [
            *super().raw_problems(content),
            *_model_problems(content),
            *_method_problems(content),
            *_data_name_problems(content),
        ]

    def model(self, label: str) -> ModelSpec:
        """Return one model."""
        options = dict(self.models[label])
        name = str(options.pop("name", label))
        backbone = options.pop("backbone", None)
        methods = options.pop("methods", None)
        section = self.backbone if backbone is None else _backbone_section(backbone)
        return ModelSpec(name, section, options, None if methods is None else tuple(methods))

    def method(self, label: str) -> MethodSpec:
        """Return one method."""
        options = dict(self.methods[label])
        name = str(options.pop("name", label))
        train = dict(options.pop("train", None) or {})
        adapt = dict(options.pop("adapt", None) or {})
        return MethodSpec(name, options, train, adapt)

    def pairs(self) -> list[tuple[str, str]]:
        """Return (model, method) labels in order, without what a model isn't run with."""
        pairs = []
        for model in self.models:
            chosen = self.model(model).methods
            for method in self.methods:
                if chosen is None or method in chosen:
                    pairs.append((model, method))

        return pairs

    def learns(self, model: str, method: str) -> bool:
        """Return whether a method changes anything of a model."""
        strategy = STRATEGIES.get(self.method(method).name).target
        last_layer = self.model(model).options.get("last_layer")
        return strategy.tunes != "nothing" or last_layer in ("new", "tuned")

    def train_options(self, method: str, **changes: Any) -> dict[str, Any]:
        """Return the training options of a method."""
        return {**self.train.model_dump(), **self.method(method).train, **changes}

    def problems(self) -> list[str]:
        """See :meth:`ExperimentConfig.problems`: parts that don't fit each other."""
        problems = super().problems()
        if type(self).raw_problems(self.model_dump(mode="json")):
            return problems  # models and methods can't be read; their mistakes are listed already

        for model in self.models:
            for label in self.model(model).methods or ():
                if label not in self.methods:
                    problems.append(
                        f"models.{model}.methods: {UnknownNameError('method', label, self.methods)}"
                    )

        baseline = self.protocol.baseline
        if baseline is not None and baseline not in self.methods and baseline != "zero_shot":
            problems.append(f"protocol.baseline: {UnknownNameError('method', baseline, self.methods)}")

        if self.data.argmax and self.data.queries != "all":
            problems.append(
                "data.argmax: classes can only compete if all are asked for; write data.queries=all."
            )

        if self.train.init:
            problems.append(f"train.init: {_NO_INIT}")

        for label in self.methods:
            if self.method(label).train.get("init"):
                problems.append(f"methods.{label}.train.init: {_NO_INIT}")

        return problems


def _backbone_section(value: Any) -> BackboneOptions:
    """Return the backbone of a model, which may be given by its name alone."""
    return BackboneOptions.model_validate({"name": value} if isinstance(value, str) else value)


def _entries(content: Mapping[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """Return those entries of a section that are mappings; what else is wrong, the types say."""
    entries = content.get(section)
    if not isinstance(entries, Mapping):
        return {}
    return {str(label): dict(options) for label, options in entries.items() if isinstance(options, Mapping)}


def _model_problems(content: Mapping[str, Any]) -> list[str]:
    problems = []
    towers = {"backbone": content.get("backbone", {})}

    for label, options in _entries(content, "models").items():
        methods = options.pop("methods", None)
        if methods is not None and not isinstance(methods, list):
            problems.append(f"models.{label}.methods: input should be a list of labels, got {methods!r}.")
        if "backbone" in options:
            towers[f"models.{label}.backbone"] = options.pop("backbone")

        name = str(options.pop("name", label))
        problems += option_problems(f"models.{label}", SEGMENTERS, name, options)

    return problems + backbone_problems(towers)


def backbone_problems(towers: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with backbones.

    Args:
        towers: Dotted key to a name or section. Types of the section ``backbone`` are not checked here: it is a field
            of its own.
    """
    problems = []

    for where, value in towers.items():
        try:
            name = _backbone_section(value).name
        except ValidationError as error:
            problems += describe_problems(error, BackboneOptions, where) if where != "backbone" else []
            continue
        problem = unknown_backbone(name)
        if problem is not None:
            problems.append(f"{where}: {problem}")

    return problems


def _method_problems(content: Mapping[str, Any]) -> list[str]:
    problems = []
    for label, options in _entries(content, "methods").items():
        train = options.pop("train", None) or {}
        adapt = options.pop("adapt", None) or {}
        name = str(options.pop("name", label))
        problems += option_problems(f"methods.{label}", STRATEGIES, name, options)
        problems += _adapt_problems(f"methods.{label}.adapt", name, adapt)
        where = f"methods.{label}.train"

        if isinstance(train, Mapping) and "seed" in train:
            problems.append(f"{where}.seed: seeds belong to the protocol; write protocol.seeds.")
            train = {key: value for key, value in train.items() if key != "seed"}

        try:
            SegmentTrainSection.model_validate(train)
        except ValidationError as error:
            problems += describe_problems(error, SegmentTrainOptions, where)

    return problems


def _adapt_problems(where: str, strategy: str, adapt: Any) -> list[str]:
    """Return what is wrong with how a method adapts to test images."""
    if not adapt:
        return []
    if not isinstance(adapt, Mapping) or "name" not in adapt:
        known = ", ".join(SEGMENTATION_ADAPTERS.names())
        return [
            f"{where}: it needs a name ({known}), and takes the options of what that names; got {adapt!r}."
        ]
    if strategy in STRATEGIES and STRATEGIES.get(strategy).target.tunes != "prompts":
        return [f"{where}: {strategy} has no prompts that could be tuned on an image."]
    options = dict(adapt)
    return option_problems(where, SEGMENTATION_ADAPTERS, str(options.pop("name")), options)


def _data_name_problems(content: Mapping[str, Any]) -> list[str]:
    section = content.get("data")
    if not isinstance(section, Mapping):
        return []
    names = section.get("name", [])
    return name_problems("data.name", [names] if isinstance(names, str) else names)


def name_problems(where: str, names: Any) -> list[str]:
    """Return a sentence for every name that means no segmentation data set."""
    if not isinstance(names, Iterable):
        return []

    problems = []

    for name in names:
        if not isinstance(name, str):
            continue  # its type says so
        try:
            check_name(name, "segmentation")
        except VLPromptError as error:
            problems.append(f"{where}: {error}")

    return problems


def option_problems(where: str, registry: Any, name: str, options: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a name of a registry, or with options of what it names."""
    try:
        check_options(registry.get(name).target, options, where)
    except ConfigError as error:
        return [f"{where}.{problem}" for problem in error.problems]
    except VLPromptError as error:
        return [f"{where}: {error}"]

    return []
