"""Configurations of classification: one learner or several methods, a protocol, and what they train on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator
from typing_extensions import Self

from vlprompt.classification.distil import distil_problems
from vlprompt.classification.learner_section import learner_problems
from vlprompt.classification.options import (
    DistilOptions,
    MultiTaskOptions,
    ProtocolOptions,
    StudyTrainSection,
    TargetOptions,
)
from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.names import checked_names
from vlprompt.core.options import check_options, describe_problems
from vlprompt.data.cache import PREFIX_GIB
from vlprompt.data.names import check_name
from vlprompt.data.transforms import Augmentation
from vlprompt.experiments.backbone import backbone_problems
from vlprompt.experiments.config import (
    BackboneOptions,
    ExperimentConfig,
    ImageOptions,
    Templates,
    compose,
    merge,
)
from vlprompt.learners import LEARNERS
from vlprompt.meta.options import MetaOptions
from vlprompt.meta.regulators import REGULATORS

__all__ = ["BEFORE", "ClassificationConfig", "DataOptions", "ProtocolOptions", "Study", "load_config"]

BEFORE = "before"
"""The setting of what runs first and is no method."""

# Of load_dataset.
_ARGUMENTS = (*ImageOptions.model_fields, "sampling", "strict_shots", "classnames", "templates")
_OF_A_METHOD = (
    "backbone",
    "learner",
    "train",
    "data",
    "meta",
    "target",
    "distil",
)  # sections that a row may change
_OF_A_METHODS_DATA = ("augmentation", "views")
_OF_A_SETTING = frozenset({"data", "protocol"})
_SEVERAL_STAGES = ("multitask", "transfer", "meta")  # their stages share one training, which no search covers
_ACROSS = ("cross-dataset", "domain-generalisation")


class DataOptions(ImageOptions):
    """The ``data:`` section: what to train and test on."""

    name: str | list[str] = Field(
        "scenes/shape", description="catalogue name(s), folder:PATH, csv:PATH or tar:PATTERN"
    )
    also_test: dict[str, str] = Field(
        default_factory=dict, description="label to a name with the same classes"
    )
    split: Literal["val", "test"] = Field("test", description="what is scored; val while anything is chosen")
    validate_on: Literal["val", "none"] = Field("val", description="split for curves and select=best")
    sampling: Literal["auto", "private", "coop_compat", "elevater"] = "auto"
    strict_shots: bool = False
    augmentation: str = Field(
        "none", description="none, flip, crop_flip, or crop_flip:SHARE (the least a crop keeps)"
    )
    several_labels: Literal["auto", "together", "split"] = Field(
        "auto",
        description="images with several labels; together: one sample, binary cross entropy; split: a sample for each "
        "label; auto: together where the learner's loss can, but split as ELEVATER draws",
    )
    views: int = Field(
        1, ge=0, description="fixed augmented views per image; 0: new ones every epoch, no caching"
    )
    cache_dir: str | None = Field(None, description="where image features are kept between runs")
    prefix_gib: float = Field(PREFIX_GIB, ge=0, description="GiB of frozen prefixes to keep; 0: none")
    classnames: list[str] | dict[str, str] | None = Field(
        None, description="replace class names, all or by old name"
    )
    templates: Templates = Field(None, description="replace the hand-written templates")
    options: dict[str, Any] = Field(
        default_factory=dict, description="what only this kind of data set takes, for example {size: 64}"
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("it needs at least one data set.")
        return value

    @field_validator("classnames", mode="before")
    @classmethod
    def _check_classnames(cls, value: Any) -> Any:
        return checked_names(value)

    @field_validator("augmentation")
    @classmethod
    def _check_augmentation(cls, value: str) -> str:
        try:
            Augmentation.parse(value)
        except VLPromptError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("options")
    @classmethod
    def _check_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        set_elsewhere = {
            "name",
            "split",
            "shots",
            "seed",
            "classes",
            "download",
            "validation",
            *_ARGUMENTS,
        }
        if wrong := sorted(set_elsewhere & value.keys()):
            raise ValueError(
                f"{wrong[0]!r} is no option of one kind of data set; it is set elsewhere or not at all."
            )

        return value

    @property
    def names(self) -> list[str]:
        """The data sets as a list."""
        return [self.name] if isinstance(self.name, str) else list(self.name)

    def arguments(self) -> dict[str, Any]:
        """Return what :func:`vlprompt.load_dataset` takes for every split."""
        return {**self.model_dump(include=set(_ARGUMENTS)), **self.options}


@dataclass(frozen=True)
class Study:
    """One learner under one protocol: a part of a configuration.

    Attributes:
        method: Label of the learner.
        config: A configuration without ``methods``, ``settings`` and ``before``.
        setting: Title of the setting it belongs to; None where there is only one.
    """

    method: str
    config: ClassificationConfig
    setting: str | None = None


class ClassificationConfig(ExperimentConfig):
    """A whole experiment: one ``learner``, or several ``methods`` on the same data under the same protocol."""

    expected_task: ClassVar[str] = "classification"

    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    learner: dict[str, Any] = Field(
        default_factory=dict,
        description="name and the method's options; with: plug-ins around it, each with its name and options; coop "
        "unless there are methods",
    )
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="several learners in place of one: label to a learner's options; name is the label unless it is "
        "set; a label with * stands for all learners whose names match and that have no row of their own. "
        "cfg: a file whose learner is taken. backbone, train, data, distil, meta, target: what differs for this method",
    )
    data: DataOptions = Field(default_factory=DataOptions)
    train: StudyTrainSection = Field(default_factory=StudyTrainSection)
    protocol: ProtocolOptions = Field(default_factory=ProtocolOptions)
    multitask: MultiTaskOptions = Field(default_factory=MultiTaskOptions)
    target: TargetOptions = Field(default_factory=TargetOptions)
    distil: DistilOptions = Field(default_factory=DistilOptions)
    meta: MetaOptions = Field(default_factory=MetaOptions)
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="title to what differs in data and protocol: all methods run in each of these settings",
    )
    before: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="label to a run that comes first and is no method, for example a meta-training; cfg: its file, "
        "other keys: what differs. A method starts from it by train.init=gram:LABEL, or learns from it by "
        "distil.teacher=LABEL",
    )

    @classmethod
    def parse(cls, raw: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> Self:
        """See :meth:`ExperimentConfig.parse`; a method takes its file, then the whole file, then its own keys.

        What is written on the command line takes precedence over all of them.
        """
        content = dict(raw)
        protocol = merge(content, overrides).get("protocol")
        name = protocol.get("name") if isinstance(protocol, Mapping) else None
        automatic = "train" not in merge(content, overrides) and name not in (
            *_SEVERAL_STAGES,
            "class-incremental",
        )

        rows = content.get("methods")
        if isinstance(rows, Mapping):
            methods = {
                label: _resolved_method(label, row or {}, content, overrides)
                for label, row in _every_method(rows).items()
            }
            # A method whose file or row says how it is trained is trained so.
            recipe = {"train": {"recipe": "auto"}} if automatic else {}
            content["methods"] = {label: recipe | method for label, method in methods.items()}
        elif automatic:
            content["train"] = {"recipe": "auto"}

        stages = content.get("before")
        if isinstance(stages, Mapping):
            content["before"] = {label: _resolved_stage(row or {}) for label, row in stages.items()}
        return super().parse(content, overrides, source)

    @classmethod
    def raw_problems(cls, content: Mapping[str, Any]) -> list[str]:
        """See :meth:`ExperimentConfig.raw_problems`: names and options of learners, backbones and data sets."""
        problems = super().raw_problems(content)
        if not content.get("methods"):
            problems += learner_problems(content.get("learner", {}))
        elif content.get("learner"):
            problems.append("learner: a file has one learner or several methods, not both.")
        return [*problems, *_name_problems(content)]

    @property
    def learner_name(self) -> str:
        """The learner's registry name."""
        return str(self.learner.get("name", "coop"))

    @property
    def learner_options(self) -> dict[str, Any]:
        """The learner's own options, and ``with``."""
        return {key: value for key, value in self.learner.items() if key != "name"}

    def studies(self) -> list[Study]:
        """Return every learner under every protocol, in the order in which they run.

        Raises:
            ConfigError: With the mistakes of all of them.
        """
        studies: list[Study] = []
        problems: list[str] = []

        for setting, method, content in self._contents():
            where = f"{setting}, {method}" if setting else method
            mistakes = type(self).raw_problems(content)

            try:
                config = type(self).model_validate(content)
            except ValidationError as error:
                mistakes += describe_problems(error, type(self))
            else:
                mistakes += config._own_problems()
                studies.append(Study(method, config, setting))

            problems += [f"{where}: {mistake}" for mistake in mistakes]

        if problems:
            raise ConfigError(problems, self.name)
        return studies

    def baselines(self) -> dict[str, tuple[str, ...]]:
        """Return method to the methods that its gains are over."""
        baseline = self.protocol.baseline
        if baseline is None:
            return {}
        if isinstance(baseline, str):
            return {label: (baseline,) for label in self.methods if label != baseline}
        return {
            label: (others,) if isinstance(others, str) else tuple(others)
            for label, others in baseline.items()
        }

    def problems(self) -> list[str]:
        """See :meth:`ExperimentConfig.problems`."""
        if not (self.methods or self.settings or self.before):
            return self._own_problems()

        problems: list[str] = []
        if self.before and not self.methods:
            problems.append("before: only methods start from it; name some.")

        for title, changes in self.settings.items():
            for key in changes.keys() - _OF_A_SETTING:
                problems.append(
                    f"settings.{title}.{key}: a setting changes {' and '.join(sorted(_OF_A_SETTING))} only."
                )

        for label, baselines in self.baselines().items():
            for name in (label, *baselines):
                if name not in self.methods:
                    problems.append(f"protocol.baseline: {UnknownNameError('method', name, self.methods)}")

        try:
            self.studies()
        except ConfigError as error:
            problems += error.problems

        return problems

    def _contents(self) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
        """Yield setting, method and content of every study's configuration."""
        for label, stage in self.before.items():
            yield BEFORE, label, {**stage, "task": self.task, "name": self.name}

        whole = self.model_dump(mode="json", exclude={"methods", "settings", "before", "search", "expect"})
        whole["protocol"]["baseline"] = None

        settings: list[tuple[str | None, dict[str, Any]]] = [*self.settings.items()] or [(None, {})]
        for title, changes in settings:
            content = merge(whole, changes)
            if not self.methods:
                yield title, self.learner_name, content
            for label, row in self.methods.items():
                yield title, label, _with_method(content, label, row)

    def _own_problems(self) -> list[str]:
        problems = distil_problems(self.distil, self.learner_name, self.protocol.name, self.train)
        return [*_stage_problems(self), *_meta_problems(self), *_validation_problems(self), *problems]


def _validation_problems(config: ClassificationConfig) -> list[str]:
    """Refuse to choose the epoch on validation data that the run leaves alone."""
    if config.train.select == "best" and config.data.validate_on == "none":
        return [
            "train.select: best chooses on validation data, and data.validate_on is none; write train.select=last or "
            "data.validate_on=val."
        ]
    return []


def load_config(cfg: str | Path, overrides: Sequence[str] = ()) -> ClassificationConfig:
    """Read, compose, override and validate a configuration of classification.

    Args:
        cfg: A path, or the name of a shipped file.
        overrides: See :meth:`ExperimentConfig.read`.

    Raises:
        ConfigError: With every mistake at once, in all sections, and the nearest valid keys and names.
        UnknownNameError: If there is no such file.
    """
    return ClassificationConfig.read(cfg, overrides)


def _every_method(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the methods, with a row for every learner that a label with ``*`` stands for."""
    methods: dict[str, Any] = {}
    for label, row in rows.items():
        # A pattern that nothing matches stays, and is refused as the name of a learner.
        names = [name for name in LEARNERS.names(label) if name not in rows] if "*" in label else []
        methods |= dict.fromkeys(names or [label], row)
    return methods


def _resolved_method(
    label: str, row: Mapping[str, Any], content: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a method that needs no other file.

    Later levels take precedence: the method's file, the sections of the whole, its own keys, the command line.
    """
    options = {key: value for key, value in row.items() if key not in (*_OF_A_METHOD, "cfg")}
    sections: dict[str, Any] = {}

    if "cfg" in row:
        file = compose(str(row["cfg"]))
        sections = {key: file[key] for key in _OF_A_METHOD if key in file}
    elif "name" not in options:
        options["name"] = label

    # Without a file of its own a method stands above the whole anyway (see :func:`_with_method`).
    levels = (content, row, overrides) if "cfg" in row else (row, overrides)
    for level in levels:
        sections = merge(
            sections, {key: level[key] for key in _OF_A_METHOD if key in level and key != "learner"}
        )

    learner = merge({"learner": sections.pop("learner", {})}, {"learner": options})["learner"]

    if "data" in sections:  # what a method trains on is the whole's; how images are augmented may be its own
        sections["data"] = {
            key: value for key, value in sections["data"].items() if key in _OF_A_METHODS_DATA
        }

    return {**learner, **{key: value for key, value in sections.items() if value}}


def _resolved_stage(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage that comes first, as the whole content of its configuration."""
    changes = {key: value for key, value in row.items() if key != "cfg"}
    if "cfg" not in row:
        return changes
    content = compose(str(row["cfg"]))
    content.pop("expect", None)  # figures of the file, not of a run that changes it
    return merge(content, changes)


def _with_method(content: Mapping[str, Any], label: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of one method's own configuration."""
    sections = {key: value for key, value in row.items() if key in _OF_A_METHOD}
    learner = {key: value for key, value in row.items() if key not in _OF_A_METHOD}
    whole = {key: value for key, value in content.items() if key != "learner"}
    return {**merge(whole, sections), "learner": {"name": label, **learner}}


def _stage_problems(config: ClassificationConfig) -> list[str]:
    """Check what only the protocols of several stages use, and only together."""
    protocol = config.protocol.name
    names = config.data.names
    problems = _multitask_problems(config)

    problems += _incremental_problems(config) if protocol == "class-incremental" else []
    if protocol in _SEVERAL_STAGES and config.train.recipe != "none":
        problems.append(f"train.recipe: {protocol} trains several tasks together; write the options.")

    if protocol == "transfer" and (len(names) < 2 or len(config.protocol.shots) != 1):
        problems.append("protocol.name: transfer needs at least two data sets and one number of shots.")
    if protocol == "elevater" and config.data.sampling == "coop_compat":
        problems.append("data.sampling: elevater draws in its own way; leave it out.")
    if config.target.compare_scratch and protocol != "multitask" and not config.target.patterns:
        problems.append("target.compare_scratch: without target.init_from everything starts from scratch.")
    if config.target.shots and not config.target.names:
        problems.append("target.shots: they are the shots of target.names, which is empty.")

    targets = config.protocol.targets
    if protocol in _ACROSS and not targets:
        problems.append(f"protocol.targets: {protocol} needs at least one data set to score.")

    if protocol not in _ACROSS and targets:
        problems.append(
            f"protocol.targets: only cross-dataset and domain-generalisation use it, not {protocol}."
        )

    if protocol in _ACROSS and len(targets) == 1 and names == targets:
        problems.append(f"protocol.targets: {names[0]} is what {protocol} trains on; name another data set.")
    return problems


def _incremental_problems(config: ClassificationConfig) -> list[str]:
    used = {
        "train.recipe": config.train.recipe != "none",  # of few-shot tasks
        "train.init": config.train.init,
        "protocol.shots": config.protocol.shots != ProtocolOptions().shots,  # a session has all of its images
        "data.also_test": config.data.also_test,
        "target.compare_scratch": config.target.compare_scratch,
    }
    return [
        f"{key}: class-incremental does not use it; leave it out." for key, value in used.items() if value
    ]


def _multitask_problems(config: ClassificationConfig) -> list[str]:
    protocol = config.protocol.name
    names = config.data.names
    groups = config.multitask.groups
    problems = []

    if protocol != "multitask":
        used = {"multitask.groups": groups, "target.names": config.target.names}
        problems += [
            f"{key}: only protocol.name=multitask uses it, not {protocol}."
            for key, value in used.items()
            if value
        ]
    elif groups and config.target.names:
        problems.append("target.names: targets start from one source; leave multitask.groups empty.")

    for group, members in groups.items():
        if not members:
            problems.append(f"multitask.groups.{group}: a group needs at least one data set.")
        for member in members:
            if member not in names:
                unknown = UnknownNameError("data set of data.name", member, names)
                problems.append(f"multitask.groups.{group}: {unknown}")

    return problems


def _meta_problems(config: ClassificationConfig) -> list[str]:
    """Check what only meta-training uses, and what starts from it."""
    problems = []
    protocol = config.protocol.name
    if protocol == "meta" and not config.meta.pairs:
        problems.append(
            "meta.pairs: required by protocol.name=meta (scenes:COUNT, folder:PATH, csv:PATH or tar:PATTERN)."
        )
    if protocol != "meta" and config.meta.pairs:
        problems.append(f"meta.pairs: only protocol.name=meta uses it, not {protocol}.")

    regulator = dict(config.meta.regulator)
    try:
        check_options(REGULATORS.get(str(regulator.pop("name", ""))).target, regulator, "regulator")
    except UnknownNameError as error:
        problems.append(f"meta.regulator.name: {error}")
    except ConfigError as error:
        problems += [f"meta.regulator.{problem}" for problem in error.problems]

    init = config.train.init
    if init and not init.startswith("gram:"):
        problems.append(f"train.init: got {init!r}; write gram:PATH. Other saved prompts: target.init_from.")
    if init and (config.target.patterns or protocol in ("meta", "transfer")):
        problems.append("train.init: one start only; leave target.init_from, protocol meta and transfer out.")
    return problems


def _name_problems(content: Mapping[str, Any]) -> list[str]:
    """Check names of backbones and data sets, without building any."""
    problems = backbone_problems(content)
    also_test = _section(content, "data").get("also_test", {})
    names = [("data.name", name) for name in _listed(_section(content, "data").get("name", []))]
    names += [("data.name", name) for name in (also_test.values() if isinstance(also_test, Mapping) else ())]
    names += [("target.names", name) for name in _listed(_section(content, "target").get("names", []))]

    names += [
        ("protocol.targets", name) for name in _listed(_section(content, "protocol").get("targets", []))
    ]
    for key, name in names:
        try:
            check_name(str(name))
        except VLPromptError as error:
            problems.append(f"{key}: {error}")

    return problems


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = content.get(name)
    return section if isinstance(section, Mapping) else {}


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, list) else []
