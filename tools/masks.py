"""What saved masks switch off, and how two differ: ``python tools/masks.py PROMPT_FOLDER [OTHER] [--svg FILE]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> None:
    """Print a line per weight tensor: the share switched off in percent, by each and by both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("masks", nargs="+", help="one or two folders with prompt.safetensors")
    parser.add_argument("--svg", type=Path, help="draw the shares here")
    args = parser.parse_args(list(arguments))
    if len(args.masks) > 2:
        parser.error(f"two folders can be compared, got {len(args.masks)}.")

    import vlprompt
    from vlprompt.core.files import write_text
    from vlprompt.experiments.figures import shares_by_layer
    from vlprompt.saved.weight_masks import read_masks

    backbone = vlprompt.load(args.masks[0]).backbone
    found = [read_masks(path, backbone) for path in args.masks]
    for name, difference in found[0].diff(found[-1]).items():
        first, both = difference.both_off + difference.only_first, difference.both_off
        shares = [first] if len(found) == 1 else [first, both + difference.only_second, both]
        print(f"{name:48s}", *(f"{100 * share / difference.count:8.2f}" for share in shares))
    print(f"{'all':48s}", *(f"{100 * masks.masked_share:8.2f}" for masks in found))
    if args.svg:
        shares = {path: masks.sparsity() for path, masks in zip(args.masks, found, strict=True)}
        write_text(args.svg, shares_by_layer(shares))


if __name__ == "__main__":
    command(main)
