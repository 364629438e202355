"""A step of mask tuning beside full fine-tuning of the image tower and a direct port of the published step.

All three learn from the same pixels with the same class weights. The port does what the published code does: masks
and products of all layers at once, kept for the backward pass; a teacher that is run with a graph and gradients for
all its weights; two whole gradient sets that are cloned. Its gate is ours, so both make the same update.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import BENCHMARKS
from benchmarks._step import learned, relative, take_step
from benchmarks.measure import Measured, Work, in_turns, measure
from benchmarks.text import imagenet_names
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.precision import Precision
from vlprompt.core.seeding import derive_seed, torch_rng
from vlprompt.core.trainable import Trainable
from vlprompt.learners import create_learner
from vlprompt.learners._masks import gradient_dropout
from vlprompt.saved.weight_masks import Masks, TaskMasks

__all__ = ["bench_masks"]

log = logging.getLogger("benchmarks")


@BENCHMARKS.register("masks", summary="a step of mask tuning, against full fine-tuning and a direct port")
def bench_masks(
    *,
    backbone: str = "ViT-B-16",
    learner: str = "ramt",
    classes: int = 100,
    batch: int = 32,
    masked: float = 0.0256,
    precision: Precision = "fp32",
    repeats: int = 1,
    port: bool = True,
) -> dict[str, Any]:
    """Measure one step of each with random weights; ``cpu_s`` is what ratios are made of, on a CPU.

    ``added_gib`` is what a step adds to the memory held before it: activations and gradients (plain gradient descent,
    so no optimiser's state). ``switch_tasks`` is the change from one task's masks to another's on one backbone.

    Args:
        backbone: Any open_clip architecture, or tiny.
        learner: amt, mmt, pmt, or their regularised forms.
        classes: C.
        batch: Images per step.
        masked: Share of weights that are switched off (the paper's mean is 2.56 %).
        precision: If it is half precision, ours is measured in it too, in turns with the others in float32.
        repeats: Counted rounds; one more warms up, if there are several.
        port: False leaves the port out, which needs most memory.
    """
    tower = create_backbone(backbone)
    names = imagenet_names(classes)
    generator = torch_rng(0, "bench masks")
    images = torch.randn(batch, 3, *tower.image_size, generator=generator)
    data = {"image": images, "label": torch.randint(classes, (batch,), generator=generator)}
    ours = _scattered(create_learner(learner, tower, names), masked, generator)
    start = learned(ours)
    weights = tower.class_weights(ours.classnames, ours.templates)
    tuned = _FullFineTuning(tower, weights)
    ways: dict[str, Work] = {
        "teacher_forward": lambda: tower.image_embeddings(images),
        "full_fine_tuning": lambda: take_step(tuned, data, lr=1e-6),
        "ours": lambda: _ours(ours, start, data),
    }
    if precision != "fp32":
        narrow = create_learner(learner, create_backbone(backbone, precision=precision), names)
        narrow = _scattered(narrow, masked, torch_rng(2, "bench masks"))
        narrow_start = learned(narrow)
        ways[precision] = lambda: _ours(narrow, narrow_start, data)
    ported = _Port(tower, ours, weights, start) if port else None
    if ported is not None:
        ways["port"] = lambda: ported.step(data)

    turns = in_turns(ways, repeats, warmup=int(repeats > 1))
    measured = {name: _told(turns[name], name) for name in ways}
    result: dict[str, Any] = {"backbone": backbone, "learner": learner, "classes": classes, "batch": batch}
    result |= {"masked": masked, "parameters": sum(t.numel() for t in start.values())}

    if ported is not None:
        update = {n: p - start[n] for n, p in learned(ours).items()}
        result["update_rel_diff"] = relative(update, ported.updates())

    measured["switch_tasks"] = _switching(tower, ours, masked, repeats)
    rows = {name: vars(value) for name, value in measured.items()}
    return {**result, "threads": torch.get_num_threads(), **rows, "ratios": _ratios(measured)}


def _switching(backbone: Backbone, learner: Any, share: float, repeats: int) -> Measured:
    """Measure the change from one task's masks to another's on one backbone."""
    generator = torch_rng(1, "bench masks")
    shapes = {name: backbone.vision.visual.get_parameter(name).shape for name in learner.kinds}
    tasks = {
        task: Masks({n: torch.rand(shape, generator=generator) > share for n, shape in shapes.items()})
        for task in ("a", "b")
    }
    switched = TaskMasks(backbone, tasks)
    switched.use("a")

    switch = measure(lambda: switched.use("b" if switched.task == "a" else "a"), repeats + 4)
    return _told(switch, "switch of tasks")


def _ratios(measured: Mapping[str, Measured]) -> dict[str, float | None]:
    ours = measured["ours"]
    tuning = measured["full_fine_tuning"]
    both = tuning.cpu_seconds + measured["teacher_forward"].cpu_seconds
    ratios: dict[str, float | None] = {"time_over_fine_tuning_and_teacher": ours.cpu_seconds / both}

    if ours.added_gib is not None and tuning.added_gib:
        ratios["memory_over_fine_tuning"] = ours.added_gib / tuning.added_gib
    if "port" in measured:
        ratios["speedup_over_port"] = measured["port"].cpu_seconds / ours.cpu_seconds
    for precision in {"bf16", "fp16"} & set(measured):
        ratios[f"{precision}_over_fp32"] = ours.cpu_seconds / measured[precision].cpu_seconds
        if "port" in measured:
            ratios[f"{precision}_speedup_over_port"] = (
                measured["port"].cpu_seconds / measured[precision].cpu_seconds
            )
    return ratios


def _told(measured: Measured, name: str) -> Measured:
    log.info("%s: %.2f s (%.2f s of processors)", name, measured.seconds, measured.cpu_seconds)
    return measured


def _scattered(learner: Any, share: float, generator: torch.Generator) -> Any:
    """Switch a share of the weights off, as a trained learner has it."""
    with torch.no_grad():
        for score in learner.scores.values():
            score[torch.rand(score.shape, generator=generator) < share] = 0.0
    return learner


def _ours(learner: Any, start: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> None:
    """Take the first step, however often."""
    learner.statistics.zero_()
    take_step(learner, data, start)


class _FullFineTuning(nn.Module, Trainable):
    """Every weight of a copy of the image tower learns."""

    def __init__(self, backbone: Backbone, weights: Tensor) -> None:
        super().__init__()
        self.visual: Any = copy.deepcopy(backbone.vision.visual).requires_grad_()
        self.scale = backbone.logit_scale
        self.weights = weights

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = self.scale * F.normalize(self.visual(batch["image"]), dim=-1) @ self.weights.T
        return {"cross_entropy": F.cross_entropy(logits, batch["label"])}

    def train(self, mode: bool = True) -> _FullFineTuning:
        return super().train(False)

    def trainable_state(self) -> dict[str, Tensor]:
        return dict(self.visual.named_parameters())

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        self.visual.load_state_dict(state, strict=False)


class _Binarise(torch.autograd.Function):
    """The published step function: a whole mask of floats, made by two indexed writes."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, threshold: float) -> Tensor:
        mask = score.clone()
        mask[score <= threshold] = 0
        mask[score > threshold] = 1
        return mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Port:
    """The published step, see the module's text."""

    def __init__(
        self, backbone: Backbone, learner: Any, weights: Tensor, start: Mapping[str, Tensor]
    ) -> None:
        self.scale = backbone.logit_scale
        self.text = weights
        self.learner = learner
        self.student = backbone.vision.visual
        self.teacher = copy.deepcopy(self.student).requires_grad_()
        self.start = {n: start[f"scores.{n.replace('.', '/')}"] for n in learner.kinds}
        self.scores = {n: t.clone().requires_grad_() for n, t in self.start.items()}

    def step(self, data: Mapping[str, Tensor]) -> None:
        """Take the first step of plain gradient descent at rate 1, however often."""
        with torch.no_grad():
            for name, score in self.scores.items():
                score.copy_(self.start[name])
                score.grad = None

        masked = {
            n: _Binarise.apply(s, self.learner.threshold) * self.student.get_parameter(n)
            for n, s in self.scores.items()
        }
        student = self._logits(torch.func.functional_call(self.student, masked, (data["image"],)))
        task = F.cross_entropy(student, data["label"])
        task = task + self.learner.norm_weight * torch.stack([s.norm() for s in self.scores.values()]).sum()
        teacher = self._logits(self.teacher(data["image"])).log_softmax(-1)
        general = F.kl_div(student.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
        general.backward(retain_graph=True)
        own_gradients = [s.grad.clone() for s in self._learned()]

        for score in self.scores.values():
            score.grad = None

        task.backward()
        generator = torch.Generator()
        generator.manual_seed(derive_seed(self.learner.seed, "gradient dropout", 0))

        with torch.no_grad():
            for score, other in zip(self._learned(), own_gradients, strict=True):
                score -= gradient_dropout(score.grad.clone(), other, self.learner.gdr_lambda, generator)

    def updates(self) -> dict[str, Tensor]:
        """Return what the last step changed, by the learner's names."""
        return {f"scores.{n.replace('.', '/')}": s.detach() - self.start[n] for n, s in self.scores.items()}

    def _learned(self) -> Iterator[Any]:
        return iter(self.scores.values())

    def _logits(self, embeddings: Tensor) -> Tensor:
        return self.scale * F.normalize(embeddings, dim=-1) @ self.text.T
