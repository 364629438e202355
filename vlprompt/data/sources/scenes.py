"""scenes/<task>[@style]: images drawn on the fly (see ``vlprompt.data.scenes``)."""

from __future__ import annotations

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import scenes as drawn
from vlprompt.data.base import ImageDataset
from vlprompt.data.sources import Request, sources

__all__ = ["build", "task_and_style"]


@sources.register(
    "scenes", summary="images drawn from a seed; offline", grammar="scenes/TASK[@STYLE]", embedded=True
)
def build(request: Request, *, style: str | None = None, size: int = 64) -> ImageDataset:
    """Build one split of a task.

    Args:
        request: ``argument`` is ``task`` or ``task@style``.
        style: Render style, if the name doesn't say it.
        size: Height and width in pixels.
    """
    task, look = task_and_style(request, style)
    if task not in drawn.list_tasks():
        raise UnknownNameError("scenes task", task, drawn.list_tasks())
    return drawn.build(task, request.split, style=look, size=size)


def task_and_style(request: Request, style: str | None) -> tuple[str, str]:
    """Return a task's name and a known style, from ``task`` or ``task@style`` and the option; default: plain.

    Raises:
        DataError: If name and option differ.
        UnknownNameError: If there is no such style.
    """
    task, _, named = request.argument.partition("@")
    if named and style and named != style:
        raise DataError(f"{request.name}: the name says style {named!r}, the option says {style!r}.")
    look = named or style or "plain"
    if look not in drawn.list_styles():
        raise UnknownNameError("scenes style", look, drawn.list_styles())
    return task, look
