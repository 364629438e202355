"""Configurations: YAML with ``_base_`` composition and dotted overrides, validated as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.options import check_options, describe_problems
from vlprompt.data.transforms import Augmentation
from vlprompt.experiments.config import BackboneOptions, read_yaml
from vlprompt.learners import LEARNERS
from vlprompt.meta.options import MetaOptions
from vlprompt.meta.regulators import REGULATORS
from vlprompt.training.options import MultiTaskOptions, TargetOptions, TrainOptions

__all__ = [
    "DataOptions",
    "ProtocolOptions",
    "RunConfig",
    "load_config",
]

_STRICT = ConfigDict(extra="forbid", frozen=True)
_ARGUMENTS = (
    "root",
    "sampling",
    "on_bad_image",
    "strict_shots",
    "classnames",
    "templates",
)  # of load_dataset


class DataOptions(BaseModel):
    """The ``data:`` section: what to train and test on."""

    model_config = _STRICT

    name: str | list[str] = Field("scenes/shape", description="catalogue name(s), folder:PATH or csv:PATH")
    also_test: dict[str, str] = Field(
        default_factory=dict, description="label to a name with the same classes"
    )
    root: str | None = Field(None, description="where data sets lie")
    validate_on: Literal["val", "none"] = Field("val", description="split for curves and select=best")
    sampling: Literal["auto", "private", "coop_compat", "elevater"] = "auto"
    on_bad_image: Literal["skip", "error"] = "skip"
    strict_shots: bool = False
    augmentation: str = Field(
        "none", description="none, flip, crop_flip, or crop_flip:SHARE (the least a crop keeps)"
    )
    views: int = Field(
        1, ge=0, description="fixed augmented views per image; 0: new ones every epoch, no caching"
    )
    cache_dir: str | None = Field(None, description="where image embeddings are kept between runs")
    classnames: list[str] | dict[str, str] | None = Field(
        None, description="replace class names, all or by old name"
    )
    templates: list[str] | None = Field(None, description="replace the hand-written templates")
    options: dict[str, Any] = Field(
        default_factory=dict, description="what only this kind of data set takes, for example {size: 64}"
    )

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
        taken = {"name", "split", "shots", "seed", "classes", "download", "max_bad_share", *_ARGUMENTS}
        if wrong := sorted(taken & value.keys()):
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
        return {**{k: getattr(self, k) for k in _ARGUMENTS}, **self.options}


class ProtocolOptions(BaseModel):
    """The ``protocol:`` section: which runs make up the result."""

    model_config = _STRICT

    name: Literal[
        "coop-fewshot",
        "base-to-new",
        "cross-dataset",
        "domain-generalisation",
        "elevater",
        "multitask",
        "transfer",
        "meta",
    ] = "coop-fewshot"
    shots: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [16], min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [1], min_length=1)
    targets: list[str] = Field(
        default_factory=list,
        description="cross-dataset, domain-generalisation: data sets to score what data.name taught",
    )


class RunConfig(BaseModel):
    """A whole run; what ``tools/train.py --cfg`` reads."""

    model_config = _STRICT

    name: str = Field("run", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    learner: dict[str, Any] = Field(
        default_factory=lambda: {"name": "coop"}, description="name and the method's options"
    )
    data: DataOptions = Field(default_factory=DataOptions)
    train: TrainOptions = Field(default_factory=TrainOptions)
    protocol: ProtocolOptions = Field(default_factory=ProtocolOptions)
    multitask: MultiTaskOptions = Field(default_factory=MultiTaskOptions)
    target: TargetOptions = Field(default_factory=TargetOptions)
    meta: MetaOptions = Field(default_factory=MetaOptions)

    @property
    def learner_name(self) -> str:
        """The learner's registry name."""
        return str(self.learner["name"])

    @property
    def learner_options(self) -> dict[str, Any]:
        """The learner's own options."""
        return {k: v for k, v in self.learner.items() if k != "name"}


def load_config(cfg: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, compose, override and validate a configuration.

    Args:
        cfg: A path, or the name of a file in the configs folder.
        overrides: ``dotted.key=value`` strings; values are YAML (``train.lr=0.01``,
            ``protocol.seeds=[1,2,3]``).

    Raises:
        ConfigError: With every mistake at once, in all sections, and the nearest valid keys and names.
        UnknownNameError: If there is no such file.
    """
    raw = read_yaml(cfg, overrides, "train")
    problems: list[str] = []
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems += describe_problems(error, RunConfig)
    problems += _learner_problems(raw.get("learner", {}))
    problems += _name_problems(raw)
    problems += _stage_problems(config) if config is not None else []
    if problems or config is None:
        raise ConfigError(problems, str(cfg))
    return config


def _learner_problems(section: Any) -> list[str]:
    if not isinstance(section, dict):
        return []
    if "name" not in section:
        return ["learner.name: required, but missing."] if section else []
    try:
        target = LEARNERS.get(str(section["name"])).target
        check_options(target, {k: v for k, v in section.items() if k != "name"}, "learner")
    except UnknownNameError as error:
        return [f"learner.name: {error}"]
    except ConfigError as error:
        return [f"learner.{problem}" for problem in error.problems]
    return []


def _stage_problems(config: RunConfig) -> list[str]:
    """Check what only the protocols of several stages use, and only together."""
    protocol, problems = config.protocol.name, []
    groups, names = config.multitask.groups, config.data.names
    if protocol != "multitask":
        used = {"multitask.groups": groups, "target.names": config.target.names}
        problems += [
            f"{key}: only protocol.name=multitask uses it, not {protocol}." for key, v in used.items() if v
        ]
    elif groups and config.target.names:
        problems.append("target.names: targets start from one source; leave multitask.groups empty.")
    for group, members in groups.items():
        strange = [m for m in members if m not in names]
        problems += [
            f"multitask.groups.{group}: {UnknownNameError('data set of data.name', m, names)}"
            for m in strange
        ]
        problems += [f"multitask.groups.{group}: a group needs at least one data set."] if not members else []
    if protocol == "transfer" and (len(names) < 2 or len(config.protocol.shots) != 1):
        problems.append("protocol.name: transfer needs at least two data sets and one number of shots.")
    across = protocol in ("cross-dataset", "domain-generalisation")
    if across != bool(config.protocol.targets):
        problems.append(
            f"protocol.targets: {protocol} needs at least one data set to score."
            if across
            else f"protocol.targets: only cross-dataset and domain-generalisation use it, not {protocol}."
        )
    if across and names == config.protocol.targets[:1] == config.protocol.targets:
        problems.append(f"protocol.targets: {names[0]} is what {protocol} trains on; name another data set.")
    if protocol == "elevater" and config.data.sampling == "coop_compat":
        problems.append("data.sampling: elevater draws in its own way; leave it out.")
    if config.target.compare_scratch and protocol != "multitask" and not config.target.patterns:
        problems.append("target.compare_scratch: without target.init_from everything starts from scratch.")
    problems += _meta_problems(config)
    if config.target.shots and not config.target.names:
        problems.append("target.shots: they are the shots of target.names, which is empty.")
    return problems


def _meta_problems(config: RunConfig) -> list[str]:
    """Check what only meta-training uses, and what starts from it."""
    problems, init = [], config.train.init
    if (config.protocol.name == "meta") != bool(config.meta.pairs):
        problems.append(
            "meta.pairs: required by protocol.name=meta (scenes:COUNT, folder:PATH, csv:PATH or tar:PATTERN)."
            if not config.meta.pairs
            else f"meta.pairs: only protocol.name=meta uses it, not {config.protocol.name}."
        )
    try:
        regulator = dict(config.meta.regulator)
        check_options(REGULATORS.get(str(regulator.pop("name", ""))).target, regulator, "regulator")
    except UnknownNameError as error:
        problems.append(f"meta.regulator.name: {error}")
    except ConfigError as error:
        problems += [f"meta.regulator.{problem}" for problem in error.problems]
    if init and not init.startswith("gram:"):
        problems.append(f"train.init: got {init!r}; write gram:PATH. Other saved prompts: target.init_from.")
    if init and (config.target.patterns or config.protocol.name in ("meta", "transfer")):
        problems.append("train.init: one start only; leave target.init_from, protocol meta and transfer out.")
    return problems


def _name_problems(raw: dict[str, Any]) -> list[str]:
    """Check names of backbones and data sets, without building any."""
    from vlprompt.backbones import list_backbones
    from vlprompt.data.catalog import check_name

    problems = []
    section = raw.get("backbone") or {}
    backbone = section.get("name", "tiny") if isinstance(section, dict) else None
    if isinstance(backbone, str) and backbone not in (known := list_backbones()):
        problems.append(f"backbone.name: {UnknownNameError('backbone', backbone, known)}")
    section = raw.get("data") or {}
    names = section.get("name", []) if isinstance(section, dict) else []
    also = section.get("also_test", {}) if isinstance(section, dict) else {}
    listed = [names] if isinstance(names, str) else names if isinstance(names, list) else []
    listed = [*listed, *(also.values() if isinstance(also, dict) else [])]
    target = raw.get("target") or {}
    targets = target.get("names") or [] if isinstance(target, dict) else []
    protocol = raw.get("protocol") or {}
    scored = protocol.get("targets") or [] if isinstance(protocol, dict) else []
    places = [("data.name", listed), ("target.names", targets if isinstance(targets, list) else [])]
    places.append(("protocol.targets", scored if isinstance(scored, list) else []))
    for key, name in ((key, name) for key, names in places for name in names):
        try:
            check_name(str(name))
        except VLPromptError as error:
            problems.append(f"{key}: {error}")
    return problems
