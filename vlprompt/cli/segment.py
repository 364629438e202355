"""``vlprompt segment``: use saved segmentation models, and check their data.

Training, searches and benchmarks are experiments like all others: ``vlprompt run tunevlseg_tiny.yaml``.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes
from vlprompt.cli._errors import CommandGroup
from vlprompt.core.errors import DataError

if TYPE_CHECKING:
    from vlprompt.data.segmentation import MaskDataset
    from vlprompt.segmentation import Segmenter

__all__ = ["app"]

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Segmentation by phrases: predict, evaluate, check. To train: vlprompt run tunevlseg_tiny.yaml",
)

_SHOWN = 20  # problems that are printed of each part


class Protocol(str, Enum):
    """Which classes an image is asked for."""

    PRESENT = "present"
    ALL = "all"
    ARGMAX = "argmax"


@app.command()
def predict(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    phrase: Annotated[str, typer.Argument(help='What to segment, for example "a red circle".')],
    out: Annotated[Path, typer.Option(help="Mask to write: 0 outside, 255 inside.")] = Path("mask.png"),
    overlay: Annotated[Path | None, typer.Option(help="Also write the image with the mask on it.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Saved model's folder, or its run's; without: --model on --backbone name=..., zero-shot."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Model without --prompt.")] = "clipseg",
    backbone: BackboneChanges = None,
    adapt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Tune the saved prompts on this image first: name=entropy, steps=4, lr=0.02; repeat it.",
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Probability above which a pixel is inside.")] = 0.5,
    soft: Annotated[
        bool, typer.Option("--soft", help="Write probabilities, 0 to 255, instead of the mask.")
    ] = False,
) -> None:
    """Segment what a phrase names in an image."""
    _check_threshold(threshold)
    import numpy as np
    from PIL import Image

    from vlprompt.core.files import write_atomic
    from vlprompt.data import read_image
    from vlprompt.saved.rebuild import build_from
    from vlprompt.segmentation import create_segmenter, overlays
    from vlprompt.segmentation.evaluate import load_trained, predict_mask

    changes = backbone_changes(backbone)
    pixels = read_image(image)
    segmenter = load_trained(prompt, changes) if prompt else create_segmenter(model, build_from(changes))
    if unread := segmenter.unread_words(phrase):
        listed = ", ".join(map(repr, unread))
        print(
            f"{segmenter.backbone.name} was taught no word like {listed}: the mask says little of them.",
            file=sys.stderr,
        )
    if adapt:
        segmenter = _adapted(segmenter, adapt)
    probabilities = predict_mask(segmenter, pixels, phrase)
    inside = probabilities > threshold

    values = probabilities * 255 if soft else inside * 255.0
    mask = Image.fromarray(values.round().astype(np.uint8))
    write_atomic(out, lambda path: mask.save(path, "PNG"))
    if overlay is not None:
        painted = overlays.overlay(pixels, inside)
        write_atomic(overlay, lambda path: painted.save(path, "PNG"))
    print(f"{out}: {100 * inside.mean():.1f} % of {pixels.width} x {pixels.height} pixels")


@app.command()
def evaluate(
    prompt: Annotated[str, typer.Argument(help="A saved model's folder, or the folder of its run.")],
    data: Annotated[list[str], typer.Argument(help="Data sets: names, scenes/masks@STYLE, pairs:PATH ...")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    root: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    protocol: Annotated[
        Protocol,
        typer.Option(help="Classes an image is asked for: those it shows, all, or all in competition."),
    ] = Protocol.PRESENT,
    phrase: Annotated[str | None, typer.Option(help="Replaces every phrase.")] = None,
    threshold: Annotated[float, typer.Option(help="Probability above which a pixel is inside.")] = 0.5,
    backbone: BackboneChanges = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line per pair here.")] = None,
) -> None:
    """Score a saved segmentation model on data sets."""
    _check_threshold(threshold)
    from vlprompt.core.csv_text import csv_text
    from vlprompt.core.files import write_text
    from vlprompt.data import load_segmentation
    from vlprompt.segmentation.evaluate import evaluate_segmenter, load_trained

    segmenter = load_trained(prompt, backbone_changes(backbone))
    queries: Literal["present", "all"] = "present" if protocol is Protocol.PRESENT else "all"
    rows: list[tuple[Any, ...]] = []

    for name in data:
        dataset = load_segmentation(name, split, root=root, queries=queries, phrase=phrase)
        scores = evaluate_segmenter(
            segmenter, dataset, threshold=threshold, argmax=protocol is Protocol.ARGMAX
        )
        print(f"{name} ({split}, {len(dataset)} pairs)")

        for key, value in scores.metrics.items():
            if "/" not in key:  # figures of single classes are in the table
                figure = f"{value:.1f}" if key in ("pairs", "hd95") else f"{100 * value:.1f} %"
                print(f"  {key:22s} {figure}")

        for pair in scores.pairs:
            figures = (round(pair.dice, 6), round(pair.iou, 6), round(pair.hd95, 3))
            rows.append((name, pair.record, *figures, int(pair.empty)))

    if csv is not None:
        write_text(csv, csv_text(("data", "record", "dice", "iou", "hd95", "empty"), rows))


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="A name, pairs:PATH, prompts:PATH or per_class:PATH.")],
    root: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    phrase: Annotated[str | None, typer.Option(help="Replaces every phrase.")] = None,
) -> int:
    """Read every pair; find damaged ones, images shared by parts, and label leakage.

    Exit status: 0 if all is well; 1 if something is wrong; 2 after a mistake.
    """
    from vlprompt.data import load_segmentation
    from vlprompt.data.segmentation import overlaps

    splits = {}
    problems = 0
    for split in ("train", "val", "test"):
        try:
            splits[split] = load_segmentation(data, split, root=root, phrase=phrase, leaks="keep")
        except DataError as error:
            print(f"{split}: {error}")
            problems += 1
        else:
            problems += _print_problems(split, splits[split])

    for (first, second), shared in overlaps(splits).items():
        example = f"{shared[0][0]} = {shared[0][1]}"
        print(f"{first} and {second} share {len(shared)} images, for example {example}")
        problems += len(shared)
    return 1 if problems else 0


def _adapted(segmenter: Segmenter, words: list[str]) -> Segmenter:
    """Return the segmenter that ``--adapt`` asks for.

    Raises:
        ConfigError: For an option that the method doesn't have, or a bad value.
        DataError: If the segmenter has no prompts.
    """
    from vlprompt.core.options import options_model
    from vlprompt.experiments.config import parse_overrides
    from vlprompt.segmentation.adapters import SEGMENTATION_ADAPTERS, create_segmentation_adapter

    pairs = [word if "=" in word else f"name={word}" for word in words]
    named = [pair.removeprefix("name=") for pair in pairs if pair.startswith("name=")]
    name = named[-1] if named else "entropy"
    own = [pair for pair in pairs if not pair.startswith("name=")]
    options = parse_overrides(own, options_model(SEGMENTATION_ADAPTERS.get(name).target))
    return create_segmentation_adapter(name, segmenter, **options)


def _check_threshold(threshold: float) -> None:
    """Refuse a threshold that no probability, or every one, is above."""
    if not 0 <= threshold <= 1:
        raise DataError(f"--threshold must be a probability in [0, 1], got {threshold}.")


def _print_problems(split: str, data: MaskDataset) -> int:
    """Print what is wrong with one part; return the number of pairs that can't be used."""
    import open_clip

    from vlprompt.backbones.tokenizer import wrap_tokenizer
    from vlprompt.data.segmentation import label_leaks, long_phrases, pair_problems

    problems = pair_problems(data)
    print(f"{split}: {len(data)} pairs of {len(data.images())} images, {len(problems)} unusable")
    for problem in problems[:_SHOWN]:
        print(f"  {problem}")
    if len(problems) > _SHOWN:
        print(f"  and {len(problems) - _SHOWN} more")

    tokenizer = wrap_tokenizer(open_clip.SimpleTokenizer())
    ends = len(tokenizer.start) + len(tokenizer.end)
    long = long_phrases(data, lambda phrase: len(tokenizer.encode(phrase)) + ends)
    for phrase, (length, count) in list(long.items())[:_SHOWN]:
        print(
            f"  the phrase {phrase[:60]!r} takes {length} tokens ({count} pairs); text towers read 77 at most, fewer "
            "beside learned prompts"
        )
    if not problems:
        for phrase, count in label_leaks(data).items():
            print(f"  label leakage: the phrase {phrase!r} has empty masks only ({count})")
    return len(problems) + len(long)
