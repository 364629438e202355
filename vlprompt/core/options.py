"""Options of a constructor, checked against its own signature: the code is the one place that says what it takes."""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Callable, Mapping
from numbers import Integral
from os import PathLike
from typing import Any, TypeVar, cast, get_args, get_type_hints

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from vlprompt.core.errors import ConfigError, DataError, nearest

__all__ = [
    "as_whole",
    "check_counts",
    "check_options",
    "check_switches",
    "check_type",
    "describe_options",
    "describe_problems",
    "matching",
    "options_model",
    "whole_options",
]

Shared = TypeVar("Shared")

_SHORT = reprlib.Repr()  # what was given may be a whole hostile file
_SHORT.maxstring = _SHORT.maxother = 120


def options_model(target: Callable[..., Any]) -> type[BaseModel]:
    """Return a pydantic model of a callable's keyword-only parameters (types, defaults, ``Annotated`` bounds).

    Keywords that several callables share may be one parameter, ``**options: Unpack[Options]`` of a ``TypedDict`` whose
    fields are ``Annotated[..., Field(default, ...)]``.
    """
    function = target.__init__ if inspect.isclass(target) else target
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        name: (
            hints.get(name, Any),
            ... if parameter.default is inspect.Parameter.empty else parameter.default,
        )
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            fields |= _shared_fields(hints.get(name))
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    return create_model(getattr(target, "__name__", "Options"), __config__=config, **fields)


def _shared_fields(hint: Any) -> dict[str, Any]:
    """Return the fields of ``Unpack[Options]``; none of any other hint."""
    (options,) = get_args(hint) or (None,)
    return _fields(options) if is_typeddict(options) else {}


def _fields(options: type) -> dict[str, tuple[Any, Any]]:
    """Return type and default of each field of a ``TypedDict``."""
    fields = {}
    for name, kind in get_type_hints(options, include_extras=True).items():
        default = next(part.default for part in get_args(kind) if isinstance(part, FieldInfo))
        fields[name] = (kind, default)
    return fields


def whole_options(kind: type[Shared], given: Shared) -> Shared:
    """Return all options of a ``TypedDict`` that several callables share; what is not given has its default.

    Args:
        kind: Its fields are ``Annotated[..., Field(default, ...)]``.
        given: Some of them.
    """
    defaults = {name: default for name, (_, default) in _fields(kind).items()}
    return cast(Shared, {**defaults, **cast(dict[str, Any], given)})


def check_options(target: Callable[..., Any], options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ``options`` converted to the types the callable declares.

    Raises:
        ConfigError: With every unknown key and bad value, and the nearest valid key.
    """
    model = options_model(target)
    try:
        checked = model.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(describe_problems(error, model), source) from error
    return {name: getattr(checked, name) for name in options}


def as_whole(value: Any) -> Any:
    """Return a whole number of any library (numpy's, say) as Python's; all else as it is, for a check to refuse."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if is_whole else value


def check_counts(**counts: int) -> None:
    """Refuse numbers below 1.

    Args:
        counts: Name to number.

    Raises:
        DataError: Names the first that is no whole number from 1 on.
    """
    for name, count in counts.items():
        whole = as_whole(count)
        if not isinstance(whole, int) or isinstance(whole, bool) or whole < 1:
            raise DataError(f"{name} must be a whole number from 1 on, got {count!r}.")


def check_switches(**switches: bool) -> None:
    """Refuse what is neither true nor false: any text is true to Python, "no" as well.

    Args:
        switches: Name to value.

    Raises:
        DataError: Names the first that is no bool.
    """
    for name, value in switches.items():
        if not isinstance(value, bool | np.bool_):
            raise DataError(f"{name} is True or False, got {_SHORT.repr(value)}.")


def check_type(
    value: object, kinds: type | tuple[type, ...], what: str, made_by: str, hint: str = ""
) -> None:
    """Refuse an argument of another kind than a function takes.

    Args:
        value: The argument.
        kinds: What it may be.
        what: What is asked for, with its article: ``"a backbone"``.
        made_by: What returns one: ``"vlprompt.create_backbone(...)"``.
        hint: A sentence to add.

    Raises:
        DataError: Says what was given in its place.
    """
    if not isinstance(value, kinds):
        shown = f" {_SHORT.repr(value)}" if isinstance(value, str | int | float | PathLike) else ""
        raise DataError(
            f"{what} is what {made_by} returns; got {type(value).__name__}{shown}. {hint}".rstrip()
        )


def matching(pattern: str, what: str) -> AfterValidator:
    """Return what refuses texts that a regular expression does not match as a whole, and says in words what is allowed.

    Args:
        pattern: The expression.
        what: What is allowed, with its article, and an example.
    """

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(f"{_SHORT.repr(text)} is not {what}.")
        return text

    return AfterValidator(check)


def describe_options(target: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return what a Google-style docstring says before its ``Args:``, and what it says of each argument."""
    text, _, rest = inspect.cleandoc(target.__doc__ or "").partition("\nArgs:\n")
    descriptions: dict[str, str] = {}
    name = ""

    for line in rest.split("\n\n")[0].splitlines():
        if line.startswith("        "):  # goes on
            descriptions[name] += f" {line.strip()}"
        else:
            name, _, described = line.strip().partition(": ")
            descriptions[name] = described

    return text.strip(), descriptions


def describe_problems(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Turn pydantic's findings into sentences: the key, the bad value, what is allowed, the nearest valid key."""
    return [_describe(problem, model, prefix) for problem in error.errors()]


def _describe(problem: Any, model: type[BaseModel], prefix: str) -> str:
    path = [str(p) for p in problem["loc"]]
    key = ".".join([*([prefix] if prefix else []), *path])

    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        close = nearest(path[-1], known, count=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        return f"{key}: unknown key{hint} Known: {', '.join(sorted(known)) or 'none'}."

    if problem["type"] == "missing":
        return f"{key}: required, but missing."

    message = problem["msg"]
    if problem["type"] == "value_error":  # a validator of ours: a whole sentence that names the value
        return f"{key}: {message.removeprefix('Value error, ')}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {_SHORT.repr(problem['input'])}."


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names of the (nested) model at ``path``."""
    current: Any = model
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        current = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)  # it may be optional
    return list(getattr(current, "model_fields", {}))
