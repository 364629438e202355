"""Poison a data set, or draw what triggers look like: ``python tools/poison.py --data digits --output poisoned``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> None:
    """Write a poisoned copy with its manifest, or a preview sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="scenes/shape", help="a data set's name, folder:PATH or csv:PATH")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", type=Path, help="folder of the poisoned copy; must not exist or be empty")
    parser.add_argument(
        "--triggers", nargs="+", default=["badnets"], help="names; A+B puts two into one image"
    )
    parser.add_argument("--rate", type=float, default=0.1, help="share of the images that are poisoned")
    parser.add_argument("--mode", default="all_to_one", help="all_to_one or all_to_all")
    parser.add_argument("--target", type=int, default=0, help="class that all_to_one flips labels to")
    parser.add_argument("--size", type=int, default=32, help="pixels a side at which triggers are put in")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="draw all triggers into this image instead")
    args = parser.parse_args(list(arguments))

    import vlprompt
    from vlprompt.security.poison import PoisonPlan, poison
    from vlprompt.security.sheet import trigger_sheet

    data = vlprompt.load_dataset(args.data, args.split)
    if args.sheet is not None:
        chosen = [data[i * len(data) // 4 + i][0] for i in range(4)]
        trigger_sheet(chosen, size=args.size, seed=args.seed).save(args.sheet)
        print(args.sheet)
        return
    keys = ("triggers", "rate", "mode", "target", "size", "seed")
    plan = PoisonPlan.parse({k: getattr(args, k) for k in keys}, "command line")
    folder = args.output or Path("poisoned") / args.data.replace("/", "_").replace(":", "_")
    copy = poison(data, plan, folder)
    changed = sum(trigger > 0 for trigger in copy.targets["trigger"])
    print(f"{folder}: {len(copy)} images, {changed} poisoned")


if __name__ == "__main__":
    command(main)
