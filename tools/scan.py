"""Look for backdoor triggers: ``python tools/scan.py FOLDER --detector runs/dbom_tiny/ID/prompt``; resumes.

Exit status 0: nothing found; 3: something found; 1: nothing found, but some images could not be read; 2: an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlprompt.cli._common import command, step_progress
from vlprompt.core.errors import DataError

FOUND = 3


def main(arguments: Sequence[str]) -> int:
    """Scan a folder and say where the table, the cleaned list and the sheet are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="searched at any depth")
    parser.add_argument("--detector", required=True, help="folder with a saved dbom learner")
    parser.add_argument("--output", type=Path, help="where to write (default: scans/NAME OF THE FOLDER)")
    parser.add_argument("--objects", nargs="+", help="other objects to name than those trained on")
    parser.add_argument(
        "--threshold", type=float, help="score from which an image is suspected (default: the detector's)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per pass")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode")
    parser.add_argument("--top", type=int, default=200, help="images on the sheet")
    parser.add_argument("--resume", action="store_true", help="continue behind the last verdict")
    args = parser.parse_args(list(arguments))

    import torch

    import vlprompt
    from vlprompt.security.folder import scan_folder

    detector = vlprompt.load(args.detector)
    if not hasattr(detector, "judge"):
        raise DataError(
            f"{args.detector} holds {detector.method}, which is no detector. Train one: --cfg dbom_tiny.yaml."
        )
    if args.objects:
        detector = detector.with_classes(args.objects)
    detector = detector.to("cuda" if torch.cuda.is_available() else "cpu")
    output = args.output or Path("scans") / (args.folder.resolve().name or "folder")
    with step_progress() as progress:
        found = scan_folder(
            args.folder,
            detector,
            output,
            threshold=args.threshold,
            resume=args.resume,
            batch_size=max(1, args.batch_size),
            workers=max(1, args.workers),
            top=max(0, args.top),
            progress=progress,
        )
    print(f"{found.total} images: {found.poisoned} suspected, {found.unreadable} unreadable")
    for name in ("report.csv", "report.json", "cleaned.txt", "report.html"):
        print(found.output / name)
    if found.poisoned:
        return FOUND
    return 1 if found.unreadable else 0


if __name__ == "__main__":
    command(main)
