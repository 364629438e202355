"""Which steps of a run belong to which of its phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlprompt.core.trainable import Phase

__all__ = ["Span", "span_at", "spans_of"]


@dataclass(frozen=True)
class Span:
    """The steps of a phase.

    Attributes:
        number: Of the phase.
        start: Its first step, counted over the whole run.
        length: Its steps.
        names: Parameters that move; empty if all do.
    """

    number: int
    start: int
    length: int
    names: frozenset[str] = frozenset()


def spans_of(phases: Sequence[Phase], steps: int) -> list[Span]:
    """Return the steps of each phase of a run; of one phase, if there are none.

    Args:
        phases: See :meth:`vlprompt.core.trainable.Hooks.phases`.
        steps: Optimiser steps of the whole run.
    """
    if not phases:
        return [Span(0, 0, steps)]

    borders = [0]
    share = 0.0
    for phase in phases[:-1]:
        share += phase.share
        borders.append(int(steps * share))
    borders.append(steps)

    return [
        Span(number, borders[number], borders[number + 1] - borders[number], frozenset(phase.names))
        for number, phase in enumerate(phases)
    ]


def span_at(spans: Sequence[Span], position: int) -> Span:
    """Return the phase that a step belongs to; one without steps has none."""
    return [span for span in spans if span.start <= position][-1]
