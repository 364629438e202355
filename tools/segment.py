"""Text-prompted segmentation: ``python tools/segment.py bench --cfg tunevlseg_tiny.yaml``, predict, search and more.

Each command explains itself: ``python tools/segment.py predict --help``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlprompt.cli._common import command, step_progress


def main(arguments: Sequence[str]) -> int:
    """Carry one command out; 0 if all went well, 1 if some cells or images failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, run, text) in _COMMANDS.items():
        add(commands.add_parser(name, help=text, description=text))
        commands.choices[name].set_defaults(run=run)
    args = parser.parse_args(list(arguments))
    args.line = f"python tools/segment.py {shlex.join(arguments)}"
    return int(args.run(args))


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--resume", action="store_true", help="keep what is finished, continue what isn't")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.lr=0.01"
    )


def _bench(args: Any) -> int:
    from vlprompt.segmentation.config import load_segment_config
    from vlprompt.segmentation.experiment import run_segmentation

    outcome = run_segmentation(load_segment_config(args.cfg, args.overrides), args.resume, args.line)
    print(outcome.table)
    print(f"report: {outcome.folder / 'report.html'}")
    print(f"{outcome.folder / 'metrics.json'}: {int(outcome.metrics['runs'])} cells")
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--model", help="label of the model; the first of the configuration")
    parser.add_argument("--strategy", help="label of the strategy; the first that learns")
    parser.add_argument("--data", help="data set; the first of the configuration")


def _train(args: Any) -> int:
    from vlprompt.segmentation.config import load_segment_config
    from vlprompt.segmentation.experiment import one_cell, run_segmentation

    config = load_segment_config(args.cfg, args.overrides)
    config = one_cell(config, args.model, args.strategy, args.data)
    outcome = run_segmentation(config, args.resume, args.line)
    prompt = next(iter((outcome.folder / "cells").glob("*/prompt")), None)
    print(outcome.table)
    print(f"learned: {prompt}")
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="folder that train or bench wrote (.../prompt)")
    parser.add_argument("data", nargs="+", help="data sets: names, scenes/masks@STYLE, pairs:PATH ...")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--root", help="where data sets lie")
    parser.add_argument("--protocol", default="present", choices=("present", "all", "argmax"),
                        help="classes an image is asked for: those it shows, all, or all in competition")  # fmt: skip
    parser.add_argument("--phrase", help="replaces every phrase")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability above which a pixel is inside"
    )
    parser.add_argument("--csv", type=Path, help="write one line per pair here")


def _evaluate(args: Any) -> int:
    import vlprompt
    from vlprompt.core.files import write_text
    from vlprompt.segmentation.evaluate import load_trained

    segmenter = load_trained(args.prompt)
    queries = "present" if args.protocol == "present" else "all"
    lines = ["data,record,dice,iou,hd95,empty"]
    for name in args.data:
        data = vlprompt.load_segmentation(
            name, args.split, root=args.root, queries=queries, phrase=args.phrase
        )
        found = vlprompt.evaluate_segmenter(
            segmenter, data, threshold=args.threshold, argmax=args.protocol == "argmax"
        )
        print(f"{name} ({args.split}, {len(data)} pairs)")
        for key, value in found.metrics.items():
            if "/" not in key:
                print(
                    f"  {key:22s} " + (f"{value:.1f}" if key in ("pairs", "hd95") else f"{100 * value:.1f} %")
                )
        lines += [
            f"{name},{p.record},{p.dice:.6f},{p.iou:.6f},{p.hd95:.3f},{int(p.empty)}" for p in found.pairs
        ]
    if args.csv:
        write_text(args.csv, "\n".join(lines) + "\n")
    return 0


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="an image")
    parser.add_argument("phrase", help='what to segment, for example "a red circle"')
    parser.add_argument(
        "--out", type=Path, default=Path("mask.png"), help="mask to write: 0 outside, 255 inside"
    )
    parser.add_argument("--overlay", type=Path, help="also write the image with the mask on it")
    parser.add_argument(
        "--prompt", help="folder of a trained model; otherwise --model on --backbone, zero-shot"
    )
    parser.add_argument("--model", default="clipseg", help="model without --prompt (default: clipseg)")
    parser.add_argument("--backbone", default="tiny", help="its backbone (default: tiny, embedded)")
    parser.add_argument("--pretrained", help="its weights")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability above which a pixel is inside"
    )
    parser.add_argument(
        "--soft", action="store_true", help="write probabilities, 0 to 255, instead of the mask"
    )


def _predict(args: Any) -> int:
    import numpy as np
    from PIL import Image

    import vlprompt
    from vlprompt.core.files import write_atomic
    from vlprompt.data import read_image
    from vlprompt.segmentation.evaluate import load_trained, predict_mask
    from vlprompt.segmentation.overlays import overlay

    image = read_image(args.image)
    if args.prompt:
        segmenter = load_trained(args.prompt)
    else:
        backbone = vlprompt.create_backbone(args.backbone, args.pretrained)
        segmenter = vlprompt.create_segmenter(args.model, backbone)
    probs = predict_mask(segmenter, image, args.phrase)
    inside = probs > args.threshold
    values = probs * 255 if args.soft else inside * 255.0
    mask = Image.fromarray(values.round().astype(np.uint8))
    write_atomic(args.out, lambda path: mask.save(path, "PNG"))
    if args.overlay:
        drawn = overlay(image, inside)
        write_atomic(args.overlay, lambda path: drawn.save(path, "PNG"))
    print(f"{args.out}: {100 * inside.mean():.1f} % of {image.width} x {image.height} pixels")
    return 0


def _search(args: Any) -> int:
    from vlprompt.segmentation.config import load_segment_config
    from vlprompt.segmentation.search import search

    outcome = search(load_segment_config(args.cfg, args.overrides), args.resume)
    for name, found in outcome.best.items():
        params = " ".join(
            f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in found["params"].items()
        )
        print(f"{name}: validation loss {found['value']:.4f} of {found['trials']} trials: {params}")
        print(f"  {outcome.folder / f'best_{name}.yaml'}")
    return 0


def _concepts(args: Any) -> int:
    from vlprompt.segmentation.concepts_experiment import ConceptMaskConfig, run_mask_concepts

    config = ConceptMaskConfig.read(args.cfg, args.overrides)
    outcome = run_mask_concepts(config, args.resume, args.line)
    print(outcome.table)
    print(f"report: {outcome.folder / 'report.html'}")
    key = f"concepts, {config.data.images[-1] or 'all'} images/{next(iter(config.data.test))}/dice"
    print(f"{outcome.folder / 'metrics.json'}: {key} {100 * outcome.metrics[key]:.1f} %")
    return 0


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True)
    coco = kinds.add_parser("coco", help="a COCO instance file")
    coco.add_argument("annotations", type=Path, help="the JSON file")
    indexed = kinds.add_parser("indexed", help="masks of class numbers")
    indexed.add_argument("masks", type=Path, help="folder of masks")
    indexed.add_argument("--class", dest="classes", nargs=2, action="append", required=True,
                         metavar=("NAME", "VALUE"), help="a class and its number; once per class")  # fmt: skip
    for kind in (coco, indexed):
        kind.add_argument("images", type=Path, help="folder of the images")
        kind.add_argument("--out", type=Path, required=True, help="folder to write, read as per_class:OUT")
        kind.add_argument("--split", default="train", choices=("train", "val", "test"))


def _convert(args: Any) -> int:
    from vlprompt.core.errors import DataError
    from vlprompt.data.segmentation.convert import convert_coco, convert_indexed

    with step_progress() as progress:

        def show(done: int, total: int) -> None:
            progress("images", done, total)

        if args.kind == "coco":
            written = convert_coco(args.annotations, args.images, args.out, args.split, show)
        else:
            if wrong := [v for _, v in args.classes if not v.isdigit()]:
                raise DataError(f"--class NAME VALUE: a value is a whole number, got {wrong[0]!r}.")
            classes = {name: int(value) for name, value in args.classes}
            written = convert_indexed(args.masks, args.images, classes, args.out, args.split, show)
    for name, count in written.items():
        print(f"{name}: {count} masks")
    print(f"read it as per_class:{args.out}")
    return 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a data set: a name, pairs:PATH, prompts:PATH, per_class:PATH")
    parser.add_argument("--root", help="where data sets lie")
    parser.add_argument("--phrase", help="replaces every phrase")


def _check(args: Any) -> int:
    from vlprompt.core.errors import DataError
    from vlprompt.data.segmentation import label_leaks, load_segmentation, overlaps, pair_problems

    splits, bad = {}, 0
    for split in ("train", "val", "test"):
        try:
            splits[split] = load_segmentation(
                args.data, split, root=args.root, phrase=args.phrase, leaks="keep"
            )
        except DataError as error:
            print(f"{split}: {error}")
            bad += 1
            continue
        data = splits[split]
        problems = pair_problems(data)
        print(f"{split}: {len(data)} pairs of {len(data.images())} images, {len(problems)} unusable")
        for problem in problems[:20]:
            print(f"  {problem}")
        bad += len(problems)
        if not problems:
            for phrase, count in label_leaks(data).items():
                print(f"  the phrase {phrase!r} has empty masks only ({count}): it gives the answer away")
    for (a, b), shared in overlaps(splits).items():
        print(f"{a} and {b} share {len(shared)} images, for example {shared[0][0]} = {shared[0][1]}")
        bad += len(shared)
    return 1 if bad else 0


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[Any], int], str]] = {
    "bench": (_run_arguments, _bench, "run strategies x models x data sets x seeds and write the tables"),
    "train": (_train_arguments, _train, "train one strategy of one model on one data set"),
    "evaluate": (_evaluate_arguments, _evaluate, "score a trained model on data sets"),
    "predict": (_predict_arguments, _predict, "segment one image by a phrase"),
    "search": (_run_arguments, _search, "search options on validation data (needs optuna)"),
    "concepts": (_run_arguments, _concepts, "search a vector per class in the place of phrases (ConES)"),
    "convert": (_convert_arguments, _convert, "turn COCO files or masks of class numbers into binary masks"),
    "check": (
        _check_arguments,
        _check,
        "read every pair; find damaged ones, shared images, phrases that tell",
    ),
}


if __name__ == "__main__":
    command(main)
