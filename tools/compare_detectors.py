"""Compare detectors of poisoned images: ``python tools/compare_detectors.py --cfg compare_detectors_tiny.yaml``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> None:
    """Run a configuration, print its tables and where its figures lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--resume", action="store_true", help="keep finished data sets and seeds")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted overrides, e.g. detectors.dbom.train.lr=0.01",
    )
    args = parser.parse_intermixed_args(list(arguments))

    from vlprompt.security.config import DetectorsConfig  # after parsing, so that --help is instant
    from vlprompt.security.experiment import compare_detectors

    outcome = compare_detectors(DetectorsConfig.read(args.cfg, args.overrides), args.resume)
    print(outcome.table)
    print(outcome.folder / "metrics.json")


if __name__ == "__main__":
    command(main)
