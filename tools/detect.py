"""Search concepts for a detector: ``python tools/detect.py --cfg cones_detect_tiny.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> None:
    """Run a configuration, print its table and where its files lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument(
        "--resume", action="store_true", help="keep finished cells, continue the unfinished one"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.lr=0.01"
    )
    args = parser.parse_intermixed_args(list(arguments))

    from vlprompt.detection.config import DetectConfig  # after parsing, so that --help is instant
    from vlprompt.detection.experiment import run_detection

    config = DetectConfig.read(args.cfg, args.overrides)
    outcome = run_detection(config, args.resume, f"python tools/detect.py {shlex.join(arguments)}")
    print(outcome.table)
    print(f"report: {outcome.folder / 'report.html'}")
    key = f"concepts, {config.data.images[-1] or 'all'} images/{next(iter(config.data.test))}/AP50"
    print(f"{outcome.folder / 'metrics.json'}: {key} {100 * outcome.metrics[key]:.1f} %")


if __name__ == "__main__":
    command(main)
