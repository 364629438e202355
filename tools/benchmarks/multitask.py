"""A step of MVLPT's source stage over many tasks, against encoding every task's class names at every step.

Ours is what ``fit_multitask`` does: batches mixed by its sampler, of which only the tasks that occur are encoded.
Obvious is what the authors' code does: all names of all tasks, padded, at every step, with a graph through both towers;
foreign logits are masked (exactly, where their code multiplies by zero), so that both take the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks._naive import naive_towers
from benchmarks._step import learned, relative, take_step
from benchmarks.measure import Aside, Work, in_turns
from benchmarks.text import imagenet_names
from vlprompt.backbones import create_backbone
from vlprompt.classification.multitask import MultiTask
from vlprompt.classification.task_batches import MultiTaskBatches
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import create_learner
from vlprompt.learners._context import Position
from vlprompt.learners.base import DEFAULT_TEMPLATES

__all__ = ["bench_multitask"]

log = logging.getLogger("benchmarks")

# Classes of each data set: the CoOp suite (the paper's first source set) and ELEVATER (its second), as on their cards.
_SUITES: dict[str, tuple[int, ...]] = {
    "coop": (1000, 100, 101, 196, 37, 102, 100, 397, 47, 10, 101),
    "elevater": (102, 10, 100, 211, 47, 10, 7, 100, 101, 43, 2, 4, 10, 102, 37, 2, 2, 45, 196, 20),
    "one": (1,),
}
_SHOTS = 16


@BENCHMARKS.register(
    "multitask", summary="a step of MVLPT over many tasks, ours against all names every step"
)
def bench_multitask(
    *,
    backbone: str = "ViT-B-16",
    suite: Literal["coop", "elevater", "one"] = "elevater",
    family: Literal["coop", "vpt", "upt"] = "coop",
    position: Position = "middle",
    classes: int = 100,
    batch: int = 8,
    draws: int = 8,
    repeats: int = 1,
    naive: bool = True,
) -> dict[str, Any]:
    """Compare steps of MVLPT with random weights; ours is a mean over several batches, which hold different tasks.

    ``classes_encoded`` is the mean over those batches, ``classes_expected`` over all that could be drawn.

    Args:
        backbone: Any open_clip architecture, or tiny.
        suite: Whose tasks: ``classes`` are divided as the suite's are; ``one`` is a single task of all classes.
        family: MVLPT's.
        position: Where the class name stands; MVLPT's is middle.
        classes: Of all tasks together.
        batch: Images per step.
        draws: Batches that ours is a mean over, of an epoch with equal shots per class.
        repeats: Counted pairs of all draws of ours and one naive step.
        naive: False measures ours alone.

    Raises:
        DataError: If the classes are too few for a task of two.
    """
    tower = create_backbone(backbone)
    names = imagenet_names(classes)
    tasks = _tasks(names, _SUITES[suite])
    learner = create_learner("mvlpt", tower, names, family=family, position=position)
    module = MultiTask(learner, tasks)
    start = learned(learner)
    generator = torch_rng(0, "bench multitask")
    images = torch.randn(batch, 3, *tower.image_size, generator=generator)
    inputs = {"embedding": tower.image_embeddings(images)} if learner.static_images else {"image": images}
    sizes = [len(train) for train, _ in tasks.values()]
    batches_drawn = _drawn(sizes, batch, draws)

    encoded = [sum(sizes[t] for t in part["task"].unique().tolist()) for part in batches_drawn]

    def all_draws() -> None:
        for part in batches_drawn:
            take_step(module, {**inputs, **part}, start)

    obvious = _Obvious(learner, tasks, "joint_dedup")

    def every_name() -> Aside:
        with naive_towers(learner, constant_text=family == "vpt") as aside:
            take_step(obvious, {"image": images, **batches_drawn[0]}, start)
        return aside

    all_draws()
    ways: dict[str, Work] = {"fast": all_draws, **({"naive": every_name} if naive else {})}
    turns = in_turns(ways, repeats, warmup=0)
    fast = turns["fast"]
    seconds = fast.seconds / len(batches_drawn)
    cpu = fast.cpu_seconds / len(batches_drawn)
    log.info("ours: %.3f s a step, %.1f of %d classes encoded", seconds, np.mean(encoded), classes)
    result: dict[str, Any] = {"backbone": backbone, "suite": suite, "family": family, "position": position}
    result |= {"tasks": len(tasks), "classes": classes, "classes_encoded": float(np.mean(encoded))}
    result |= {"classes_expected": sum(c * (1 - (1 - c / classes) ** batch) for c in sizes)}
    result |= {"batch": batch, "draws": draws, "threads": torch.get_num_threads()}
    result |= {"fast_s": seconds, "fast_cpu_s": cpu, "fast_peak_rss_gib": fast.peak_rss_gib}

    if not naive:
        return result

    slow = turns["naive"]
    take_step(module, {**inputs, **batches_drawn[0]}, start)
    ours = {n: p - start[n] for n, p in learned(learner).items()}
    every_name()
    theirs = {n: p - start[n] for n, p in learned(learner).items()}
    return result | {
        "naive_s": slow.seconds,
        "naive_cpu_s": slow.cpu_seconds,
        "naive_peak_rss_gib": slow.peak_rss_gib,
        "speedup": turns.ratio("naive", "fast") * len(batches_drawn),
        "cpu_speedup": turns.cpu_ratio("naive", "fast") * len(batches_drawn),
        "quiet": turns.quiet,
        "update_rel_diff": relative(ours, theirs),
    }


class _Obvious(MultiTask):
    """All names at every step; a sample's own task is cut out of all logits afterwards."""

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See :meth:`MultiTask.loss`."""
        joint = self.joint
        assert joint is not None
        logits = joint.logits(joint.embed_images(batch["image"]))  # (B, C)
        ends = torch.tensor(np.cumsum([len(positions) for positions in self._positions]))
        owner = torch.bucketize(torch.arange(int(ends[-1])), ends, right=True)
        foreign = owner[None] != batch["task"][:, None].cpu()
        starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
        labels = starts[batch["task"].cpu()] + batch["label"].cpu()
        logits = logits.masked_fill(foreign.to(logits.device), float("-inf"))

        return {"cross_entropy": F.cross_entropy(logits, labels.to(logits.device))}


def _tasks(names: Sequence[str], suite: Sequence[int]) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """Divide names among tasks as a suite's classes are; tasks of fewer than two would have nothing to learn."""
    shares = np.sort(np.asarray(suite))[::-1]
    shares = shares[np.round(len(names) * shares / shares.sum()) >= 2]
    if not len(shares):
        raise DataError(f"{len(names)} classes are too few for {len(suite)} tasks: no task would have two.")

    exact = len(names) * shares / shares.sum()
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: len(names) - sizes.sum()]] += 1  # largest remainders
    ends = np.cumsum(sizes)
    parts = [names[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    return {f"task {i}": (part, DEFAULT_TEMPLATES) for i, part in enumerate(parts)}


def _drawn(sizes: Sequence[int], batch: int, draws: int) -> list[dict[str, Tensor]]:
    """Return labels and tasks of the first batches that the source stage's sampler gives, proportional to samples."""
    labels = [torch.arange(size).repeat(_SHOTS) for size in sizes]
    sources = [_Labels(row) for row in labels]
    batches = MultiTaskBatches(sources, [len(row) for row in labels], 1.0, batch, seed=1)
    epochs = -(-draws // len(batches.plan(0)))
    parts = [(part, epoch) for epoch in range(epochs) for part in batches.plan(epoch)][:draws]
    fetched = [batches.fetch(part, epoch) for part, epoch in parts]

    return [{"label": part["label"], "task": part["task"]} for part in fetched]


class _Labels:
    """Batches that hold labels alone."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def plan(self, epoch: int) -> list[np.ndarray]:
        return [np.arange(len(self.labels))]

    def fetch(self, indices: np.ndarray, epoch: int) -> dict[str, Any]:
        return {"label": self.labels[torch.as_tensor(indices)]}
