"""``--backbone key=value``: the backbone of a saved prompt, where it is not what or where the prompt says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

__all__ = ["BackboneChanges", "backbone_changes"]

BackboneChanges = Annotated[
    list[str] | None,
    typer.Option(
        "--backbone",
        metavar="KEY=VALUE",
        help="A key of backbone: in place of what was saved, for example pretrained=PATH; repeat it.",
    ),
]
"""The option, for every command that loads a saved prompt."""


def backbone_changes(words: Sequence[str] | None) -> dict[str, Any]:
    """Return what ``--backbone`` asks for.

    Raises:
        ConfigError: For a key that a ``backbone:`` section does not have, or a bad value.
    """
    if not words:
        return {}
    from pydantic import Field, ValidationError

    from vlprompt.core.errors import ConfigError
    from vlprompt.core.options import describe_problems
    from vlprompt.experiments.config import BackboneOptions, parse_overrides

    class Changes(BackboneOptions):
        """A configuration has no seed of random weights, but prompts that Python saved may have one."""

        seed: int = Field(0, ge=0)

    content = parse_overrides([w if "=" in w else f"name={w}" for w in words], Changes)
    try:
        options = Changes.model_validate(content)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, Changes, "backbone"), "--backbone") from error
    return options.model_dump(exclude_unset=True, exclude_none=True)
