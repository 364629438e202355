"""Which task's prompts help which: ``python tools/transfer.py --cfg mvlpt_transfer_tiny.yaml [key=value ...]``.

Trains every task from scratch and from every task's prompts, and writes the matrix of relative gains, a heat map,
the ranking of sources and groups that help each other (for multitask.groups) beside the run's other results. Finished
cells are kept by ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> int:
    """Run a study and print its matrix and where its files lie."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument(
        "--resume", action="store_true", help="keep finished cells, continue the unfinished one"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    args = parser.parse_intermixed_args(list(arguments))

    from vlprompt import load_config, run  # after parsing, so that --help is instant
    from vlprompt.classification.transfer_matrix import TransferMatrix

    config = load_config(args.cfg, [*args.overrides, "protocol.name=transfer"])
    outcome = run(config, args.resume, f"python tools/transfer.py {shlex.join(arguments)}")
    record = json.loads((outcome.folder / "transfer.json").read_text(encoding="utf-8"))
    print(TransferMatrix.from_record(record).text())
    for name in ("report.html", "transfer.png", "transfer.csv", "transfer.json"):
        print(outcome.folder / name)
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    command(main)
