"""A training step of every learner against a baseline that computes the same step.

Ours is what ``fit`` does after its first epoch: the real trainer, cached image embeddings where they are exact,
the fast text tower, constants computed before. Obvious is the same learner and trainer with

* every class's sentence run through the text tower, padded to its full context length, at every step (also
  where nothing learned is in it),
* every image run through the image tower at every step,
* a graph from both towers' inputs on, whether something learned is there or not.

Both take the same step: the parameters' change is compared.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks._naive import naive_text_bytes, naive_towers, replaced
from benchmarks._step import learned, relative, take_step
from benchmarks.machine import bounded_memory, require_memory
from benchmarks.measure import Aside, Measured, Work, in_turns
from benchmarks.text import imagenet_names
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import VLPromptError
from vlprompt.core.options import options_model
from vlprompt.core.precision import Precision
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import LEARNERS, Learner, create_learner

__all__ = ["bench_learners"]

log = logging.getLogger("benchmarks")
_PATCH = 14 * 14  # pixels of a small patch, for what a step may need
_SHOTS = 16  # training samples per class of a learner that starts from them
_NOISE = 1e-3  # updates that differ by more between seeds belong to a method that draws


@BENCHMARKS.register("learners", summary="a training step of every learner, ours against the obvious one")
def bench_learners(
    *,
    backbone: str = "ViT-B-16",
    classes: int = 100,
    batch: int = 8,
    only: str = "*",
    precision: Precision = "fp32",
    repeats: int = 3,
    naive: bool = True,
    image_graph: bool = True,
    isolated: bool = True,
) -> dict[str, Any]:
    """Compare steps of all learners that step, with default options, random weights and ImageNet's class names.

    A learner with an option ``family`` gets one row per value. ``update_rel_diff`` is the relative difference
    between the two steps' changes of the parameters (null for methods that draw noise); ``step_gib`` is what a
    step adds to the memory held before it; ``limited_by`` names what most of our forward time goes to. A learner that
    would need more than half of the machine's memory gets a row that says so.

    Args:
        backbone: Any open_clip architecture, or tiny.
        classes: C.
        batch: Images per step.
        only: Shell pattern of the learners to measure.
        precision: If it is half precision, ours is measured in it too, in turns with the others in float32.
        repeats: Counted pairs of steps, ours and the naive one in turns.
        naive: False measures ours alone.
        image_graph: Whether the naive step keeps a graph through the image tower where nothing in it learns.
        isolated: Whether every learner is measured in a process of its own.
    """
    settings = _Settings(
        backbone, classes, batch, precision, repeats, naive, image_graph, torch.get_num_threads()
    )
    rows = {}

    for name, options in _variants(only):
        label = _row_name(name, options)
        row = _in_new_process(settings, name, options) if isolated else _row(settings, name, options)
        if row is not None:
            rows[label] = row
            log.info("%s: %s", label, _summary(row))

    facts = {"backbone": backbone, "classes": classes, "batch": batch, "image_graph": image_graph}
    return {**facts, "threads": settings.threads, "learners": dict(sorted(rows.items()))}


@dataclass(frozen=True)
class _Settings:
    """What a row depends on beside its learner; see :func:`bench_learners`."""

    backbone: str
    classes: int
    batch: int
    precision: Precision
    repeats: int
    naive: bool
    image_graph: bool
    threads: int


def _in_new_process(settings: _Settings, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """Return a row from a process of its own: what one learner keeps is not in the memory of the next."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare) as pool:
        try:
            return pool.submit(_bounded_row, settings, name, options).result()
        except BrokenProcessPool:
            return {
                "refused": "its process was ended: it needs more than half of the machine's memory, or crashed."
            }


def _prepare() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def _bounded_row(settings: _Settings, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    torch.set_num_threads(settings.threads)
    with bounded_memory():
        return _row(settings, name, options)


def _row(settings: _Settings, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """Measure one learner; None for one that does not step."""
    tower = create_backbone(settings.backbone)
    try:
        _require_memory(tower, settings)
        names = imagenet_names(settings.classes)
        case = _Case.build(tower, name, options, names, settings.batch)

        if case is None or settings.precision == "fp32":
            return None if case is None else _measured(case, settings)

        narrow = create_backbone(settings.backbone, precision=settings.precision)
        half = _Case.build(narrow, name, options, names, settings.batch)
        return _measured(case, settings, half)
    except VLPromptError as error:  # a method that can't work on this backbone says why
        return {"refused": str(error)}


def _require_memory(backbone: Backbone, settings: _Settings) -> None:
    """Refuse what would not fit: both towers' activations, and weights, gradients and updates of what may learn."""
    text = naive_text_bytes(backbone.text, settings.classes)
    height, width = backbone.image_size
    tokens = 1 + height * width // _PATCH
    image = 4 * 17 * backbone.vision.layers * backbone.vision.width * tokens * settings.batch
    weights = 6 * sum(p.numel() * p.element_size() for p in backbone.parameters())
    advice = "Use fewer classes (--classes) or a smaller batch (--batch)."
    require_memory(min(text, 4 << 30) + image + weights, "a step of both ways", advice)


@dataclass
class _Case:
    """A learner, a batch for it, and what its steps were seen to do."""

    learner: Learner
    batch: dict[str, Tensor]
    pixels: dict[str, Tensor]
    start: dict[str, Tensor]
    accelerator: Accelerator = field(default_factory=Accelerator)
    sets: int = 0  # of prompts per text pass, 0 if no sentence is encoded in a step

    @classmethod
    def build(
        cls, backbone: Backbone, name: str, options: dict[str, Any], names: list[str], size: int
    ) -> _Case | None:
        """Return a case, or None for a learner that does not step."""
        learner = create_learner(name, backbone, names, **options)
        generator = torch_rng(0, "bench learners")
        labels = torch.randint(len(names), (size,), generator=generator)
        images = torch.randn(size, 3, *backbone.image_size, generator=generator)

        if learner.prepares:
            views = torch.randn(1, _SHOTS * len(names), backbone.dim, generator=generator)
            learner.prepare(views, torch.arange(len(names)).repeat(_SHOTS))

        if learner.solves or not learner.learned_parameters():
            return None

        pixels = {"image": images, "label": labels}
        batch = pixels

        if learner.static_images:
            batch = {"embedding": learner.embed_images(images), "label": labels}
        return cls(learner, batch, pixels, learned(learner))

    def step(self, batch: Mapping[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
        """Take one step of the trainer from the start; return by how much it changed the parameters."""
        take_step(self.learner, batch, self.start, seed=seed, accelerator=self.accelerator)
        return {n: p - self.start[n] for n, p in learned(self.learner).items()}


def _measured(case: _Case, settings: _Settings, half: _Case | None = None) -> dict[str, Any]:
    """Measure the ways in turns, and compare the steps that they take; ``half`` is ours in half precision."""
    other_seed = case.step(case.batch, seed=2)  # warms up, and shows whether another seed gives another step
    with _watched(case) as seconds:
        started = time.perf_counter()
        fast = case.step(case.batch)
        watched = time.perf_counter() - started

    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in case.learner.parameters() if p.requires_grad),
        "text_forward_s": seconds["text"],
        "image_forward_s": seconds["image"],
        "limited_by": _limit(watched, seconds["text"], seconds["image"]),
    }
    naive: dict[str, Tensor] = {}

    def obvious() -> Aside:
        with naive_towers(case.learner, settings.image_graph, constant_text=case.sets == 0) as aside:
            naive.update(case.step(case.pixels))
        return aside

    ways: dict[str, Work] = {"fast": lambda: case.step(case.batch)}
    if settings.naive:
        ways["naive"] = obvious
    rough = half.step(half.batch) if half is not None else {}  # warms up
    if half is not None:
        ways["half"] = lambda: half.step(half.batch)

    turns = in_turns(ways, settings.repeats, warmup=0)
    row |= _figures("fast", turns["fast"])
    if half is not None:
        row[settings.precision] = {**turns.half_precision(), "update_cosine": _cosine(fast, rough)}
    if not settings.naive:
        return row

    draws = relative(other_seed, fast) > _NOISE
    return {
        **row,
        **_figures("naive", turns["naive"]),
        "speedup": turns.ratio("naive", "fast"),
        "cpu_speedup": turns.cpu_ratio("naive", "fast"),
        "update_rel_diff": None if draws else relative(fast, naive),
        "quiet": turns.quiet,
    }


def _cosine(ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Return the cosine of two updates, over all tensors of both."""
    a, b = (torch.cat([update[name].flatten().double() for name in ours]) for update in (ours, others))
    return float(F.cosine_similarity(a, b, dim=0))


def _figures(way: str, measured: Measured) -> dict[str, Any]:
    return {
        f"{way}_s": measured.seconds,
        f"{way}_cpu_s": measured.cpu_seconds,
        f"{way}_step_gib": measured.added_gib,
        f"{way}_peak_rss_gib": measured.peak_rss_gib,
    }


def _summary(row: Mapping[str, Any]) -> str:
    if "refused" in row:
        return str(row["refused"])
    ratio = f", baseline {row['naive_s']:.3f} s ({row['speedup']:.1f}x)" if "speedup" in row else ""
    return f"{row['fast_s']:.3f} s{ratio}"


@contextmanager
def _watched(case: _Case) -> Iterator[dict[str, float]]:
    """Add up the forward seconds of both towers and note how many sets of prompts a text pass has."""
    seconds = {"text": 0.0, "image": 0.0}
    backbone = case.learner.backbone

    def timed(kind: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **keywords: Any) -> Tensor:
            started = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds[kind] += time.perf_counter() - started
            if kind == "text":
                case.sets = max(case.sets, len(result) if result.dim() == 3 else 1)
            return result

        return run

    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (backbone.text, "encode", timed("text", backbone.text.encode)),
        (backbone, "image_embeddings", timed("image", backbone.image_embeddings)),
    ]
    with replaced(replacements):
        yield seconds


def _variants(only: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in LEARNERS.names(only):
        family = options_model(LEARNERS.get(name).target).model_fields.get("family")
        values = get_args(family.annotation) if family is not None else ()
        yield from ((name, {"family": value}) for value in values) if values else [(name, {})]


def _row_name(name: str, options: Mapping[str, Any]) -> str:
    return f"{name} ({', '.join(map(str, options.values()))})" if options else name


def _limit(seconds: float, text: float, image: float) -> str:
    if text + image < 0.1 * seconds:  # a backward pass takes about twice its forward pass
        return "neither tower: the loss, the optimiser and the trainer"
    return "text tower" if text > image else "image tower"
