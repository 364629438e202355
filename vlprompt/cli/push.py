"""``vlprompt push``: share a saved prompt on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    prompt: Annotated[str, typer.Argument(help="A saved prompt's folder, or the folder of its run.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Made if there is none.")],
    private: Annotated[
        bool, typer.Option("--private", help="Open a new repository to its owners alone.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made if there is none.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of what was learned, as the Hub names it: mit, cc-by-4.0.")
    ] = None,
    write_to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the files here and push nothing.")
    ] = None,
) -> int:
    """Share a saved prompt, with a model card, on the Hugging Face Hub.

    Log in with `hf auth login` first, or set HF_TOKEN. Load it with vlprompt.load("user/name").
    """
    from vlprompt.core.paths import user_path
    from vlprompt.saved.hub import push, write_repository

    if write_to is not None:
        folder = user_path(write_to)
        folder.mkdir(parents=True, exist_ok=True)
        write_repository(prompt, folder, repository, licence)
        print(f"written, not pushed: {', '.join(str(path) for path in sorted(folder.iterdir()))}")
        return 0

    print(push(prompt, repository, private=private, revision=revision, licence=licence))
    return 0
