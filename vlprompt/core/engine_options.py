"""The options behind the colon of ``--on NAME:...``: words, and ``key=value``, with commas between them."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from vlprompt.core.errors import ConfigError
from vlprompt.core.options import describe_problems

__all__ = ["Gibibytes", "Minutes", "read_options"]

Model = TypeVar("Model", bound=BaseModel)

_GIB = {
    "": 1.0,
    "gib": 1.0,
    "g": 1.0,
    "mib": 2.0**-10,
    "m": 2.0**-10,
    "tib": 2.0**10,
    "t": 2.0**10,
    "gb": 1e9 / 2**30,
}
_MINUTES = {"": 1.0, "m": 1.0, "min": 1.0, "h": 60.0, "d": 24 * 60.0}


def _measured(units: dict[str, float], example: str, value: object) -> object:
    """Return a number with a unit as one in the unit of the option."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if match is None or match[2] not in units:
        raise ValueError(f"{value!r} is no number with a unit, for example {example}.")
    return float(match[1]) * units[match[2]]


def _gibibytes(value: object) -> object:
    return _measured(_GIB, "16GiB or 512MiB", value)


def _minutes(value: object) -> object:
    return _measured(_MINUTES, "4h, 90m or 2d", value)


Gibibytes = Annotated[float, BeforeValidator(_gibibytes), Field(gt=0)]
"""Memory in GiB; ``512MiB`` is 0.5."""

Minutes = Annotated[float, BeforeValidator(_minutes), Field(ge=1)]
"""Time in minutes; ``4h`` is 240."""


def read_options(executor: str, argument: str, model: type[Model]) -> tuple[list[str], Model]:
    """Return the words of an argument, and its options.

    Args:
        executor: Name, for messages.
        argument: For example ``"auto,cpus=2"``.
        model: Checks the options.

    Raises:
        ConfigError: With every mistake at once, and the nearest valid key.
    """
    parts = [part.strip() for part in argument.split(",") if part.strip()]
    words = [part for part in parts if "=" not in part]
    options: dict[str, str] = {}
    problems = []

    for part in parts:
        key, equals, value = part.partition("=")
        if equals and key in options:
            problems.append(f"{key}: given twice, {options[key]!r} and {value!r}.")
        elif equals:
            options[key] = value

    try:
        read = model.model_validate(options)
    except ValidationError as error:
        problems += describe_problems(error, model)
    if problems:
        raise ConfigError(problems, f"--on {executor}:{argument}")
    return words, read
