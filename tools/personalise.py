"""Teach a generator concepts: ``python tools/personalise.py --cfg cones_generate_tiny.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> None:
    """Run a configuration, print its table and where its files lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--resume", action="store_true", help="keep concepts that were finished before")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.lr=0.01"
    )
    args = parser.parse_intermixed_args(list(arguments))

    from vlprompt.generation.config import PersonaliseConfig  # after parsing, so that --help is instant
    from vlprompt.generation.experiment import run_personalisation

    config = PersonaliseConfig.read(args.cfg, args.overrides)
    outcome = run_personalisation(config, args.resume, f"python tools/personalise.py {shlex.join(arguments)}")
    print(outcome.table)
    print(f"report: {outcome.folder / 'report.html'}")
    label = next(iter(config.methods))
    print(f"{outcome.folder / 'metrics.json'}: {label}/similarity {outcome.metrics[f'{label}/last']:.3f}")


if __name__ == "__main__":
    command(main)
