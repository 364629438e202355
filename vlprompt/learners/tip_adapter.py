"""Tip-Adapter: zero-shot logits plus a vote of the training images, weighted by how much an image resembles them.

Paper: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022,
    arXiv 2207.09519, section 3 (Tip-Adapter-F: section 3.2).

Where this differs from the published code: that code keeps the fine-tuned keys and the alpha and beta that are
best on the *test* set. Here everything is chosen on validation data; without any, nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.hooks import ValidationSamples
from vlprompt.learners.recipe import Recipe

__all__ = ["TipAdapter", "TipAdapterF"]

_CHUNK = 1 << 24  # similarities held at once in the search (64 MiB)


@LEARNERS.register(
    "tip_adapter", summary="training images vote by similarity; no training", paper="2207.09519"
)
class TipAdapter(Learner):
    """Logits tau <f, w> + alpha sum_n exp(-beta (1 - <f, k_n>)) v_n over a cache of N training samples.

    Keys k_n are the unit-length means of a sample's embeddings over its augmented views, values v_n one-hot
    labels. An empty cache has no vote: before :meth:`prepare` this is zero-shot classification.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into the zero-shot weights w.
        alpha: Weight of the vote where validation data do not choose it (the code's value for ImageNet).
        beta: Sharpness of similarity, likewise.
        alpha_max: Upper end of the search, which starts at 0.1.
        beta_max: Upper end of the search, which starts at 0.1.
        alpha_steps: Values of alpha tried for each beta; 0 keeps ``alpha`` and ``beta``.
        beta_steps: Values of beta tried; 0 keeps ``alpha`` and ``beta``.
    """

    recipe = Recipe(factors=(1.0,), needs_validation="alpha and beta are chosen on validation data")

    class_bound = True
    prepares = True
    fine_tuned: ClassVar[bool] = False
    keys: nn.Parameter
    values: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        alpha: Annotated[float, Field(gt=0)] = 1.17,
        beta: Annotated[float, Field(gt=0)] = 1.0,
        alpha_max: Annotated[float, Field(gt=0.1)] = 3.0,
        beta_max: Annotated[float, Field(gt=0.1)] = 7.0,
        alpha_steps: Annotated[int, Field(ge=0)] = 20,
        beta_steps: Annotated[int, Field(ge=0)] = 200,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.start = (alpha, beta)
        self.alphas = _grid(alpha_max, alpha_steps)
        self.betas = _grid(beta_max, beta_steps)

        zero_shot = backbone.class_weights(self.classnames, self.templates)
        self.register_buffer("zero_shot", zero_shot, persistent=False)

        self.register_buffer("alpha", torch.tensor(alpha))
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("values", torch.zeros(0, dtype=torch.long))
        self._set_keys(torch.zeros(0, backbone.dim))

    def class_weights(self) -> Tensor:
        """Return the zero-shot weights, the part that is no vote."""
        return self.get_buffer("zero_shot")

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings."""
        features = F.normalize(embeddings, dim=-1)
        zero_shot = self.backbone.logit_scale * features @ self.class_weights().T
        return zero_shot + self.alpha * self._vote(features @ self.keys.T, self.beta, self.values)

    def prepare(self, views: Tensor, labels: Tensor) -> None:
        """Fill the cache; called by ``fit`` before anything is trained.

        Args:
            views: (V, N, d) embeddings of V augmented views of each training sample.
            labels: (N,) class numbers.
        """
        device = self.backbone.device
        self._set_keys(F.normalize(views.to(device).float().mean(0), dim=-1))
        self.values = labels.to(device).long()
        self.alpha.fill_(self.start[0])
        self.beta.fill_(self.start[1])

    @torch.no_grad()
    def calibrate(self, sources: Sequence[ValidationSamples]) -> dict[str, float]:
        """Choose alpha and beta on the validation samples of the one task.

        Returns:
            ``alpha``, ``beta`` and their accuracy; of equally good pairs the smallest beta, then alpha.
        """
        if not self.alphas or not self.betas:
            return {}

        (source,) = sources  # a cache belongs to its classes, so there is one task
        embeddings, labels = source.validation_data()

        correct = np.zeros((len(self.betas), len(self.alphas)), dtype=np.int64)
        rows = max(1, _CHUNK // max(1, len(self.keys), len(self.classnames) * len(self.alphas)))
        for part, target in zip(embeddings.split(rows), labels.split(rows), strict=True):
            correct += self._count_correct(part.to(self.keys), target.to(self.keys.device))

        b, a = divmod(int(correct.argmax()), len(self.alphas))  # the first of the best
        self.alpha.fill_(self.alphas[a])
        self.beta.fill_(self.betas[b])
        return {"alpha": self.alphas[a], "beta": self.betas[b], "val_accuracy": correct[b, a] / len(labels)}

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the cache (``keys`` (N, d), ``values`` (N,)) and ``alpha`` and ``beta``, trained or not."""
        tensors = {"keys": self.keys, "values": self.values, "alpha": self.alpha, "beta": self.beta}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a cache back.

        An empty cache takes one of any length, since N is the training set's; one that is filled takes its own
        length only. All else is strict: names, shapes, labels that are classes, finite numbers.

        Raises:
            CheckpointError: If a tensor is missing, unknown or does not fit; each is named.
        """
        problems = self._problems(state)
        if problems:
            raise CheckpointError(f"this state does not fit {self.method}: {'; '.join(problems)}.")

        with torch.no_grad():
            if len(state["keys"]) != len(self.keys):
                self._set_keys(torch.empty(state["keys"].shape, device=self.backbone.device))
            self.keys.copy_(state["keys"])  # in place: an optimiser may refer to it
            self.values = state["values"].to(self.keys.device).long().clone()
            self.alpha.copy_(state["alpha"])
            self.beta.copy_(state["beta"])

    def _problems(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return why a cache can't be put back."""
        names = list(self.trainable_state())
        problems = [f"{name} is missing" for name in names if name not in state]
        problems += [f"{name} is unknown" for name in state if name not in names]
        if problems:
            return problems

        keys = state["keys"]
        values = state["values"]
        count = len(self.keys) or (len(keys) if keys.dim() else 0)
        shapes = {"keys": (count, self.backbone.dim), "values": (count,), "alpha": (), "beta": ()}
        for name, shape in shapes.items():
            if tuple(state[name].shape) != shape:
                problems.append(f"{name} has shape {tuple(state[name].shape)}, expected {shape}")
            elif not bool(torch.isfinite(state[name]).all()):
                problems.append(f"{name} is not finite")

        if values.is_floating_point():
            problems.append(f"values are {values.dtype}, expected class numbers")
        elif values.numel() and not 0 <= int(values.min()) <= int(values.max()) < len(self.classnames):
            problems.append(f"values name classes outside 0 .. {len(self.classnames) - 1}")

        return problems

    def _set_keys(self, keys: Tensor) -> None:
        self.keys = nn.Parameter(keys, requires_grad=self.fine_tuned)

    def _vote(self, similarity: Tensor, beta: Tensor | float, values: Tensor) -> Tensor:
        """Return (B, C) sums of exp(-beta (1 - similarity)) over the samples of each class."""
        affinity = (-beta * (1 - similarity)).exp()
        votes = affinity.new_zeros(len(affinity), len(self.classnames))
        return votes.index_add(1, values, affinity)  # affinity @ one-hot values, without the zeros

    def _count_correct(self, embeddings: Tensor, labels: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return (beta_steps, alpha_steps) numbers of correct predictions."""
        features = F.normalize(embeddings, dim=-1)
        zero_shot = self.backbone.logit_scale * features @ self.class_weights().T
        similarity = features @ self.keys.T
        alphas = torch.tensor(self.alphas, device=features.device)[:, None, None]

        counts = []
        for beta in self.betas:
            logits = zero_shot + alphas * self._vote(similarity, beta, self.values)  # (alphas, n, C)
            counts.append((logits.argmax(-1) == labels).sum(-1))

        return torch.stack(counts).cpu().numpy()


@LEARNERS.register("tip_adapter_f", summary="Tip-Adapter whose keys are fine-tuned", paper="2207.09519")
class TipAdapterF(TipAdapter):
    """Tip-Adapter-F: the cache's keys are trained, from the values that Tip-Adapter has; options as there.

    Training keeps the given alpha and beta; validation chooses the epoch (``select: best``), then alpha and
    beta. Published recipe: AdamW, lr 0.001, eps 1e-4, cosine per step, 20 epochs, batch 256, 10 views.
    """

    recipe = Recipe(
        {
            "lr": 0.001,
            "batch_size": 256,
            "epochs": 20,
            "optimizer": "adamw",
            "eps": 1e-4,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup_epochs": 0.0,
            "drop_last": False,
        },
        factors=(0.1, 1.0, 10.0),
        needs_validation="alpha and beta are chosen on validation data",
    )

    fine_tuned = True


def _grid(high: float, steps: int) -> list[float]:
    """Values from 0.1 in equal steps towards ``high``, which is not reached (as in the published code)."""
    return [0.1 + i * (high - 0.1) / steps for i in range(steps)]
