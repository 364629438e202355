"""Train and test a learner: ``python tools/train.py --cfg coop_tiny.yaml [dotted.key=value ...] [--resume]``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> int:
    """Run a configuration and print where its figures lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument(
        "--resume", action="store_true", help="keep finished cells, continue the unfinished one"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.lr=0.01"
    )
    args = parser.parse_intermixed_args(list(arguments))

    from vlprompt import load_config, run  # after parsing, so that --help is instant

    config = load_config(args.cfg, args.overrides)
    outcome = run(config, args.resume, f"python tools/train.py {shlex.join(arguments)}")
    place, slash, measure = outcome.headline.rpartition("/")
    zero = outcome.metrics.get(f"{place}{slash}zero_shot_{measure}")
    value = outcome.metrics.get(outcome.headline)
    if zero is not None:
        print(f"zero-shot {measure} {100 * zero:.1f} %")
    print(f"report: {outcome.folder / 'report.html'}")
    score = "no result" if value is None else f"{outcome.headline} {100 * value:.1f} %"
    print(f"{outcome.folder / 'metrics.json'}: {score}")
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    command(main)
