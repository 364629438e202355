"""``vlprompt poison``: a data set with backdoor triggers in it, or a sheet that shows what triggers look like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    data: Annotated[str, typer.Option(help="A data set: a name, folder:PATH or csv:PATH.")] = "scenes/shape",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the poisoned copy; it must not exist or be empty.")
    ] = None,
    triggers: Annotated[
        list[str] | None,
        typer.Option(
            "--trigger", help="A trigger's name; A+B puts two into one image. Repeat it. [default: badnets]"
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="Share of the images that are poisoned.")] = 0.1,
    mode: Annotated[str, typer.Option(help="all_to_one or all_to_all.")] = "all_to_one",
    target: Annotated[int, typer.Option(help="Class that all_to_one flips labels to.")] = 0,
    size: Annotated[
        str, typer.Option(help="Pixels a side at which triggers are put in; own: at each image's own size.")
    ] = "32",
    seed: Annotated[int, typer.Option(help="Seed of the draw and of the triggers.")] = 1,
    sheet: Annotated[Path | None, typer.Option(help="Draw all triggers into this image instead.")] = None,
) -> None:
    """Write a poisoned copy of a data set with its manifest, or draw all triggers."""
    from vlprompt.core.slugs import slug
    from vlprompt.data import load_dataset
    from vlprompt.data.triggers import NATIVE_SIZE
    from vlprompt.security import poison as poisoning
    from vlprompt.security.sheet import trigger_sheet

    side: int | str = int(size) if size.isdecimal() else size
    dataset = load_dataset(data, split)
    if sheet is not None:
        images = [dataset[i * len(dataset) // 4 + i][0] for i in range(4)]
        trigger_sheet(images, size=side if isinstance(side, int) else NATIVE_SIZE, seed=seed).save(sheet)
        print(sheet)
        return

    options = {
        "triggers": triggers or ["badnets"],
        "rate": rate,
        "mode": mode,
        "target": target,
        "size": side,
        "seed": seed,
    }
    plan = poisoning.PoisonPlan.parse(options, "command line")
    folder = output or Path("poisoned") / slug(data)
    copy = poisoning.poison(dataset, plan, folder)
    poisoned = sum(trigger > 0 for trigger in copy.targets["trigger"])
    print(f"{folder}: {len(copy)} images, {poisoned} poisoned")
