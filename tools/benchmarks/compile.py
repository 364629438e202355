"""A training step with ``train.compile`` against one without, with the seconds that the compiler takes first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import BENCHMARKS
from benchmarks.measure import in_turns
from benchmarks.text import imagenet_names
from vlprompt.backbones import create_backbone
from vlprompt.core.precision import Precision
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import create_learner
from vlprompt.training.compiled import CompiledLoss

__all__ = ["bench_compile"]


@BENCHMARKS.register("compile", summary="a training step with train.compile against one without")
def bench_compile(
    *,
    backbone: str = "ViT-B-16",
    learner: str = "maple",
    classes: int = 100,
    batch: int = 8,
    precision: Precision = "fp32",
    device: str = "cpu",
    repeats: int = 3,
) -> dict[str, Any]:
    """Compare losses with their backward pass on random weights and noise.

    ``warmup_s`` are the seconds of the compiled way's first two steps, of which the second compiles; ``pays_after`` is
    the number of steps after which they are made up for, null if they never are.

    Args:
        backbone: Any open_clip architecture, or tiny.
        learner: One that steps.
        classes: C.
        batch: Images per step.
        precision: Of the towers.
        device: Where both run.
        repeats: Counted pairs of steps.
    """
    tower = create_backbone(backbone, precision=precision, device=device)
    module = create_learner(learner, tower, imagenet_names(classes)).to(device).train()
    generator = torch_rng(0, "bench compile")
    images = torch.randn(batch, 3, *tower.image_size, generator=generator).to(device)
    labels = torch.randint(classes, (batch,), generator=generator).to(device)
    inputs = {"embedding": module.embed_images(images)} if module.static_images else {"image": images}
    compiled = CompiledLoss(module)
    losses: dict[str, float] = {}

    def step(way: str, loss: Callable[..., dict[str, torch.Tensor]]) -> None:
        total = torch.stack(list(loss({**inputs, "label": labels}).values())).sum()
        total.backward()
        losses[way] = float(total.detach())  # waits for the device
        module.zero_grad()

    started = time.perf_counter()
    step("compiled", compiled)
    step("compiled", compiled)
    warmup = time.perf_counter() - started

    ways = {"plain": lambda: step("plain", module.loss), "compiled": lambda: step("compiled", compiled)}
    turns = in_turns(ways, repeats)
    plain, fast = turns["plain"].seconds, turns["compiled"].seconds
    return {
        "backbone": backbone,
        "learner": learner,
        "classes": classes,
        "batch": batch,
        "precision": precision,
        "device": device,
        "threads": torch.get_num_threads(),
        "has_compiler": compiled.compiled is not None,
        "warmup_s": warmup,
        "plain_s": plain,
        "compiled_s": fast,
        "speedup": turns.ratio("plain", "compiled"),
        "pays_after": math.ceil((warmup - 2 * plain) / (plain - fast)) if fast < plain else None,
        "loss_difference": abs(losses["plain"] - losses["compiled"]),
        "quiet": turns.quiet,
    }
