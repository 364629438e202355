"""Episodes: tasks made of pseudo-classes, whose support is of one domain and whose query of another.

Shared prompts know no class, so support and query may hold different classes: the inner step learns from one domain
what the outer one asks for in another (GRAM's cross-domain tasks; sizes are ours).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.captions.store import CaptionStore
from vlprompt.meta.clusters import Hierarchy, PseudoClass
from vlprompt.meta.functional import Batch
from vlprompt.meta.options import EpisodeOptions

__all__ = ["Episode", "EpisodeBatches", "Episodes", "Side"]

Preprocess = Callable[..., Tensor]
Rng = np.random.Generator


@dataclass(frozen=True)
class Side:
    """Support or query of an episode.

    Attributes:
        names: N class names, distinct.
        batch: What a learner's loss reads: ``label`` (B,), and ``embedding`` (B, d) or ``image`` (B, 3, H, W).
        features: (d,) mean unit-length image feature.
        rows: (B,) pairs.
    """

    names: tuple[str, ...]
    batch: Batch
    features: Tensor
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Episode:
    """A task.

    Attributes:
        support: What the inner step learns from.
        query: What judges it.
        domains: Where the two are from.
        similarity: Cosine of the two domains' centres.
    """

    support: Side
    query: Side
    domains: tuple[int, int]
    similarity: float


class Episodes:
    """Draws episodes; every one is a function of the seed and its number.

    Args:
        store: The pairs.
        hierarchy: Their domains and pseudo-classes.
        options: See there.
        seed: Of the draws, and of which domains are held out.
        preprocess: The backbone's, for learners that need pixels; None gives stored image features.
        every_pair: Every pair is a class of its own, called by its caption (``meta.clusters.names=pair``).

    Raises:
        DataError: If too few domains are left to train or to validate on.
    """

    def __init__(
        self,
        store: CaptionStore,
        hierarchy: Hierarchy,
        options: EpisodeOptions,
        seed: int,
        preprocess: Preprocess | None = None,
        every_pair: bool = False,
    ) -> None:
        self.store, self.hierarchy, self.options, self.seed = store, hierarchy, options, seed
        self.preprocess, self.every_pair = preprocess, every_pair
        domains = sorted({c.domain for c in hierarchy.classes})
        self.classes = {d: hierarchy.of(d) for d in domains}
        order = numpy_rng(seed, "held-out domains").permutation(domains).tolist()
        held = max(2, round(options.held_out * len(order))) if options.held_out else 0
        self.held_out, self.training = tuple(sorted(order[:held])), tuple(sorted(order[held:]))
        if len(self.training) < 2:
            raise DataError(
                f"{len(order)} domains, {held} of them held out: fewer than two are left to train on. More pairs, more "
                "meta.clusters.domains or a smaller meta.episodes.held_out."
            )

    def draw(self, number: int, validation: bool = False) -> Episode:
        """Return one episode, of the domains that are trained on or of those held out."""
        rng = numpy_rng(self.seed, "episode", validation, number)
        domains = self.held_out if validation and self.held_out else self.training
        first = domains[int(rng.integers(len(domains)))]
        second = self._other(first, domains, rng) if rng.random() < self.options.cross_domain else first
        support = self._side(rng, first, self.options.support)
        query = self._side(rng, second, self.options.query, avoid=support.rows)
        similarity = float(self.hierarchy.centroids[first] @ self.hierarchy.centroids[second])
        return Episode(support, query, (first, second), similarity)

    def validation(self) -> list[Episode]:
        """Return the episodes that are validated on; always the same ones."""
        return [self.draw(number, validation=True) for number in range(self.options.validation)]

    def _other(self, first: int, domains: Sequence[int], rng: Rng) -> int:
        others = [d for d in domains if d != first]
        if self.options.hardness is None:
            return others[int(rng.integers(len(others)))]
        near = self.hierarchy.centroids[others] @ self.hierarchy.centroids[first]
        order = torch.argsort(near, descending=True).tolist()  # 0 is the nearest domain, 1 the farthest
        return others[order[round(self.options.hardness * (len(order) - 1))]]

    def _side(self, rng: Rng, domain: int, shots: int, avoid: NDArray[np.int64] | None = None) -> Side:
        used = set() if avoid is None else set(avoid.tolist())
        pools = self._pools(self.classes[domain], used)
        order = rng.permutation(len(pools))
        chosen: dict[str, tuple[str, NDArray[np.int64]]] = {}
        for place in order:  # CLIP's tokenizer knows no case, so neither do names
            name, rows = pools[place]
            if name.casefold() not in chosen and len(chosen) < self.options.ways:
                chosen[name.casefold()] = name, rng.permutation(rows)[:shots]
        rows = np.concatenate([r for _, r in chosen.values()])
        label = torch.tensor([n for n, (_, r) in enumerate(chosen.values()) for _ in r])
        features = self.store.image.take(rows)
        batch: Batch = {"label": label, "embedding": features}
        if self.preprocess is not None:
            pixels = [self.store.pixels(int(row), self.preprocess) for row in rows]
            batch = {"label": label, "image": torch.stack(pixels)}
        names = tuple(name for name, _ in chosen.values())
        return Side(names, batch, F.normalize(features.mean(0), dim=-1), rows)

    def _pools(self, classes: list[PseudoClass], used: set[int]) -> list[tuple[str, NDArray[np.int64]]]:
        """Return (name, pairs to draw from) of every class that can be drawn."""
        if self.every_pair:
            free = [int(r) for c in classes for r in c.rows if int(r) not in used]
            return [(self.store.caption(r).rstrip(" ."), np.array([r])) for r in free]
        pools = [(c.name, np.array([r for r in c.rows if int(r) not in used])) for c in classes]
        return [(name, rows) for name, rows in pools if len(rows)]


class EpisodeBatches:
    """Batches of episodes for the trainer.

    Args:
        episodes: Draws them.
        batch_size: Episodes per outer step.
    """

    def __init__(self, episodes: Episodes, batch_size: int) -> None:
        self.episodes, self.batch_size = episodes, batch_size

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`; episodes never come twice."""
        count = self.episodes.options.per_epoch
        numbers = np.arange(epoch * count, (epoch + 1) * count)
        return [numbers[i : i + self.batch_size] for i in range(0, count, self.batch_size)]

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        return {"episodes": [self.episodes.draw(int(i)) for i in indices]}
