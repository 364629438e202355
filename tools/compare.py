"""Several methods in one table: ``python tools/compare.py --cfg compare_base_to_new_tiny.yaml [key=value ...]``.

Overrides apply to every run. A run that fails is reported at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> int:
    """Run a comparison and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--resume", action="store_true", help="keep finished runs and cells")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of every run")
    args = parser.parse_intermixed_args(list(arguments))

    from vlprompt.classification.compare import Comparison, compare

    outcome = compare(Comparison.read(args.cfg, args.overrides), args.resume)
    print(outcome.text)
    print(outcome.folder / "comparison.md")
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    command(main)
