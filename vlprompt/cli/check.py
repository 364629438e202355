"""``vlprompt check``: is a configuration, a finished run, or what was saved, as it should be?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._complete import complete_config
from vlprompt.core.errors import ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.paths import user_path

if TYPE_CHECKING:
    from vlprompt.experiments.cell import Cell

__all__ = ["command"]


def command(
    cfg: Annotated[
        str,
        typer.Argument(
            metavar="CFG",
            help="A configuration, the folder of a finished run, or of a saved prompt.",
            autocompletion=complete_config,
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to a configuration.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="CFG",
            show_default=False,
            help="The configuration that a run is compared with, where it is not the shipped one of the same name.",
        ),
    ] = None,
) -> int:
    """Check a configuration and say what it would run; compare a finished run with what is expected; check a prompt.

    All mistakes are reported at once. Data sets are checked by: vlprompt data check NAME.

    Exit status: 0; 1 if a run does not reach what its configuration expects; 2 after a mistake.
    """
    path = user_path(cfg)
    if path.is_dir() and (path / "config.yaml").is_file():  # a run, finished or not
        return _check_run(path, against)

    if against is not None:
        raise VLPromptError(f"--against compares a finished run, and {cfg} is none.")
    if path.is_dir():
        _check_prompt(cfg)
    else:
        _check_config(cfg, overrides or [])
    return 0


def _check_run(folder: Path, against: str | None) -> int:
    """Print a line for each expected figure, then what the run learned; return 1 if a figure is not reached."""
    from vlprompt.experiments.check import check_run
    from vlprompt.saved.paths import find_prompts

    verdicts = check_run(folder, against)
    for verdict in verdicts:
        print(verdict.text())
    if not verdicts:
        print(f"{folder}: its configuration expects no figure (key: expect)")

    if any(folder.glob("cells/*/prompt")):
        for prompt in find_prompts([folder]):
            _check_prompt(prompt)
    return int(any(verdict.outcome == "fail" for verdict in verdicts))


def _check_config(cfg: str, overrides: Sequence[str]) -> None:
    from vlprompt.experiments.check import unknown_figures
    from vlprompt.experiments.runner import what_is_missing
    from vlprompt.experiments.tasks import read_experiment

    if not user_path(cfg).exists() and _names_data(cfg):
        raise VLPromptError(
            f"{cfg} is a data set, not a configuration. Check it by: vlprompt data check {cfg}"
        )
    experiment = read_experiment(cfg, overrides)
    if problems := unknown_figures(cfg):
        raise ConfigError(problems, cfg)

    cells = experiment.cells()
    print(f"{cfg}: no mistakes; task {experiment.config.task}, {len(cells)} cells")
    for name, values in _coordinates(cells).items():
        print(f"  {name}: {', '.join(values)}")
    for sentence in what_is_missing(experiment):
        print(f"missing: {sentence}")


def _names_data(name: str) -> bool:
    """Return whether a name is that of a data set: of the catalogue, or of files as ``folder:PATH``."""
    from vlprompt.data.names import parse_name

    try:
        parse_name(name)
    except UnknownNameError:
        return False
    return True


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
