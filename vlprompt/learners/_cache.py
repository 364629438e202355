"""What learners share that keep their training samples: the samples as state, their votes, the search of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.hooks import ValidationSamples

__all__ = ["SampleCache", "best_blend", "grid", "search_grid"]

_CHUNK = 1 << 23  # numbers held at once in the search (32 MiB)
_FIRST = 0.1  # of every range that is searched


class SampleCache(Learner):
    """Base of learners with N keys, one per training sample, and its class number as its value.

    N is the training set's, so an empty cache takes a saved one of any length. A subclass names its other tensors in
    :meth:`cache_tensors` and their shapes in :meth:`cache_shapes`, and makes room in :meth:`resize`.

    A subclass has the buffers ``alpha`` and ``beta`` (weight and sharpness of the vote) and the values that validation
    chooses them from, ``alphas`` and ``betas``.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into the zero-shot weights.
    """

    class_bound = True
    prepares = True
    fine_tuned: ClassVar[bool] = False
    keys: nn.Parameter
    values: Tensor
    alpha: Tensor
    beta: Tensor
    alphas: Sequence[float]
    betas: Sequence[float]

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
    ) -> None:
        super().__init__(backbone, classnames, templates)
        zero_shot = backbone.class_weights(self.classnames, self.templates)
        self.register_buffer("zero_shot", zero_shot, persistent=False)
        self.register_buffer("values", torch.zeros(0, dtype=torch.long))
        self.keys = nn.Parameter(torch.zeros(0, backbone.dim), requires_grad=self.fine_tuned)

    def class_embeddings(self) -> Tensor:
        """Return the zero-shot weights, the part that is no vote."""
        return self.get_buffer("zero_shot")

    def prepare(self, views: Tensor, labels: Tensor) -> None:
        """Fill the cache: keys are the unit-length means of a sample's embeddings over its views.

        Args:
            views: (V, N, d) embeddings of V augmented views of each training sample.
            labels: (N,) class numbers.
        """
        self.resize(len(labels))
        with torch.no_grad():
            self.keys.copy_(F.normalize(views.to(self.keys.device).float().mean(0), dim=-1))
        self.values.copy_(labels)

    def resize(self, count: int) -> None:
        """Make room for N samples."""
        device = self.backbone.device
        self.keys = nn.Parameter(
            torch.zeros(count, self.backbone.dim, device=device), requires_grad=self.fine_tuned
        )
        self.values = torch.zeros(count, dtype=torch.long, device=device)

    def votes(self, affinities: Tensor) -> Tensor:
        """Return (B, C) sums over the samples of each class of (B, N) affinities."""
        empty = affinities.new_zeros(affinities.shape[0], len(self.classnames))
        return empty.index_add(1, self.values, affinities)  # affinities @ one-hot values, without the zeros

    # --- state

    @torch.no_grad()
    def choose_alpha_and_beta(
        self,
        sources: Sequence[ValidationSamples],
        text_logits: Callable[[Tensor], Tensor],
        similarities: Callable[[Tensor], Tensor],
        factors: Tensor,
    ) -> dict[str, float]:
        """Set alpha and beta to the best on the validation samples of the one task.

        Args:
            sources: See :meth:`LearnerHooks.calibrate`.
            text_logits: (n, d) unit-length features to (n, C) logits without the vote.
            similarities: The same features to (n, N) similarities to the keys.
            factors: (N, 1) factors of the keys' votes.

        Returns:
            ``alpha``, ``beta`` and their accuracy; of equally good pairs the smallest beta, then alpha. Empty where
            nothing is to be chosen.
        """
        if not self.chooses:
            return {}

        (source,) = sources  # a cache belongs to its classes, so there is one task
        embeddings, labels = source.validation_data()
        features = F.normalize(embeddings.to(self.keys), dim=-1)

        (b, a, _), accuracy = best_blend(
            text_logits(features),
            similarities(features),
            labels.to(self.values),
            self.values,
            factors,
            self.alphas,
            self.betas,
        )
        self.alpha.fill_(self.alphas[a])
        self.beta.fill_(self.betas[b])
        return {"alpha": self.alphas[a], "beta": self.betas[b], "val_accuracy": accuracy}

    def cache_tensors(self) -> dict[str, Tensor]:
        """Return all of the state by name."""
        return {"keys": self.keys, "values": self.values}

    def cache_shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each state tensor for N samples."""
        return {"keys": (count, self.backbone.dim), "values": (count,)}

    def index_limits(self) -> dict[str, tuple[str, int]]:
        """Return, for each state tensor of numbers of things, what they number and how many of those there are."""
        return {"values": ("classes", len(self.classnames))}

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the samples and all that was chosen or learned, trained or not."""
        return {name: tensor.detach() for name, tensor in self.cache_tensors().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a cache back.

        An empty cache takes one of any length, since N is the training set's; one that is filled takes its length
        only. All else is strict: names, shapes, labels that are classes, finite numbers.

        Raises:
            CheckpointError: If a tensor is missing, unknown or does not fit; each is named.
        """
        problems = self._problems(state)
        if problems:
            raise CheckpointError(f"this state does not fit {self.title()}: {'; '.join(problems)}.")

        if len(state["keys"]) != len(self.keys):
            self.resize(len(state["keys"]))
        with torch.no_grad():
            for name, tensor in self.cache_tensors().items():
                tensor.copy_(state[name])  # in place: an optimiser may refer to it
        self._cached_weights = None

    def _problems(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return why a cache can't be put back."""
        names = list(self.cache_tensors())
        problems = [f"{name} is missing" for name in names if name not in state]
        problems += [f"{name} is unknown" for name in state if name not in names]
        if problems:
            return problems

        keys = state["keys"]
        count = len(self.keys) or (len(keys) if keys.dim() else 0)
        for name, shape in self.cache_shapes(count).items():
            if tuple(state[name].shape) != shape:
                problems.append(f"{name} has shape {tuple(state[name].shape)}, expected {shape}")
            elif not bool(torch.isfinite(state[name]).all()):
                problems.append(f"{name} is not finite")

        for name, (what, limit) in self.index_limits().items():
            numbers = state[name]
            if numbers.is_floating_point():
                problems.append(f"{name} are {numbers.dtype}, expected numbers of {what}")
            elif numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
                problems.append(f"{name} name {what} outside 0 .. {limit - 1}")

        return problems


def search_grid(high: float, steps: int) -> list[float]:
    """Values from 0.1 in equal steps towards ``high``, which is not reached (as in the published codes)."""
    return grid(_FIRST, high, steps)


def grid(low: float, high: float, steps: int) -> list[float]:
    """Values from ``low`` in equal steps towards ``high``, which is not reached."""
    return [low + i * (high - low) / steps for i in range(steps)]


def best_blend(
    zero_shot: Tensor,
    similarities: Tensor,
    labels: Tensor,
    values: Tensor,
    weights: Tensor,
    alphas: Sequence[float],
    betas: Sequence[float],
) -> tuple[tuple[int, int, int], float]:
    """Find alpha, beta and a column of weights by which zero-shot logits plus votes are most often right.

    Logits are z_c + alpha v_c with v_c = sum_n w_n exp(-beta (1 - s_n)) over the samples n of class c. As a function of
    alpha each is a line, so that the alphas that name an image rightly lie between two numbers: one pass over the
    classes serves all alphas.

    Args:
        zero_shot: (m, C) logits of validation images.
        similarities: (m, N) of those images to the samples.
        labels: (m,) class numbers.
        values: (N,) class numbers of the samples.
        weights: (N, G), G weightings of the samples.
        alphas: Values tried, ascending.
        betas: Values tried.

    Returns:
        Indices into ``betas``, ``alphas`` and the weightings, the first of the best in this order, and their accuracy.
    """
    slots, filled = _slots(values, zero_shot.shape[1])
    spread = weights[slots] * filled[..., None]  # (C, K, G)
    correct = np.zeros((len(betas), len(alphas), weights.shape[1]), dtype=np.int64)

    rows = max(1, _CHUNK // (spread[..., 0].numel() + zero_shot.shape[1] * weights.shape[1]))
    for logits, similarity, targets in zip(
        zero_shot.split(rows), similarities.split(rows), labels.split(rows), strict=True
    ):
        distances = 1 - similarity[:, slots].permute(1, 0, 2)  # (C, m, K)
        for number, beta in enumerate(betas):
            votes = torch.bmm((-beta * distances).exp(), spread)  # (C, m, G)
            correct[number] += _count_correct(logits, votes, targets, alphas)

    b, a, g = (int(index) for index in np.unravel_index(int(correct.argmax()), correct.shape))
    return (b, a, g), float(correct[b, a, g] / len(labels))


def _slots(values: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return (C, K) numbers of the samples of each class, and which of them are real: classes may have fewer than K."""
    counts = torch.bincount(values, minlength=classes)
    width = max(1, int(counts.max()))
    order = values.argsort(stable=True)
    starts = counts.cumsum(0) - counts

    columns = torch.arange(width, device=values.device)
    filled = columns < counts[:, None]
    positions = (starts[:, None] + columns).clamp(max=len(values) - 1)
    return order[positions], filled


def _count_correct(
    logits: Tensor, votes: Tensor, labels: Tensor, alphas: Sequence[float]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return (A, G) numbers of images that are named rightly.

    Args:
        logits: (m, C).
        votes: (C, m, G).
        labels: (m,).
        alphas: A values, ascending.
    """
    images = torch.arange(len(labels), device=labels.device)
    lead = logits[images, labels][None] - logits.T  # (C, m), of the label over each class
    gain = votes[labels, images][None] - votes  # (C, m, G), per unit of alpha

    # The label wins over a class where lead + alpha gain > 0: above a number, below one, everywhere or nowhere.
    crossing = -lead[..., None] / gain
    lower = torch.where(gain > 0, crossing, -torch.inf)
    upper = torch.where(gain < 0, crossing, torch.inf)
    lower = torch.where((gain == 0) & (lead[..., None] <= 0), torch.inf, lower)
    lower[labels, images] = -torch.inf  # a label has nothing to win over itself

    tried = torch.tensor(alphas, dtype=gain.dtype, device=gain.device)
    first = torch.searchsorted(tried, lower.amax(0), right=True)  # (m, G)
    end = torch.maximum(torch.searchsorted(tried, upper.amin(0)), first)

    changes = torch.zeros(gain.shape[2], len(alphas) + 1, dtype=torch.long, device=gain.device)
    changes.scatter_add_(1, first.T, torch.ones_like(first.T))
    changes.scatter_add_(1, end.T, -torch.ones_like(end.T))
    return changes.cumsum(1)[:, :-1].T.cpu().numpy()
