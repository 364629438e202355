"""The option ``--workers`` of commands that read images."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from vlprompt.core.errors import DataError

__all__ = ["WorkersOption", "parse_workers"]

WorkersOption = Annotated[
    str, typer.Option("--workers", help="Processes that read images: a number, 0 for none, or auto.")
]


def parse_workers(text: str) -> int | Literal["auto"]:
    """Return what was written as a number of workers.

    Raises:
        DataError: If it is neither auto nor a whole number from 0 on.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise DataError(f"--workers takes auto or a whole number from 0 on, got {text!r}.")
    return int(text)
