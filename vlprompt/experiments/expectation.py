"""What a configuration is expected to reach: figures of papers, or measured here, each with its source."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

__all__ = ["Expectation", "Figure"]


class Figure(BaseModel):
    """A figure that a run should reach.

    Attributes:
        value: In the unit of the metric; accuracies are fractions.
        within: Half of the interval around ``value`` in which a run agrees with it, in the same unit.
    """

    model_config = ConfigDict(extra="forbid")

    value: float
    within: float = Field(0.01, gt=0, description="half of the interval in which a run agrees")


class Expectation(BaseModel):
    """Figures of one source that a run of a configuration should reach.

    Attributes:
        figures: By key of ``metrics.json``, for example ``"new/accuracy"``.
        kind: ``"published"``: read in the source. ``"recalled"``: published as far as remembered, not read again.
            ``"measured"``: by us. ``"none"``: nobody knows a figure yet.
        source: The paper and its table; of what was measured, the commit or the weights, and the machine; why no figure
            is known.
        under: Settings in which the figures were reached, where they differ from the file: dotted key to value.
    """

    model_config = ConfigDict(extra="forbid")

    figures: dict[str, Figure] = Field(default_factory=dict, description="by key of metrics.json")
    kind: Literal["published", "recalled", "measured", "none"]
    source: str = Field(min_length=1)
    under: dict[str, Any] = Field(default_factory=dict, description="dotted key to value")

    @model_validator(mode="after")
    def _check_figures(self) -> Self:
        if self.figures and self.kind == "none":
            raise ValueError("figures have a source: kind is published, recalled or measured.")
        if not self.figures and self.kind != "none":
            raise ValueError(
                "it needs at least one figure; where none is known, kind: none, and source says why."
            )
        return self

    def lines(self) -> list[str]:
        """Return a line for each figure, or one that says why there is none."""
        if not self.figures:
            return [f"no figure is known: {self.source}"]
        return [self.text(metric) for metric in self.figures]

    def text(self, metric: str) -> str:
        """Return one of the figures as people read it, with its source."""
        figure = self.figures[metric]
        settings = "".join(f", {key}={value}" for key, value in self.under.items())
        return f"{metric} {figure.value:.4g} +- {figure.within:.4g} ({self.kind}: {self.source}{settings})"
