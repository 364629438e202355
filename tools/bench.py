"""Measure our code against a baseline: ``python tools/bench.py text --backbone ViT-B-16 --classes 100``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from vlprompt.cli._errors import exit_status


def main(arguments: Sequence[str]) -> None:
    """Run one benchmark and print its figures as JSON."""
    from benchmarks import BENCHMARKS
    from benchmarks.machine import NoiseWatch, bounded_memory
    from vlprompt.core.options import check_options, describe_options, options_model

    listing = "\n".join(f"  {entry.name:10s} {entry.summary}" for entry in BENCHMARKS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", help="see below; its own options: bench.py NAME --help")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="--option value, as the benchmark takes them"
    )
    args = parser.parse_args(list(arguments))

    target = BENCHMARKS.get(args.benchmark).target
    text, descriptions = describe_options(target)
    option_parser = argparse.ArgumentParser(
        prog=f"bench.py {args.benchmark}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in options_model(target).model_fields.items():
        description = f"{descriptions.get(name, '')} ({field.default})".replace("%", "%%")
        flag = f"--{name.replace('_', '-')}"
        option_parser.add_argument(
            flag, dest=name, metavar="VALUE", default=argparse.SUPPRESS, help=description
        )

    values = vars(option_parser.parse_args(args.options))
    options = check_options(target, values, f"bench {args.benchmark}")
    watch = NoiseWatch()
    with bounded_memory():
        result = target(**options)

    noise = watch.noise()
    if noise is not None:
        machine = {"processors": os.cpu_count(), "busy_with_others": noise.others, "stolen": noise.stolen}
        result["machine"] = {**machine, "quiet": noise.quiet}
        if not noise.quiet:
            print(f"warning: {noise.warning()}", file=sys.stderr)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
