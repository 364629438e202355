"""Experiments of segmentation: which kind a configuration describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlprompt.core.errors import ConfigError, UnknownNameError
from vlprompt.experiments.config import merge, parse_overrides
from vlprompt.experiments.experiment import Experiment
from vlprompt.segmentation.config import SegmentationConfig
from vlprompt.segmentation.protocols.benchmark import BenchmarkExperiment
from vlprompt.segmentation.protocols.concepts import ConceptMaskConfig, ConceptMaskExperiment

__all__ = ["build"]

_BENCHMARK = "benchmark"
_PROTOCOLS = (_BENCHMARK, "concepts")


def build(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    """Return the experiment that a configuration of this task describes (see :class:`Build`)."""
    content = merge(raw, parse_overrides(overrides, SegmentationConfig))
    protocol = content.get("protocol")

    name = protocol.get("name", _BENCHMARK) if isinstance(protocol, Mapping) else _BENCHMARK
    if name == "concepts":
        changes = parse_overrides(overrides, ConceptMaskConfig)
        return ConceptMaskExperiment(ConceptMaskConfig.parse(raw, changes, source))

    if name != _BENCHMARK:
        raise ConfigError([f"protocol.name: {UnknownNameError('protocol', str(name), _PROTOCOLS)}"], source)

    changes = parse_overrides(overrides, SegmentationConfig)
    return BenchmarkExperiment(SegmentationConfig.parse(raw, changes, source))
