"""Generate views ahead: ``python tools/generate.py --cfg difftpt_vit_b16.yaml [dotted.key=value ...]``; resumes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlprompt.cli._common import command, step_progress


def main(arguments: Sequence[str]) -> None:
    """Fill the store of a configuration's ``diffusion:`` section with the views that its run will need."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cfg", required=True, help="a YAML file of tools/adapt.py, or the name of one in configs/"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. diffusion.store=PATH"
    )
    parser.add_argument(
        "--check", type=int, default=0, metavar="N", help="name the views of N images per data set and seed"
    )
    args = parser.parse_intermixed_args(list(arguments))

    from vlprompt.adaptation.config import AdaptConfig  # after parsing, so that --help is instant
    from vlprompt.adaptation.generate import generate_views

    config = AdaptConfig.read(args.cfg, args.overrides)
    with step_progress() as progress:
        made = generate_views(config, progress, args.check)
    for name, share in made.alike.items():
        blurred = f"{100 * made.alike_blurred[name]:.1f} % when all are blurred"
        print(
            f"{name}: {config.backbone.name} names {100 * share:.1f} % of the views like their image, {blurred}"
        )
    print(f"{made.store.root}: {config.generated} views of every image are there")


if __name__ == "__main__":
    command(main)
