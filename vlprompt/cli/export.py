"""``vlprompt export``: a saved prompt as one file that runs without this library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes

if TYPE_CHECKING:
    from vlprompt.learners import Learner

__all__ = ["command"]


def command(
    prompt: Annotated[
        str, typer.Argument(help="A saved prompt's folder, that of its run, or its name on the Hub.")
    ],
    out: Annotated[Path, typer.Argument(metavar="FILE", help="*.onnx, or *.pt2 for torch.export.")],
    phrase: Annotated[
        list[str] | None, typer.Option(help="Of a segmenter: what to segment; repeat it.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights in eight bits (ONNX); say --data to see what it costs.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="A data set: print the accuracy of the learner and of the file on it.")
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the data set.")] = "test",
    backbone: BackboneChanges = None,
) -> int:
    """Write a saved learner or segmenter as one file, and check that it gives the same logits."""
    from vlprompt.core.errors import ConfigError
    from vlprompt.saved.export import export
    from vlprompt.saved.prompts import build_learner, read

    changes = backbone_changes(backbone)
    card, tensors = read(prompt)
    if card.kind == "segmenter":
        from vlprompt.segmentation.evaluate import build_segmenter
        from vlprompt.segmentation.export import export_segmenter

        if int8 or data is not None:
            raise ConfigError(
                ["--int8 and --data are for classifiers; this prompt is a segmenter's."], prompt
            )
        if not phrase:
            raise ConfigError(['a segmenter is exported for its phrases: --phrase "a red circle".'], prompt)
        path = export_segmenter(build_segmenter(prompt, card, tensors, changes), out, phrase)
    else:
        if phrase:
            raise ConfigError(["--phrase is for segmenters; this prompt is a classifier's."], prompt)
        if data is not None and out.suffix != ".onnx":
            raise ConfigError(["--data measures .onnx files alone."], str(out))
        learner = build_learner(prompt, card, tensors, changes)
        path = export(learner, out, int8=int8)

    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if data is not None:
        _print_accuracies(learner, path, data, split)
    return 0


def _print_accuracies(learner: Learner, path: Path, name: str, split: str) -> None:
    """Print the accuracy of the learner, and of its file, on the same images."""
    from vlprompt.classification.predict import accuracy
    from vlprompt.data import load_dataset
    from vlprompt.saved.exported import ExportedClassifier

    data = load_dataset(name, split=split)
    before = accuracy(learner, data)
    after = accuracy(ExportedClassifier(path), data)
    print(
        f"accuracy on {len(data)} images of {data.name}: {100 * before:.1f} % (learner), {100 * after:.1f} % (file)"
    )
