"""``vlprompt check``: is a configuration, or what was saved, as it should be?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._complete import complete_config
from vlprompt.core.paths import user_path

if TYPE_CHECKING:
    from vlprompt.experiments.cell import Cell

__all__ = ["command"]


def command(
    cfg: Annotated[
        str,
        typer.Argument(
            metavar="CFG", help="A configuration, or a saved prompt's folder.", autocompletion=complete_config
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to a configuration.")
    ] = None,
) -> None:
    """Check a configuration as a whole and say what it would run, or check a saved prompt.

    All mistakes are reported at once. Data sets are checked by: vlprompt data check NAME.

    Exit status: 0 if there is no mistake, else 2.
    """
    if user_path(cfg).is_dir():
        _check_prompt(cfg)
    else:
        _check_config(cfg, overrides or [])


def _check_config(cfg: str, overrides: Sequence[str]) -> None:
    from vlprompt.experiments.tasks import read_experiment

    experiment = read_experiment(cfg, overrides)
    cells = experiment.cells()
    print(f"{cfg}: no mistakes; task {experiment.config.task}, {len(cells)} cells")
    for name, values in _coordinates(cells).items():
        print(f"  {name}: {', '.join(values)}")
    for sentence in experiment.missing():
        print(f"missing: {sentence}")


def _coordinates(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Return the values of every coordinate in the order in which they first occur."""
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        for name, value in cell.coordinates:
            values.setdefault(name, {})[str(value)] = None
    return {name: list(texts) for name, texts in values.items()}


def _check_prompt(path: str) -> None:
    from vlprompt.saved.paths import prompt_folder
    from vlprompt.saved.prompts import read

    folder = prompt_folder(path)
    card, tensors = read(folder)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(f"{folder}: whole; the {card.kind} {card.method}, {len(tensors)} tensors of {numbers} numbers")
    print(f"  backbone: {card.backbone.get('architecture')} {card.backbone.get('pretrained') or ''}".rstrip())
    if card.classnames:
        print(f"  classes: {', '.join(card.classnames)}")
    print(f"  written by vlprompt {card.version}")
