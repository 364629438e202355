"""``vlprompt masks``: what saved weight masks switch off, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes

__all__ = ["command"]


def command(
    prompt: Annotated[str, typer.Argument(help="Folder of a saved learner with masks, or of its run.")],
    other: Annotated[str | None, typer.Argument(help="Another one, to compare with.")] = None,
    backbone: BackboneChanges = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the shares here.")] = None,
) -> None:
    """Print the share of weights that saved masks switch off, in percent.

    A line per weight tensor; for two prompts three columns: by the first, by the second, by both.
    """
    from vlprompt.core.files import write_text
    from vlprompt.experiments.figures import shares_by_layer
    from vlprompt.saved.prompts import load
    from vlprompt.saved.weight_masks import read_masks

    tower = load(prompt, backbone_changes(backbone)).backbone
    first = read_masks(prompt, tower)
    second = first if other is None else read_masks(other, tower)
    for name, difference in first.diff(second).items():
        counts = [difference.both_off + difference.only_first]
        if other is not None:
            counts += [difference.both_off + difference.only_second, difference.both_off]
        print(f"{name:48s}", *(f"{100 * count / difference.count:8.2f}" for count in counts))

    shares = [first.masked_share] if other is None else [first.masked_share, second.masked_share]
    print(f"{'all':48s}", *(f"{100 * share:8.2f}" for share in shares))
    if svg is not None:
        series = {prompt: first.sparsity()}
        if other is not None:
            series[other] = second.sparsity()
        write_text(svg, shares_by_layer(series))
