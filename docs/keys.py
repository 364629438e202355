"""Write docs/configuration.md, the table of all keys of all tasks: ``python docs/keys.py``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlprompt.experiments.config import ExperimentConfig
from vlprompt.experiments.tasks import list_tasks

PAGE = Path(__file__).parent / "configuration.md"
INTRODUCTION = """# Configuration

Every key of every task. This page is made by `python docs/keys.py` from the models that check configurations. The same
thing has the same key in every task. What takes precedence: see [experiments](experiments.md).

Options of a learner, an adapter, a segmenter or a scanner stand beside its `name`; `vlprompt list learners` and its
relatives print the names, and an unknown option is answered with the nearest one.
"""


def configurations() -> dict[str, list[type[ExperimentConfig]]]:
    """Return task to the models of its configurations."""
    found: dict[str, list[type[ExperimentConfig]]] = {}
    for task in list_tasks():
        module = importlib.import_module(f"vlprompt.{task}.config")
        models = [
            value
            for _, value in inspect.getmembers(module, inspect.isclass)
            if issubclass(value, ExperimentConfig) and value.expected_task == task
        ]
        found[task] = sorted(models, key=lambda model: model.__name__)
    return found


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key of a model and of the sections in it."""
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            yield f"{prefix}{name}", field
        else:
            yield from keys(section, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section of its own; None for a plain key."""
    kinds = [field.annotation]
    if get_origin(field.annotation) in (Union, UnionType):
        kinds = list(get_args(field.annotation))
    models = [kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)]
    return models[0] if models else None


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for task, models in configurations().items():
        for model in models:
            title = task if len(models) == 1 else f"{task}: {model.__name__}"
            summary = inspect.cleandoc(model.__doc__ or "").partition("\n")[0]
            parts.append(
                f"## {title}\n\n{summary}\n\n| Key | Type | Default | What it is |\n|---|---|---|---|"
            )
            rows = [_row(key, field) for key, field in keys(model)]
            parts[-1] += "\n" + "\n".join(rows) + "\n"
    return "\n".join(parts)


def _row(key: str, field: FieldInfo) -> str:
    cells = [f"`{key}`", _type(field.annotation), _default(field), field.description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_type(member) for member in get_args(annotation) if member is not type(None))
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    if origin in (list, tuple):
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is dict:
        return "mapping"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        dict: "mapping",
        Any: "any",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined:
        value = field.default_factory() if field.default_factory is not None else None  # type: ignore[call-arg]
    if value is None or value in ("", [], {}):
        return ""
    if isinstance(value, (dict, list)) and len(str(value)) > 60:
        return "see the class"
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
