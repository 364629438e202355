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

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks._naive import naive_towers, replaced
from benchmarks._step import learned, relative, take_step
from benchmarks.measure import measure
from benchmarks.precision import compare_pairs
from benchmarks.text import imagenet_names
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import VLPromptError
from vlprompt.core.options import options_model
from vlprompt.core.precision import Precision
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import LEARNERS, Learner, create_learner

__all__ = ["bench_learners"]

log = logging.getLogger("benchmarks")
_SHOTS = 16  # training samples per class of a learner that starts from them
_NAIVE_BYTES = 4 << 30  # activations of naive text; what needs more is run in micro-batches of images
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
) -> dict[str, Any]:
    """Compare steps of all learners that step, with default options, random weights and ImageNet's class names.

    A learner with an option ``family`` gets one row per value. ``update_rel_diff`` is the relative difference
    between the two steps' changes of the parameters (null for methods that draw noise); ``step_gib`` is what a
    step adds to the memory held before it; ``limited_by`` names what most of our forward time goes to.

    Args:
        backbone: Any open_clip architecture, or tiny.
        classes: C.
        batch: Images per step.
        only: Shell pattern of the learners to measure.
        precision: Of ours; in half precision ours is measured in float32 too, in turns. The naive step is float32.
        repeats: Counted runs of ours; the naive step, which takes seconds, is run once.
        naive: False measures ours alone.
        image_graph: Whether the naive step keeps a graph through the image tower where nothing in it learns.
    """
    tower = create_backbone(backbone)
    half = None if precision == "fp32" else copy.deepcopy(tower).set_precision(precision)
    rows = {}
    cases = {}

    for name, options in _variants(only):
        try:
            case = _Case.build(tower, name, options, imagenet_names(classes), batch)
        except VLPromptError as error:  # a method that can't work on this backbone says why
            rows[_row_name(name, options)] = {"refused": str(error)}
            continue
        if case is not None:
            cases[_row_name(name, options)] = case

    for name, case in cases.items():
        rows[name] = _measure_ours(case, repeats)
        if half is not None:
            rows[name][precision] = _measure_half(case, half, repeats)
        log.info("%s: %.3f s", name, rows[name]["fast_s"])

    for name, case in cases.items() if naive else ():
        rows[name] |= _measure_naive(case, image_graph)
        if half is not None:
            rows[name][precision]["speedup"] = rows[name]["naive_s"] / rows[name][precision]["seconds"]
        log.info("%s, baseline: %.3f s (%.1fx)", name, rows[name]["naive_s"], rows[name]["speedup"])

    settings = {"backbone": backbone, "classes": classes, "batch": batch, "image_graph": image_graph}
    return {**settings, "threads": torch.get_num_threads(), "learners": dict(sorted(rows.items()))}


@dataclass
class _Case:
    """A learner, a batch for it, and what its steps were seen to do."""

    learner: Learner
    batch: dict[str, Tensor]
    pixels: dict[str, Tensor]
    start: dict[str, Tensor]
    accelerator: Accelerator = field(default_factory=Accelerator)
    groups: int = 0  # sets of prompts per text pass, 0 if no sentence is encoded in a step
    fast_s: float = float("nan")
    updates: list[dict[str, Tensor]] = field(default_factory=list)

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

    def step(self, batch: Mapping[str, Tensor], seed: int = 1, parts: int = 1) -> None:
        """Take one step of the trainer from the start, and keep by how much it changed the parameters."""
        take_step(self.learner, batch, self.start, seed=seed, parts=parts, accelerator=self.accelerator)
        self.updates.append({n: p - self.start[n] for n, p in learned(self.learner).items()})


def _measure_ours(case: _Case, repeats: int) -> dict[str, Any]:
    case.step(case.batch, seed=2)  # warms up, and shows whether another seed gives another step
    with _watched(case) as seconds:
        fast = measure(lambda: case.step(case.batch), repeats, warmup=0)

    case.fast_s = fast.seconds
    text, image = (seconds[k] / repeats for k in ("text", "image"))
    return {
        "parameters": sum(p.numel() for p in case.learner.parameters() if p.requires_grad),
        "fast_s": fast.seconds,
        "fast_step_gib": fast.added_gib,
        "fast_peak_rss_gib": fast.peak_rss_gib,
        "text_forward_s": text,
        "image_forward_s": image,
        "limited_by": _limit(fast.seconds, text, image),
    }


def _measure_half(case: _Case, backbone: Backbone, repeats: int) -> dict[str, Any]:
    """Measure the same step on a backbone in half precision, in turns with the one in float32."""
    learner = case.learner
    other = _Case.build(
        backbone, learner.method, learner.options, list(learner.classnames), len(case.batch["label"])
    )
    assert other is not None
    before = len(case.updates)
    ratios = compare_pairs(
        lambda: case.step(case.batch), lambda: other.step(other.batch), repeats, backbone.precision
    )

    exact = torch.cat([t.flatten() for t in case.updates[-1].values()])
    rough = torch.cat([t.flatten() for t in other.updates[-1].values()])
    del case.updates[before:]
    return {**ratios, "update_cosine": float(torch.cosine_similarity(exact, rough, dim=0))}


def _measure_naive(case: _Case, image_graph: bool) -> dict[str, Any]:
    tower = case.learner.backbone.text
    sentences = case.groups * len(case.learner.classnames)
    size = 4 * 17 * tower.layers * tower.width * tower.context_length * sentences  # as in the packed tower
    parts = min(len(case.batch["label"]), -(-size // _NAIVE_BYTES)) if case.groups > 1 else 1

    with naive_towers(case.learner, image_graph, constant_text=case.groups == 0):
        slow = measure(lambda: case.step(case.pixels, parts=parts), repeats=1, warmup=0)

    other_seed = case.updates[0]
    fast = case.updates[-2]
    naive = case.updates[-1]
    draws = relative(other_seed, fast) > _NOISE
    return {
        "naive_s": slow.seconds,
        "naive_step_gib": slow.added_gib,
        "naive_peak_rss_gib": slow.peak_rss_gib,
        "naive_micro_batches": parts,
        "speedup": slow.seconds / case.fast_s,
        "update_rel_diff": None if draws else relative(fast, naive),
    }


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
                case.groups = max(case.groups, len(result) if result.dim() == 3 else 1)
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
