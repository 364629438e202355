"""``vlprompt search``: search what a configuration leaves open, on validation data."""

from __future__ import annotations

from typing import Annotated

import typer

from vlprompt.cli._complete import complete_config
from vlprompt.cli._errors import on_interrupt
from vlprompt.core.errors import VLPromptError

__all__ = ["command"]


def command(
    cfg: Annotated[
        str | None,
        typer.Argument(
            metavar="CFG",
            show_default=False,
            autocompletion=complete_config,
            help="A YAML file with a section search, or the name of a shipped one (see: vlprompt list configs).",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", show_default=False, help="Changes to it, for example search.trials=40."
        ),
    ] = None,
    option_cfg: Annotated[
        str | None, typer.Option("--cfg", metavar="CFG", help="The same as the argument CFG.")
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            metavar="EXECUTOR",
            help="Where trials run, one by one in each place: serial, processes:N, ray, slurm:partition=NAME ...",
        ),
    ] = "serial",
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A database that workers share, for example postgresql+psycopg://USER@HOST/NAME.  [default: a file of "
            "SQLite in the search's folder]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Search what a configuration leaves open, and write the best configuration.

    The section search says which keys are varied, and by which figure. Every trial is scored on validation data. A
    search that was stopped continues; the same command in several terminals, or on several machines with one --storage,
    shares its trials among them. The last line on standard output is the path of best.yaml and the objective.

    Exit status: 0; 2 after a mistake, or if no trial finished; 130 after Ctrl-C.
    """
    words = [*([cfg] if cfg is not None else []), *(overrides or [])]
    if option_cfg is not None:
        words.insert(0, option_cfg)
    if not words:
        raise VLPromptError("name a configuration, for example: vlprompt search search_coop_tiny.yaml.")

    from vlprompt.experiments.search.searching import search

    with on_interrupt("The same command continues where it stopped."):
        outcome = search(words[0], words[1:], on=on, storage=storage)

    print(outcome.table().markdown())
    states = [record.state for record in outcome.trials]
    print(f"{len(states)} trials: {states.count('pruned')} ended early, {states.count('failed')} failed")
    print(f"{outcome.best}: {outcome.objective} {outcome.value:.4g} on validation data", flush=True)
