"""Measure ours against the obvious way: ``python tools/bench.py text --backbone ViT-B-16 --classes 100``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> None:
    """Run one benchmark and print its figures as JSON."""
    from benchmarks import BENCHMARKS
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
    text, described = describe_options(target)
    own = argparse.ArgumentParser(
        prog=f"bench.py {args.benchmark}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in options_model(target).model_fields.items():
        shown = f"{described.get(name, '')} ({field.default})".replace("%", "%%")
        own.add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", default=argparse.SUPPRESS, help=shown
        )
    given = vars(own.parse_args(args.options))
    print(json.dumps(target(**check_options(target, given, f"bench {args.benchmark}")), indent=2))


if __name__ == "__main__":
    command(main)
