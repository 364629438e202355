"""Adapt at test time: ``python tools/adapt.py --cfg tpt_tiny.yaml [dotted.key=value ...] [--resume]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlprompt.cli._common import command, step_progress


def main(arguments: Sequence[str]) -> None:
    """Run a configuration, print its table and where its figures lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--resume", action="store_true", help="continue behind the last finished batch")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. adapters.tpt.lr=0.01"
    )
    args = parser.parse_intermixed_args(list(arguments))

    from vlprompt.adaptation.config import AdaptConfig  # after parsing, so that --help is instant
    from vlprompt.adaptation.experiment import run_adaptation

    config = AdaptConfig.read(args.cfg, args.overrides)
    with step_progress() as progress:
        outcome = run_adaptation(config, args.resume, progress)
    print(outcome.table)
    label = next(iter(config.adapters))
    key = f"{label}/{'average' if len(config.data.names) > 1 else config.data.names[0]}/accuracy"
    print(f"{outcome.folder / 'metrics.json'}: {key} {100 * outcome.metrics[key]:.1f} %")


if __name__ == "__main__":
    command(main)
