"""Benchmarks: ours against a baseline, in one process, as a ratio. One file each, discovered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlprompt.core.registry import Registry

__all__ = ["BENCHMARKS"]

BENCHMARKS: Registry[Callable[..., dict[str, Any]]] = Registry("benchmark", "benchmarks")
"""Functions whose keyword arguments are the command line's options and whose result is printed as JSON."""
