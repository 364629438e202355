"""``vlprompt demo``: a page in the browser to try what was learned."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes

__all__ = ["command"]


def command(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Saved prompts: a learner, a segmenter, a scanner; without: zero-shot on --backbone name=...",
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="A class name to start with; repeat it."),
    ] = None,
    folders: Annotated[
        list[Path] | None,
        typer.Option(
            "--folder", metavar="FOLDER", help="A folder that the page may scan; repeat it. Without: none."
        ),
    ] = None,
    backbone: BackboneChanges = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    host: Annotated[
        str, typer.Option(help="What to listen on: this machine alone, unless you say so.")
    ] = "127.0.0.1",
    max_images: Annotated[int, typer.Option(min=1, help="Images at once.")] = 16,
    max_mb: Annotated[int, typer.Option("--max-mb", min=1, help="The largest image file, MB.")] = 20,
) -> int:
    """Open a page to try what was learned: name images, edit class names, adapt, find a phrase, scan a folder.

    It needs Gradio (the extra demo). Ctrl-C ends it; nothing is fetched from elsewhere, and uploads are removed.
    """
    from vlprompt.demo.environment import private_gradio
    from vlprompt.demo.limits import Limits, checked_folders

    limits = Limits(max_images, max_mb, checked_folders(folders or ()))
    with private_gradio() as files:
        from vlprompt.demo.guard import is_loopback
        from vlprompt.demo.models import load_models
        from vlprompt.demo.page import build_page, draw_examples
        from vlprompt.demo.server import listen, serve

        listening = listen(host, port)  # first, because models may take long to load
        models = load_models(prompts or (), backbone_changes(backbone), names)
        page = build_page(models, limits, draw_examples(files))
        if not is_loopback(host):
            print(f"Whoever can reach this machine on {host} can use the page.", file=sys.stderr)

        # The folder of uploads goes whichever way the process is ended.
        signal.signal(signal.SIGTERM, _end)
        try:
            serve(page, listening, host, limits, files, _say)
        except KeyboardInterrupt:
            print("stopped.", file=sys.stderr)
    return 0


def _say(address: str) -> None:
    print(f"{address}  (Ctrl-C ends it)", flush=True)


def _end(signal_number: int, _: object) -> None:
    raise SystemExit(128 + signal_number)
