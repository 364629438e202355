"""Configurations of detection tables, validated as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.core.options import check_options, describe_problems
from vlprompt.data.names import check_name
from vlprompt.experiments.old_config import BackboneOptions, ToolConfig
from vlprompt.learners.dbom import DEFAULT_TRIGGERS
from vlprompt.security.compositions import check_triggers
from vlprompt.security.scanners import SCANNERS

__all__ = ["DetectorsConfig", "SuspectOptions"]

_STRICT = ConfigDict(extra="forbid", frozen=True)


class PairOptions(BaseModel):
    """The ``pairs:`` section: what detectors learn from and are tested on."""

    model_config = _STRICT

    triggers: list[str] = Field(
        default_factory=lambda: list(DEFAULT_TRIGGERS), description="the first is clean"
    )
    native_size: int = Field(32, ge=8, description="pixels a side at which triggers are put in")
    unseen: float = Field(0.3, ge=0, lt=1, description="share of triggered pairs kept from training")
    copies: int = Field(
        7,
        ge=1,
        description="triggered images per training image, each with another trigger; one to test on",
    )
    share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of the train split that detectors learn from; the rest is the suspect's",
    )


class SuspectOptions(BaseModel):
    """The ``suspect:`` section: a poisoned set that is to be cleaned, from images no detector saw."""

    model_config = _STRICT

    rate: float = Field(0.1, ge=0, le=1, description="share that is poisoned, all triggers equally often")
    mode: str = "all_to_one"
    target: int = Field(0, ge=0)
    epochs: int = Field(25, ge=1, description="of the victim")
    cleaners: list[str] = Field(
        default_factory=lambda: ["dbom"], description="detectors whose cleaned sets a victim is trained on"
    )


def _every_detector() -> dict[str, dict[str, Any]]:
    return {name: {} for name in SCANNERS.names()}


class DetectorsConfig(ToolConfig):
    """A table of detectors; what ``tools/compare_detectors.py --cfg`` reads."""

    tool: ClassVar[str] = "compare_detectors"

    name: str = Field("compare_detectors", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    data: list[str] = Field(default_factory=lambda: ["scenes/shape"], min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [1, 2, 3], min_length=1)
    split: str = Field("test", description="part that figures are of; val while anything is being chosen")
    detectors: dict[str, dict[str, Any]] = Field(
        default_factory=_every_detector,
        min_length=1,
        description="label to options; the method is the label or the option name",
    )
    pairs: PairOptions = Field(default_factory=PairOptions)
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="label to what differs in pairs; the first detector is fitted and tested with each, too",
    )
    suspect: SuspectOptions | None = Field(default_factory=SuspectOptions)
    cache_dir: str | None = None

    def varied(self, variant: str) -> DetectorsConfig:
        """Return the first detector alone on a variant's pairs, its label said with the variant's.

        Raises:
            ValidationError: If the variant has keys or values that ``pairs:`` doesn't take.
        """
        first = next(iter(self.detectors))
        name, options = self.method(first)
        pairs = {**self.pairs.model_dump(), **self.variants[variant]}
        changes = {
            "pairs": PairOptions(**pairs),
            "detectors": {f"{first}, {variant}": {"name": name, **options}},
            "variants": {},
            "suspect": None,
        }
        return self.model_copy(update=changes)

    def labels(self) -> list[str]:
        """Return the labels of all rows that detectors get: those of ``detectors``, then the first's by variant."""
        first = next(iter(self.detectors))
        return [*self.detectors, *(f"{first}, {variant}" for variant in self.variants)]

    def method(self, label: str) -> tuple[str, dict[str, Any]]:
        """Return a detector's registry name and its own options."""
        options = dict(self.detectors[label] or {})
        return str(options.pop("name", label)), options

    def problems(self) -> list[str]:
        """Return what is wrong with names and options, one sentence each."""
        found = []
        for label in self.detectors:
            name, options = self.method(label)
            try:
                check_options(SCANNERS.get(name).target, options, f"detectors.{label}")
            except ConfigError as error:
                found += [f"detectors.{label}.{p}" for p in error.problems]
            except VLPromptError as error:
                found.append(f"detectors.{label}: {error}")
        checks: list[tuple[Callable[[Any], object], Any, str]] = [
            *((check_name, name, "data") for name in self.data),
            (check_triggers, self.pairs.triggers, "pairs.triggers"),
        ]
        for check, value, key in checks:
            try:
                check(value)
            except VLPromptError as error:
                found.append(f"{key}: {error}")
        for variant in self.variants:
            try:
                check_triggers(self.varied(variant).pairs.triggers)
            except ValidationError as error:
                found += [f"variants.{variant}.{p}" for p in describe_problems(error, PairOptions)]
            except VLPromptError as error:
                found.append(f"variants.{variant}.triggers: {error}")
        for label in self.suspect.cleaners if self.suspect else ():
            if label not in self.detectors:
                found.append(
                    f"suspect.cleaners: {label!r} is none of the detectors: {', '.join(self.detectors)}."
                )
        if self.split not in ("val", "test"):
            found.append(f"split: figures are of val or test, got {self.split!r}.")
        return found
