"""Ways to prompt a tower at equal length, timed in turns: tokens, keys and values, a term behind attention; offsets."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks._step import learned, take_step
from benchmarks.measure import Turns, Work, in_turns
from benchmarks.text import imagenet_names
from vlprompt.backbones import create_backbone
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import Learner, create_learner

__all__ = ["bench_prompts"]

log = logging.getLogger("benchmarks")


@BENCHMARKS.register("prompts", summary="steps of vpt, kv_prompts and apt at equal length; of coop and dept")
def bench_prompts(
    *,
    backbone: str = "ViT-B-16",
    length: Annotated[int, Field(ge=1)] = 50,
    batch: Annotated[int, Field(ge=1)] = 4,
    classes: Annotated[int, Field(ge=2)] = 100,
    repeats: int = 3,
    texts: bool = True,
) -> dict[str, Any]:
    """Time a training step and a prediction of each learner, random weights and images.

    ``added`` is what a prediction takes beyond the frozen tower's, as a share of it. Ratios are medians over rounds in
    which every learner has its turn.

    Args:
        backbone: Any open_clip architecture, or tiny.
        length: M, prompts per block of the image tower.
        batch: Images.
        classes: C.
        repeats: Counted rounds.
        texts: Whether to time steps of coop, with 16 and 4 vectors, and dept, too.
    """
    tower = create_backbone(backbone)
    names = imagenet_names(classes)
    generator = torch_rng(0, "bench prompts")
    images = torch.randn(batch, 3, *tower.image_size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)

    prompts = {
        "vpt": create_learner("vpt", tower, names, visual_length=length),
        "kv_prompts": create_learner("kv_prompts", tower, names, tokens=length),
        "apt": create_learner("apt", tower, names, tokens=length),
    }
    pixels = {"image": images, "label": labels}
    steps = in_turns({name: _step(learner, pixels) for name, learner in prompts.items()}, repeats)

    frozen: dict[str, Work] = {"frozen": lambda: _predict(tower.image_embeddings, images)}
    predictions = in_turns(
        frozen | {name: _prediction(learner.eval(), images) for name, learner in prompts.items()}, repeats
    )
    rows: dict[str, Any] = {}
    for name, learner in prompts.items():
        rows[name] = {
            **_row(learner, steps, name, "vpt"),
            "prediction_cpu_s": predictions[name].cpu_seconds,
            "added": predictions.cpu_ratio(name, "frozen") - 1,
        }

    if texts:
        words = {
            "coop": create_learner("coop", tower, names),
            "coop (4 vectors)": create_learner("coop", tower, names, context_length=4),
            "dept": create_learner("dept", tower, names),
            "dept (by token)": create_learner("dept", tower, names, offset_mode="token"),
        }
        cached = {"embedding": torch.randn(batch, tower.dim, generator=generator), "label": labels}
        steps = in_turns({name: _step(learner, cached) for name, learner in words.items()}, repeats)
        rows |= {name: _row(learner, steps, name, "coop") for name, learner in words.items()}

    for name, row in rows.items():
        log.info(
            "%s: a step %.3f s of a processor, %.2f of %s's",
            name,
            row["step_cpu_s"],
            row["ratio"],
            row["over"],
        )
    facts = {"backbone": backbone, "length": length, "batch": batch, "classes": classes}
    return {**facts, "threads": torch.get_num_threads(), "quiet": steps.quiet, "learners": rows}


def _step(learner: Learner, batch: Mapping[str, Tensor]) -> Work:
    start = learned(learner)
    return lambda: take_step(learner, batch, start, lr=1e-3)


def _prediction(learner: Learner, images: Tensor) -> Work:
    return lambda: _predict(learner.embed_images, images)


@torch.no_grad()
def _predict(embed: Any, images: Tensor) -> None:
    embed(images)


def _row(learner: Learner, steps: Turns, name: str, over: str) -> dict[str, Any]:
    """Return a learner's size, what a step of it takes, and the ratio to another's."""
    return {
        "parameters": sum(p.numel() for p in learner.learned_parameters().values()),
        "step_s": steps[name].seconds,
        "step_cpu_s": steps[name].cpu_seconds,
        "step_gib": steps[name].added_gib,
        "over": over,
        "ratio": steps.cpu_ratio(name, over),
    }
