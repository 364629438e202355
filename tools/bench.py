"""Measure ours against the obvious way: ``python tools/bench.py text --backbone ViT-B-16 --classes 100``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vlprompt.cli import command


def main(arguments: Sequence[str]) -> None:
    """Run one benchmark and print its figures as JSON."""
    from vlprompt.bench import BENCHMARKS
    from vlprompt.signature import check_options, options_model

    listing = "\n".join(f"  {entry.name:8s} {entry.summary}" for entry in BENCHMARKS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", help="see below")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, help="--option value, as the benchmark takes them"
    )
    args = parser.parse_args(list(arguments))

    target = BENCHMARKS.get(args.benchmark).target
    own = argparse.ArgumentParser(prog=f"bench.py {args.benchmark}", description=target.__doc__)
    for name, field in options_model(target).model_fields.items():
        own.add_argument(
            f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS, help=f"({field.default})"
        )
    given = vars(own.parse_args(args.options))
    print(json.dumps(target(**check_options(target, given, f"bench {args.benchmark}")), indent=2))


if __name__ == "__main__":
    command(main)
