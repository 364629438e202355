"""From a few images to a concept file, and from a concept file to images."""

from __future__ import annotations

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
from vlprompt.core.options import check_options
from vlprompt.generation import PERSONALISERS
from vlprompt.generation.base import NoisedBatches, Personaliser
from vlprompt.generation.hosts import Host
from vlprompt.training.callbacks import Callback
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["Personalised", "concept_context", "personalise"]


@dataclass(frozen=True)
class Personalised:
    """What a search left behind.

    Attributes:
        module: What was learned, in its host.
        history: One record per step that was looked at: ``step``, ``seconds`` of training so far, and measures.
        seconds: Of all training, without what was looked at.
        start: Seconds before the first step: encoding of images and of the text that the search starts from.
    """

    module: Personaliser
    history: list[dict[str, float]] = field(repr=False)
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
    watch: Callable[[Personaliser], Mapping[str, float]] | None = None,
    folder: Path | None = None,
    resume: bool = False,
) -> Personalised:
    """Learn a concept.

    Args:
        host: The frozen model.
        images: A few images of the concept.
        word: What it is, coarsely; the search starts there.
        method: See :func:`vlprompt.generation.list_personalisers`.
        train: ``epochs`` are steps, since a step sees every image; ``batch_size`` noise levels per step.
        options: The method's own, see its class.
        watch: Measures what was learned, at the start and every ``train.eval_every`` steps; not timed.
        folder: Where a checkpoint is kept; None keeps none.
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
    begun = time.monotonic() - started
    history = _Watch(module, watch, train.eval_every)
    trainer = Trainer(
        module,
        batches,
        train,
        folder,
        callbacks=[history],
        identity={"method": method, "host": host.identity},
    )
    progress = trainer.run(resume)
    return Personalised(module, history.records, progress.seconds, begun)


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
    vectors, facts = concepts.vectors[0], concepts.facts
    if facts["mode"] == "full":
        if template is not None:
            raise DataError(f"{path} holds a whole context (mode full); it can't stand in a template.")
        return vectors[None]
    around, first = host.slots(template or facts["template"], facts["word"], len(vectors))
    vectors = vectors.to(around)
    return torch.cat([around[:first], vectors, around[first + len(vectors) :]])[None]


class _Watch(Callback):
    """Measures the concept between steps, off the clock."""

    def __init__(self, module: Personaliser, measure: Any, every: int) -> None:
        self.module, self.measure, self.every = module, measure, every
        self.records: list[dict[str, float]] = []

    def on_start(self, trainer: Trainer) -> None:
        """Measure the start."""
        self._record(0, 0.0)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Measure after every so many steps, and after the last one."""
        step = int(record["epoch"]) + 1
        if step % self.every == 0 or step == trainer.options.epochs:
            self._record(step, trainer.progress.seconds, float(record["loss"]))

    def _record(self, step: int, seconds: float, loss: float | None = None) -> None:
        if self.measure is None:
            return
        with torch.no_grad():
            numbers = {k: float(v) for k, v in self.measure(self.module).items()}
        held = {} if loss is None else {"loss": loss}
        self.records.append({"step": float(step), "seconds": seconds, **held, **numbers})
