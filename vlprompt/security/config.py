"""Configurations of security: which scanners are compared on which data, and what their verdicts are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.options import check_options, describe_problems
from vlprompt.data.compositions import check_triggers
from vlprompt.data.names import check_name
from vlprompt.data.triggers import DEFAULT_TRIGGERS, NATIVE_SIZE, NativeSize
from vlprompt.experiments.backbone import backbone_problems
from vlprompt.experiments.config import STRICT, BackboneOptions, ExperimentConfig, ImageOptions, Seeds
from vlprompt.security.scanners import SCANNERS

__all__ = ["CompositionOptions", "DataOptions", "ProtocolOptions", "SecurityConfig", "SuspectOptions"]


class DataOptions(ImageOptions):
    """The ``data:`` section: images that triggers are put into."""

    name: str | list[str] = Field(
        "scenes/shape", description="catalogue name(s), folder:PATH, csv:PATH or tar:PATTERN"
    )
    split: Literal["val", "test"] = Field(
        "test", description="part that figures are of; val while anything is being chosen"
    )
    cache_dir: str | None = Field(
        None, description="where rows of the image tower are kept between runs; empty: in memory"
    )
    photographs: str | None = Field(
        None,
        description="folder of clean photographs of any size that false alarms are counted on, too; empty: crops of "
        "the two that scikit-learn brings",
    )

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


class CompositionOptions(BaseModel):
    """The ``compositions:`` section: what scanners learn from and are tested on."""

    model_config = STRICT

    triggers: list[str] = Field(
        default_factory=lambda: list(DEFAULT_TRIGGERS), description="the first is clean"
    )
    native_size: NativeSize = Field(
        NATIVE_SIZE, description="pixels a side at which triggers are put in; own: at each image's own size"
    )
    unseen: float = Field(
        0.3, ge=0, lt=1, description="share of the triggered compositions that training doesn't show"
    )
    copies: int = Field(
        7,
        ge=1,
        description="triggered images per training image, each with another trigger; one to test on",
    )
    share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of the train split that scanners learn from; the rest is the suspect's",
    )


class SuspectOptions(BaseModel):
    """The ``suspect:`` section: a poisoned set that is to be cleaned, from images that no scanner learned from."""

    model_config = STRICT

    rate: float = Field(0.1, ge=0, le=1, description="share that is poisoned, all triggers equally often")
    mode: Literal["all_to_one", "all_to_all"] = "all_to_one"
    target: int = Field(0, ge=0, description="class that all_to_one flips labels to")
    epochs: int = Field(25, ge=1, description="of the victim")
    cleaners: list[str] = Field(
        default_factory=lambda: ["dbom"], description="methods whose cleaned sets a victim is trained on"
    )


class ProtocolOptions(BaseModel):
    """The ``protocol:`` section."""

    model_config = STRICT

    seeds: Seeds = Field(
        default_factory=lambda: [1, 2, 3],
        description="of the compositions, of the suspected set and of training",
    )
    baseline: str | None = Field(None, description="method that the others' paired gains are over")


def _every_scanner() -> dict[str, dict[str, Any]]:
    return {name: {} for name in SCANNERS.names()}


class SecurityConfig(ExperimentConfig):
    """A comparison of scanners, and of the classifiers that learn from what they clean."""

    expected_task: ClassVar[str] = "security"

    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    data: DataOptions = Field(default_factory=DataOptions)
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=_every_scanner,
        min_length=1,
        description="label to a scanner's options; name is the label unless it is set",
    )
    compositions: CompositionOptions = Field(default_factory=CompositionOptions)
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="label to what differs in compositions; the first method is fitted and tested with each, too",
    )
    suspect: SuspectOptions | None = Field(default_factory=SuspectOptions)
    protocol: ProtocolOptions = Field(default_factory=ProtocolOptions)

    @field_validator("methods", "variants", mode="before")
    @classmethod
    def _drop_empty_rows(cls, value: Any) -> Any:
        # methods.spectral=null on the command line leaves out a method of the file.
        if not isinstance(value, Mapping):
            return value
        return {label: options for label, options in value.items() if options is not None}

    @classmethod
    def raw_problems(cls, content: Mapping[str, Any]) -> list[str]:
        """See :meth:`ExperimentConfig.raw_problems`: names and options of methods, data sets, triggers, variants."""
        return [
            *super().raw_problems(content),
            *backbone_problems(content),
            *_data_problems(_section(content, "data").get("name", [])),
            *_method_problems(_section(content, "methods")),
            *_trigger_problems(_section(content, "compositions").get("triggers"), "compositions.triggers"),
            *_variant_problems(_section(content, "variants")),
        ]

    def problems(self) -> list[str]:
        """See :meth:`ExperimentConfig.problems`: labels that must be methods, and methods that have nothing to scan."""
        problems = []
        for label in self.suspect.cleaners if self.suspect else ():
            if label not in self.methods:
                problems.append(f"suspect.cleaners: {UnknownNameError('method', label, self.methods)}")

        baseline = self.protocol.baseline
        if baseline is not None and baseline not in self.methods:
            problems.append(f"protocol.baseline: {UnknownNameError('method', baseline, self.methods)}")

        for number, label in enumerate(self.methods):
            name, _ = self.method(label)
            if name not in SCANNERS or not SCANNERS.get(name).target.needs_whole_set:
                continue

            if self.suspect is None:
                problems.append(
                    f"methods.{label}: {name} scans whole labelled sets only, and suspect=null leaves none."
                )

            if number == 0 and self.variants:
                problems.append(
                    f"variants: {label}, the first method, scans whole labelled sets only, and variants have none. "
                    "Put another method first."
                )

        return problems

    def method(self, label: str) -> tuple[str, dict[str, Any]]:
        """Return a method's registry name and its options."""
        options = dict(self.methods[label])
        name = str(options.pop("name", label))
        return name, options

    @property
    def first_method(self) -> str:
        """The label of the method that variants are of."""
        return next(iter(self.methods))

    def varied(self, variant: str | None) -> CompositionOptions:
        """Return the compositions of a variant; of None those that are not varied."""
        if variant is None:
            return self.compositions
        return CompositionOptions(**{**self.compositions.model_dump(), **self.variants[variant]})


def _data_problems(names: Any) -> list[str]:
    problems = []
    for name in [names] if isinstance(names, str) else names or ():
        try:
            check_name(str(name))
        except VLPromptError as error:
            problems.append(f"data.name: {error}")

    return problems


def _method_problems(methods: Mapping[str, Any]) -> list[str]:
    problems = []
    for label, row in methods.items():
        if not isinstance(row, Mapping):  # null leaves a method out; anything else is a mistake of its type
            continue
        options = dict(row)
        try:
            scanner = SCANNERS.get(str(options.pop("name", label))).target
            check_options(scanner, options, f"methods.{label}")
            problems += [f"methods.{label}.{problem}" for problem in scanner.option_problems(options)]
        except ConfigError as error:
            problems += [f"methods.{label}.{problem}" for problem in error.problems]
        except UnknownNameError as error:
            problems.append(f"methods.{label}: {error}")

    return problems


def _variant_problems(variants: Mapping[str, Any]) -> list[str]:
    problems = []
    for label, changes in variants.items():
        if not isinstance(changes, Mapping):
            continue
        try:
            CompositionOptions(**changes)
        except ValidationError as error:
            problems += describe_problems(error, CompositionOptions, f"variants.{label}")
        problems += _trigger_problems(changes.get("triggers"), f"variants.{label}.triggers")

    return problems


def _trigger_problems(triggers: Any, key: str) -> list[str]:
    if not isinstance(triggers, Sequence) or not all(isinstance(name, str) for name in triggers):
        return []  # not given, or a mistake of its type

    try:
        check_triggers(triggers)
    except VLPromptError as error:
        return [f"{key}: {error}"]

    return []


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = content.get(name)
    return section if isinstance(section, Mapping) else {}
