"""What methods share that tune normalisation layers of the image tower, batch after batch.

The learner is not touched: scales and shifts of the layers are tensors of the adapter that stand in the tower while it
runs, and the optimiser moves these. They are float32 whatever the tower computes in. An answer comes from one image
at a time, as everywhere, so where nothing moves it is zero-shot to the bit.

Source: Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021, arXiv 2006.10726, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlprompt.adaptation._features import FeatureAdapter
from vlprompt.adaptation.base import Adapted, EncodedViews, ResetScope
from vlprompt.adaptation.views import ViewPlan
from vlprompt.core.errors import BackboneError, CheckpointError, NonFiniteError
from vlprompt.learners import Learner
from vlprompt.meta.functional import Functional

__all__ = ["Batch", "NormAdapter", "NormRule", "Optimizer", "Steps", "norm_parameters"]

Batch = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Optimizer = Literal["adam", "adamw", "sgd"]

_TOWER = "backbone.model.visual."  # before the names of a learner's tensors
_NORM, _MOMENT = "norm/", "moment/"  # before the names of a state's tensors
_EPSILON = 1e-6  # of Adam, as published
_MOMENTS: dict[Optimizer, tuple[str, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "sgd": ("momentum_buffer",),
}


@dataclass(frozen=True)
class NormRule:
    """How scales and shifts move.

    Attributes:
        steps: Updates per batch.
        lr: Learning rate.
        optimizer: Its moments last as long as what it has learned.
        momentum: Of SGD.
        weight_decay: Of all optimisers.
    """

    steps: int
    lr: float
    optimizer: Optimizer
    momentum: float = 0.9
    weight_decay: float = 0.0

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return an optimiser without moments."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, eps=_EPSILON, weight_decay=self.weight_decay)

    @property
    def moments(self) -> tuple[str, ...]:
        """What the optimiser keeps of every tensor, after its first step."""
        return () if self.optimizer == "sgd" and not self.momentum else _MOMENTS[self.optimizer]


class NormAdapter(FeatureAdapter):
    """Base of methods that tune normalisation layers of the image tower on batches; a method defines :meth:`loss`.

    Every method sees the images themselves, one view each.

    Args:
        learner: See :class:`FeatureAdapter`; its prompts, if it has some, stay as they are.
        rule: How scales and shifts move.
        batch: Images that are learned from and named together.
        reset_scope: After what everything that was learned is forgotten: each ``batch``, a ``corruption`` or a
            ``dataset`` (where a stream goes over to the next one), or ``never``, only when a stream begins.
        updates_first: Whether a batch is named after it was learned from, or with what the batches before it taught.
        batch_statistics: Whether batch normalisation takes the statistics of each batch in place of those that the
            tower has stored; then no image is independent of its batch.

    Attributes:
        norms: Scales and shifts by name, relative to the image tower; float32.
        memory: What a method keeps beside them.

    Raises:
        BackboneError: If the tower has no such layers, or no batch normalisation whose statistics could be the batch's.
    """

    granularity = "batch"
    needs_pixels = True

    def __init__(
        self,
        learner: Learner,
        rule: NormRule,
        *,
        batch: int,
        reset_scope: ResetScope,
        updates_first: bool,
        batch_statistics: bool,
    ) -> None:
        super().__init__(learner, ViewPlan(1), 1.0)
        self.rule = rule
        self.batch = batch
        self.reset_scope = reset_scope
        self.updates_first = updates_first
        self.optimizer = rule.optimizer

        visual = self.backbone.vision.visual
        self._start = {name: tensor.detach() for name, tensor in norm_parameters(visual).items()}
        if not self._start:
            raise BackboneError(
                f"the image tower of {self.backbone.name} has no normalisation layers with a scale and a shift that "
                "could be tuned. Use an adapter that works on features (vlprompt list adapters)."
            )

        self._by_batch: list[_BatchNorm] = []
        if batch_statistics:
            self._by_batch = [module for module in visual.modules() if isinstance(module, _BatchNorm)]
            if not self._by_batch:
                raise BackboneError(
                    f"batch_statistics=true is for batch normalisation, of which the image tower of "
                    f"{self.backbone.name} has none. Leave it out."
                )

        self._functional = Functional(learner)
        self.reset()

    def loss(self, images: Tensor, step: int) -> Tensor:
        """Return what a step on (B, 3, H, W) images minimises.

        Args:
            images: A batch.
            step: Number of the step on this batch, from 0.
        """
        raise NotImplementedError

    def empty_memory(self) -> dict[str, Tensor]:
        """Return what a method keeps beside scales and shifts, before the first image; nothing by default.

        A tensor may get more rows than it has here, of the same shape and type.
        """
        return {}

    def logits(self, images: Tensor) -> Tensor:
        """Return (B, C) logits of (B, 3, H, W) images with the present scales and shifts, with a graph to them."""
        features = F.normalize(self._embed(images), dim=-1)
        return self.scale * features @ self.weights.T

    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`; the images are one batch."""
        images = torch.cat([pixels[:1] for pixels in views.pixels])
        before = None if self.updates_first else self._answer(images)
        for step in range(self.rule.steps):
            self._move(images, step)

        logits = self._answer(images) if before is None else before
        kept = torch.zeros(views.embeddings.shape[:2], dtype=torch.bool, device=logits.device)
        kept[:, 0] = True
        return Adapted(logits.softmax(-1), kept, logits / self.scale)

    def reset(self) -> None:
        """See :meth:`Adapter.reset`."""
        self.norms = {name: tensor.float().clone().requires_grad_() for name, tensor in self._start.items()}
        self._moves = self.rule.build(list(self.norms.values()))
        self.memory = self.empty_memory()

    def learned(self) -> dict[str, Tensor]:
        """See :meth:`Adapter.learned`: scales, shifts, the optimiser's moments and the method's memory."""
        state = {f"{_NORM}{name}": tensor.detach().clone() for name, tensor in self.norms.items()}
        for name, tensor in self.norms.items():
            moments = self._moves.state.get(tensor, {})
            state |= {f"{_MOMENT}{key}/{name}": moments[key].clone() for key in self.rule.moments if moments}
        return state | {name: tensor.clone() for name, tensor in self.memory.items()}

    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """See :meth:`Adapter.restore`."""
        names = [name for name in learned if name.startswith(_MOMENT)]
        expected = self._expected_shapes(bool(names))
        wrong = [
            name
            for name in {*expected, *learned}
            if name not in learned or name not in expected or not _fits(learned[name], expected[name])
        ]
        if wrong:
            raise CheckpointError(f"this state does not fit {self.method}: {', '.join(sorted(wrong))}.")

        self.reset()
        for name, tensor in self.norms.items():
            tensor.data.copy_(learned[f"{_NORM}{name}"])
            if names:
                moments = {key: learned[f"{_MOMENT}{key}/{name}"].clone() for key in self.rule.moments}
                # Where the optimiser counts its steps, it wants the count on the CPU.
                self._moves.state[tensor] = {
                    key: moment if key == "step" else moment.to(tensor.device)
                    for key, moment in moments.items()
                }
        self.memory = {name: learned[name].clone() for name in self.memory}

    def _expected_shapes(self, with_moments: bool) -> dict[str, tuple[int | None, ...]]:
        """Return the shape of every tensor of a state; None stands for any number of rows."""
        shapes: dict[str, tuple[int | None, ...]] = {}
        for name, tensor in self._start.items():
            shapes[f"{_NORM}{name}"] = tuple(tensor.shape)
            for key in self.rule.moments if with_moments else ():
                shapes[f"{_MOMENT}{key}/{name}"] = () if key == "step" else tuple(tensor.shape)
        for name, tensor in self.empty_memory().items():
            shapes[name] = (None, *tensor.shape[1:]) if tensor.dim() else ()
        return shapes

    def _move(self, images: Tensor, step: int) -> None:
        """Take one step on a batch."""
        leaves = list(self.norms.values())
        with torch.enable_grad():
            loss = self.loss(images, step)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)

        for (name, leaf), gradient in zip(self.norms.items(), gradients, strict=True):
            if gradient is not None and not bool(gradient.isfinite().all()):
                raise NonFiniteError(
                    f"the gradient of {name} is NaN or infinite; this batch can't be adapted to."
                )
            leaf.grad = torch.zeros_like(leaf) if gradient is None else gradient
        self._moves.step()
        self._moves.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _answer(self, images: Tensor) -> Tensor:
        """Return (B, C) logits of a batch with the present scales and shifts."""
        # One by one, as images were encoded first; but statistics of a batch are those of all its images.
        portions = [images] if self._by_batch else images.split(1)
        embeddings = torch.cat([self._embed(portion) for portion in portions])
        return self.view_logits(embeddings[:, None])[:, 0]

    def _embed(self, images: Tensor) -> Tensor:
        """Return (B, d) embeddings with the present scales and shifts."""

        def compute(learner: Learner) -> Tensor:
            with _statistics_of_batches(self._by_batch):
                # The frozen tower's own way leaves out the graph.
                if learner.static_images:
                    return learner.backbone.vision.encode(images)
                return learner.embed_images(images)

        placed = {
            f"{_TOWER}{name}": tensor.to(self._start[name].dtype) for name, tensor in self.norms.items()
        }
        return self._functional.at(placed, compute)


def norm_parameters(visual: nn.Module) -> dict[str, nn.Parameter]:
    """Return the scales and shifts of a tower's normalisation layers by name."""
    kinds = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
    return {
        f"{place}.{name}" if place else name: parameter
        for place, module in visual.named_modules()
        if isinstance(module, kinds)
        for name, parameter in module.named_parameters(recurse=False)
    }


@contextmanager
def _statistics_of_batches(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let batch normalisation divide by statistics of its batch, and keep none of them, while the context is open."""
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.training = True
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, (training, tracked) in zip(layers, before, strict=True):
            layer.training = training
            layer.track_running_stats = tracked


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return len(tensor.shape) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
