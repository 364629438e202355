"""From a few images to a concept file, and from a concept file to images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlprompt.concepts.embedding import Concepts
from vlprompt.core.errors import DataError
from vlprompt.core.files import write_json
from vlprompt.core.options import check_options
from vlprompt.generation import PERSONALISERS
from vlprompt.generation.base import NoisedBatches, Personaliser
from vlprompt.generation.hosts import Host
from vlprompt.training.callback_lists import run_callbacks
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["Personalised", "concept_context", "personalise"]

Watch = Callable[[Personaliser], Mapping[str, float]]


@dataclass(frozen=True)
class Personalised:
    """What a search leaves behind.

    Attributes:
        module: What was learned, in its host.
        history: One record per step at which it was measured: ``step``, ``loss`` from the first step on, and measures.
        clock: Step to seconds of training so far, for the steps of the history.
        seconds: Of all training, without measuring.
        start: Seconds before the first step: encoding of images and of the text that the search starts from.
    """

    module: Personaliser
    history: list[dict[str, float]] = field(repr=False)
    clock: dict[int, float] = field(repr=False)
    seconds: float
    start: float


def personalise(
    host: Host,
    images: Sequence[Image.Image],
    word: str,
    method: str = "cones",
    *,
    train: TrainOptions,
    options: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> Personalised:
    """Learn a concept.

    Args:
        host: The frozen model. If the search fails, it is put back as it came.
        images: A few images of the concept.
        word: What it is, coarsely; the search starts there.
        method: See :func:`vlprompt.generation.list_personalisers`.
        train: ``epochs`` are steps, since a step sees every image; ``batch_size`` noise levels per step.
        options: The method's own, see its class.
        watch: Measures what was learned, before the first step and every ``train.eval_every`` steps; not timed.
        folder: Where a checkpoint is saved; None saves none.
        resume: Continue from it.

    Raises:
        DataError: If there is no image.
        UnknownNameError: For an unknown method.
        ConfigError: For options it doesn't have or values it doesn't take.
    """
    if not images:
        raise DataError("a concept needs at least one image.")
    started = time.monotonic()
    entry = PERSONALISERS.get(method)
    checked = check_options(entry.target, options or {}, source=f"personaliser {method!r}")
    module: Personaliser = entry.target(host, images, word, **checked)
    module.method = method
    batches = NoisedBatches(host.latents(images), train.batch_size, train.seed, host.levels)
    before_training = time.monotonic() - started

    def measure() -> Mapping[str, float]:
        assert watch is not None
        with torch.no_grad():
            return watch(module)

    # The start is measured here, also after a kill: the checkpoint holds later states only.
    history: list[dict[str, float]] = []
    if watch is not None:
        history.append(_record(0, measure()))

    clock = _Clock(folder)
    trainer = Trainer(
        module,
        batches,
        train,
        folder,
        validate=None if watch is None else measure,
        callbacks=[clock, *run_callbacks(folder)],
        identity={"method": method, "host": host.identity},
    )
    with module.unfrozen.restored_on_error():
        progress = trainer.run(resume)

    for record in progress.history:
        measures = {key.removeprefix("val/"): record[key] for key in record if key.startswith("val/")}
        if measures:
            history.append(_record(int(record["epoch"]) + 1, measures, float(record["loss"])))
    return Personalised(module, history, clock.seconds, progress.seconds, before_training)


def concept_context(path: str | Path, host: Host, template: str | None = None) -> Tensor:
    """Return a saved concept's context, for ``pipe(prompt_embeds=...)`` or :meth:`Host.draw`.

    Args:
        path: The concept file.
        host: The model it was learned on.
        template: A sentence with one ``*`` for concepts of mode ``slot``; None: the one it was learned with.

    Returns:
        (1, S, d).

    Raises:
        CheckpointError: If the file does not fit the host; names the difference.
        DataError: If a template is given for a concept that is a whole context.
    """
    concepts = Concepts.load(path, "generator")
    concepts.check_host(host.identity, path)
    vectors = concepts.vectors[0]
    facts = concepts.facts
    if facts["mode"] == "full":
        if template is not None:
            raise DataError(f"{path} holds a whole context (mode full); it can't stand in a template.")
        return vectors[None]

    around, first = host.slots(template or facts["template"], facts["word"], len(vectors))
    vectors = vectors.to(around)
    return torch.cat([around[:first], vectors, around[first + len(vectors) :]])[None]


class _Clock(Callback):
    """Notes the seconds of training at every measured step, in a file that a resumed run goes on with.

    Args:
        folder: Where ``seconds.json`` is written; None: nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "seconds.json"
        self.seconds: dict[int, float] = {}

    def on_start(self, trainer: TrainingView) -> None:
        """Take up what an earlier session noted, up to its last checkpoint."""
        self.seconds = {0: 0.0}
        if trainer.progress.epoch and self.path is not None and self.path.is_file():
            noted = json.loads(self.path.read_text(encoding="utf-8"))
            for step, seconds in noted.items():
                if int(step) <= trainer.progress.epoch:
                    self.seconds[int(step)] = float(seconds)

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Note the time of a step that was measured."""
        if not any(key.startswith("val/") for key in record):
            return
        self.seconds[int(record["epoch"]) + 1] = trainer.progress.seconds
        if self.path is not None:
            write_json(self.path, self.seconds)


def _record(step: int, measures: Mapping[str, float], loss: float | None = None) -> dict[str, float]:
    record = {"step": float(step)}
    if loss is not None:
        record["loss"] = loss
    return {**record, **{key: float(value) for key, value in measures.items()}}
