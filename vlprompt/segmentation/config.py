"""Configurations of segmentation runs, validated as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.options import check_options, describe_problems, options_model
from vlprompt.data.names import check_name
from vlprompt.data.segmentation.augment import JointAugmentation
from vlprompt.experiments.old_config import BackboneOptions, read_yaml
from vlprompt.segmentation import SEGMENTERS, STRATEGIES
from vlprompt.segmentation.fit import SegmentTrainOptions
from vlprompt.segmentation.losses import LossName

__all__ = [
    "ModelSpec",
    "PairsOptions",
    "SearchOptions",
    "SegmentConfig",
    "StrategySpec",
    "load_segment_config",
]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class PairsOptions(BaseModel):
    """The ``data:`` section: what to train and test on."""

    model_config = _STRICT

    names: list[str] = Field(
        min_length=1,
        description="catalogue names, scenes/masks@STYLE, pairs:PATH, prompts:PATH or per_class:PATH",
    )
    images: int | None = Field(None, ge=1, description="training images that are drawn; empty: all")
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
    leaks: Literal["mend", "keep"] = "mend"
    empty: Literal["keep", "drop", "error"] = "keep"
    augmentation: str = Field("none", description="none or slight; slight rules caching out")
    options: dict[str, Any] = Field(
        default_factory=dict, description="of the data sets' sources: prompt, threshold, size, on_missing ..."
    )

    def arguments(self) -> dict[str, Any]:
        """Return what :func:`load_segmentation` takes for every split."""
        keys = ("root", "queries", "phrase", "full_stop", "leaks", "empty")
        return {**{k: getattr(self, k) for k in keys}, **self.options}


class Dimension(BaseModel):
    """One searched option: a range of numbers or a choice."""

    model_config = _STRICT

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: list[Any] | None = Field(None, min_length=1)


class SearchOptions(BaseModel):
    """The ``search:`` section: TuneVLSeg's, 20 trials of which 10 are random, the least validation loss wins."""

    model_config = _STRICT

    trials: int = Field(20, ge=1)
    startup: int = Field(10, ge=1, description="random trials before the sampler learns from them")
    seed: int = Field(12345, ge=0)
    pruned: bool = Field(
        True, description="end trials that are worse than the median of the others at that epoch"
    )
    space: dict[str, Dimension] = Field(
        default_factory=lambda: {
            "train.lr": Dimension(low=1e-5, high=5e-3, log=True),
            "train.weight_decay": Dimension(low=1e-5, high=1e-2, log=True),
            "depth": Dimension(low=1, high=11),
        },
        description="train.KEY, or an option of model or strategy; what a strategy lacks is left out for it",
    )
    own: dict[str, dict[str, Dimension]] = Field(
        default_factory=dict, description="strategy label to further dimensions"
    )


@dataclass(frozen=True)
class ModelSpec:
    """One model of a run: its registry name, backbone, options, and the strategies it is run with."""

    name: str
    backbone: BackboneOptions
    options: dict[str, Any]
    strategies: tuple[str, ...] | None


@dataclass(frozen=True)
class StrategySpec:
    """One strategy of a run: its registry name, options, and what it trains differently."""

    name: str
    options: dict[str, Any]
    train: dict[str, Any]


class SegmentConfig(BaseModel):
    """A whole run; what ``tools/segment.py bench --cfg`` reads."""

    model_config = _STRICT

    name: str = Field("segment", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    models: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="label to the model's options; name is the label unless it is given; backbone: a name or section; "
        "strategies: labels of those to run, all if it is left out",
    )
    strategies: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="label to the strategy's options; name is the label unless it is given; train: what it trains "
        "differently",
    )
    data: PairsOptions
    train: SegmentTrainOptions = Field(default_factory=SegmentTrainOptions)
    loss: LossName = "dice_bce"
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [1], min_length=1)
    depths: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list,
        description="prompt depths to compare, for strategies that have one; drawn as a figure",
    )
    baseline: str = Field("zero_shot", description="strategy that gains are counted from")
    boundary: bool = Field(True, description="measure the distance of boundaries on the test data")
    overlays: int = Field(4, ge=0, description="test images that are drawn with their masks")
    search: SearchOptions = Field(default_factory=SearchOptions)

    def model(self, label: str) -> ModelSpec:
        """Return one model."""
        given = dict(self.models[label])
        name, backbone, some = (
            given.pop("name", label),
            given.pop("backbone", "tiny"),
            given.pop("strategies", None),
        )
        section = {"name": backbone} if isinstance(backbone, str) else backbone
        parsed = BackboneOptions.model_validate(section)
        return ModelSpec(str(name), parsed, given, None if some is None else tuple(some))

    def strategy(self, label: str) -> StrategySpec:
        """Return one strategy."""
        given = dict(self.strategies[label])
        train = given.pop("train", {})
        return StrategySpec(str(given.pop("name", label)), given, dict(train))

    def pairs(self) -> list[tuple[str, str]]:
        """Return (model, strategy) labels in order, without what a model isn't run with."""
        return [
            (m, s)
            for m in self.models
            for s in self.strategies
            if (only := self.model(m).strategies) is None or s in only
        ]

    def train_options(self, strategy: str, **changes: Any) -> dict[str, Any]:
        """Return the training options of a strategy."""
        return {**self.train.model_dump(), **self.strategy(strategy).train, **changes}


def load_segment_config(cfg: str | Path, overrides: Sequence[str] = ()) -> SegmentConfig:
    """Read a configuration file (see :func:`vlprompt.experiments.old_config.read_yaml`).

    Raises:
        ConfigError: With every mistake at once, in all sections, and the nearest valid keys and names.
        UnknownNameError: If there is no such file.
    """
    raw = read_yaml(cfg, overrides)
    for section in ("models", "strategies"):  # null takes an entry of a base out
        if isinstance(raw.get(section), dict):
            raw[section] = {label: options for label, options in raw[section].items() if options is not None}
    try:
        config = SegmentConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, SegmentConfig), str(cfg)) from error
    problems = [*_model_problems(config), *_strategy_problems(config), *_data_problems(config)]
    if not problems:
        problems = _search_problems(config)
    if problems:
        raise ConfigError(problems, str(cfg))
    return config


def _model_problems(config: SegmentConfig) -> list[str]:
    from vlprompt.backbones import list_backbones

    problems = []
    for label in config.models:
        try:
            spec = config.model(label)
        except ValidationError as error:
            problems += describe_problems(error, BackboneOptions, f"models.{label}.backbone")
            continue
        if spec.backbone.name not in (known := list_backbones()):
            problems.append(
                f"models.{label}.backbone: {UnknownNameError('backbone', spec.backbone.name, known)}"
            )
        problems += _option_problems(f"models.{label}", SEGMENTERS, spec.name, spec.options)
        for strange in [s for s in spec.strategies or () if s not in config.strategies]:
            problems.append(
                f"models.{label}.strategies: {UnknownNameError('strategy', strange, config.strategies)}"
            )
    return problems


def _strategy_problems(config: SegmentConfig) -> list[str]:
    problems = []
    for label in config.strategies:
        spec = config.strategy(label)
        problems += _option_problems(f"strategies.{label}", STRATEGIES, spec.name, spec.options)
        try:
            SegmentTrainOptions(**{**config.train.model_dump(), **spec.train})
        except ValidationError as error:
            problems += describe_problems(error, SegmentTrainOptions, f"strategies.{label}.train")
    if config.baseline not in config.strategies and config.baseline != "zero_shot":
        problems.append(f"baseline: {UnknownNameError('strategy', config.baseline, config.strategies)}")
    return problems


def _option_problems(where: str, registry: Any, name: str, options: Mapping[str, Any]) -> list[str]:
    try:
        check_options(registry.get(name).target, options, where)
    except ConfigError as error:
        return [f"{where}.{problem}" for problem in error.problems]
    except VLPromptError as error:
        return [f"{where}: {error}"]
    return []


def _data_problems(config: SegmentConfig) -> list[str]:
    problems = []
    for name in config.data.names:
        try:
            check_name(name, "segmentation")
        except VLPromptError as error:
            problems.append(f"data.names: {error}")
    try:
        JointAugmentation(config.data.augmentation)
    except VLPromptError as error:
        problems.append(f"data.augmentation: {error}")
    if config.data.argmax and config.data.queries != "all":
        problems.append("data.argmax: classes can only compete if all are asked for; set data.queries=all.")
    return problems


def _search_problems(config: SegmentConfig) -> list[str]:
    problems = []
    strange = [label for label in config.search.own if label not in config.strategies]
    problems += [f"search.own: {UnknownNameError('strategy', label, config.strategies)}" for label in strange]
    known = {f"train.{k}" for k in SegmentTrainOptions.model_fields}
    for model in config.models:
        known |= options_model(SEGMENTERS.get(config.model(model).name).target).model_fields.keys()
    for strategy in config.strategies:
        known |= options_model(STRATEGIES.get(config.strategy(strategy).name).target).model_fields.keys()
    spaces = {"search.space": config.search.space}
    spaces |= {f"search.own.{label}": space for label, space in config.search.own.items()}
    for where, space in spaces.items():
        for key, dimension in space.items():
            if key not in known and not (where == "search.space" and key == "depth"):
                problems.append(f"{where}: {UnknownNameError('option', key, known)}")
            ranged = (
                dimension.low is not None and dimension.high is not None and dimension.low < dimension.high
            )
            if ranged == (dimension.choices is not None):
                problems.append(f"{where}.{key}: give low and high with low < high, or choices.")
    return problems
