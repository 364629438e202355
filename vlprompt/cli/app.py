"""The command ``vlprompt``: what belongs to it, and how it starts.

Nothing here or in the commands' modules imports torch before a command runs, so that help is instant.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from vlprompt.cli._errors import LAST_NET, Commands, say_last_net
from vlprompt.core.paths import user_path

__all__ = ["COMMANDS", "build", "main"]

COMMANDS = (
    "run",
    "search",
    "predict",
    "evaluate",
    "encode",
    "report",
    "check",
    "push",
    "export",
    "list",
    "data",
    "segment",
    "masks",
    "poison",
    "scan",
    "demo",
)
"""Every command in the order of the help; each is a module of this package with a ``command`` or an ``app``."""

_GROUPS = ("data", "segment")  # with commands of their own


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit status.

    Args:
        arguments: Words behind ``vlprompt``; None takes those of this process.
    """
    # A shell may have closed them (``>&-``), and then Python has none.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    words = list(sys.argv[1:] if arguments is None else arguments)
    # Only the command that is called is imported; all of them where a name has to be shown, completed or corrected.
    called = words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS
    try:
        try:
            build(called)(args=[_with_home(word) for word in words], prog_name="vlprompt")
        finally:
            sys.stdout.flush()  # help is printed before any command runs
    except LAST_NET as error:
        sys.exit(say_last_net(error))


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return the command line with some of the commands."""
    app = typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,  # a stack is for a bug report, so it is Python's own
    )
    app.callback()(_root)

    for name in names:
        module = importlib.import_module(f"vlprompt.cli.{name}")
        if name in _GROUPS:
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(module.command)

    return app


def _with_home(word: str) -> str:
    """Return a word whose path begins with the home folder: a shell leaves ``~`` alone in ``--csv=~/out.csv``."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{user_path(value)}" if value.startswith("~/") else word


def _version(wanted: bool) -> None:
    if wanted:
        from vlprompt.core.version import package_version

        print(f"vlprompt {package_version()}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapt CLIP-family vision-language models by learning prompts.

    Start with: vlprompt run quickstart.yaml
    """
