"""The ``search:`` section of a configuration: what is varied, what is good, and how many trials there are."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

__all__ = ["Dimension", "SearchOptions"]

_OF_TEST = re.compile(r"(?<![a-z])test(?![a-z])", re.IGNORECASE)


class Dimension(BaseModel):
    """One key that is varied: a range of numbers or a choice.

    A range whose two ends are whole numbers has whole numbers alone; write ``1.0`` for one that has others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: int | float | None = Field(None, description="the least value")
    high: int | float | None = Field(None, description="the largest value")
    log: bool = Field(False, description="draw evenly in the logarithm")
    choices: list[bool | int | float | str | None] | None = Field(
        None, min_length=1, description="the values, in place of a range"
    )

    @model_validator(mode="after")
    def _range_or_choice(self) -> Self:
        """Refuse what is neither a range nor a choice, or both."""
        is_range = self.low is not None and self.high is not None and self.low < self.high
        has_end = self.low is not None or self.high is not None
        if is_range == (self.choices is not None) or (has_end and not is_range):
            raise ValueError("give low and high with low < high, or choices.")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log: a range in the logarithm begins above 0.")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def extremes(self) -> list[Any]:
        """Return the values that a configuration must take for it to take all of them."""
        return list(self.choices) if self.choices is not None else [self.low, self.high]


class SearchOptions(BaseModel):
    """The ``search:`` section.

    Trials come in rounds. A trial learns from the rounds before its own alone, so that what is tried does not depend on
    how many workers there are, which of them is faster, or which was killed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: str = Field(
        min_length=1, description="figure of metrics.json; every trial is scored on validation data"
    )
    direction: Literal["maximize", "minimize"] = "maximize"
    space: dict[str, Dimension] = Field(
        min_length=1, description="dotted key of this file to low and high (log: true), or choices"
    )
    trials: int = Field(20, ge=1, description="in all; more of them continue a finished search")
    startup: int = Field(10, ge=1, description="random trials before the sampler learns from them")
    together: int = Field(
        4, ge=1, description="trials of a round, which may run at the same time; 1 is the plain algorithm"
    )
    seed: int = Field(1, ge=0, description="of what is tried")
    monitor: str = Field(
        "",
        description="validation figure of an epoch (val/accuracy, val/loss) or of a cell, in the direction of the "
        "objective: a trial that is worse by it than the median of those before ends early. Empty: none does",
    )
    warmup: int = Field(0, ge=0, description="epochs before a trial may end early")
    changes: dict[str, Any] = Field(
        default_factory=dict,
        description="dotted key to a value that trials have and the best configuration has not: fewer seeds ...",
    )

    @field_validator("objective", "monitor")
    @classmethod
    def _no_test(cls, value: str) -> str:
        """Refuse figures of test data by their names."""
        if _OF_TEST.search(value):
            raise ValueError(
                f"{value!r} is a figure of test data, which nothing is ever chosen by; name one of validation data, "
                "such as accuracy (of a trial, it is that of the validation split) or train/val/loss."
            )
        return value
