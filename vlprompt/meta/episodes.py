"""Episodes: tasks made of pseudo-classes, whose support is of one domain and whose query of another.

Shared prompts know no class, so support and query may hold different classes: the inner step learns from one domain
what the outer one asks for in another (GRAM's cross-domain tasks; sizes are ours). Where the gradients of different
classes have nothing in common, such a step can't help; ``shared_classes`` asks for the support's own classes in other
images, as MAML does (Finn et al., ICML 2017).
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
from vlprompt.core.trainable import Batch
from vlprompt.data.captions.store import CaptionStore
from vlprompt.meta.clusters import Hierarchy, PseudoClass
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
        self.store = store
        self.hierarchy = hierarchy
        self.options = options
        self.seed = seed
        self.preprocess = preprocess
        self.every_pair = every_pair
        if every_pair and options.shared_classes:
            raise DataError(
                "meta.episodes.shared_classes needs classes of several pairs: meta.clusters.names=phrase or caption."
            )

        domains = sorted({c.domain for c in hierarchy.classes})
        self.classes = {domain: hierarchy.of(domain) for domain in domains}

        order = numpy_rng(seed, "held-out domains").permutation(domains).tolist()
        count = max(2, round(options.held_out * len(order))) if options.held_out else 0
        self.held_out = tuple(sorted(order[:count]))
        self.training = tuple(sorted(order[count:]))
        if len(self.training) < 2:
            raise DataError(
                f"{len(order)} domains, {count} of them held out: fewer than two are left to train on. More pairs, "
                "more meta.clusters.domains or a smaller meta.episodes.held_out."
            )

    def draw(self, number: int, validation: bool = False) -> Episode:
        """Return one episode, of the domains that are trained on or of those held out."""
        rng = numpy_rng(self.seed, "episode", validation, number)

        domains = self.held_out if validation and self.held_out else self.training
        first = domains[int(rng.integers(len(domains)))]
        if self.options.shared_classes and rng.random() < self.options.shared_classes:
            support = self._side(rng, first, self.options.support)
            query = self._side(rng, first, self.options.query, avoid=support.rows, only=support.names)
            return Episode(support, query, (first, first), 1.0)

        second = self._other(first, domains, rng) if rng.random() < self.options.cross_domain else first

        support = self._side(rng, first, self.options.support)
        query = self._side(rng, second, self.options.query, avoid=support.rows)
        similarity = float(self.hierarchy.centroids[first] @ self.hierarchy.centroids[second])
        return Episode(support, query, (first, second), similarity)

    def validation(self) -> list[Episode]:
        """Return the episodes that are validated on; always the same ones."""
        return [self.draw(number, validation=True) for number in range(self.options.validation)]

    def _other(self, first: int, domains: Sequence[int], rng: Rng) -> int:
        """Return the query's domain: any other one, or the one at the asked-for distance."""
        others = [domain for domain in domains if domain != first]
        if self.options.hardness is None:
            return others[int(rng.integers(len(others)))]

        similarity = self.hierarchy.centroids[others] @ self.hierarchy.centroids[first]
        order = torch.argsort(similarity, descending=True).tolist()  # 0 is the nearest domain, 1 the farthest
        return others[order[round(self.options.hardness * (len(order) - 1))]]

    def _side(
        self,
        rng: Rng,
        domain: int,
        shots: int,
        avoid: NDArray[np.int64] | None = None,
        only: Sequence[str] | None = None,
    ) -> Side:
        """Draw one side of an episode.

        Args:
            rng: Of the episode.
            domain: Where its classes are from.
            shots: Pairs per class.
            avoid: Pairs that the other side has.
            only: Names of the classes to draw; empty for all of the domain.
        """
        used = set() if avoid is None else set(avoid.tolist())
        pools = self._pools(self.classes[domain], used)
        if only is not None:
            pools = [pool for pool in pools if pool[0] in only]

        chosen: dict[str, tuple[str, NDArray[np.int64]]] = {}
        for number in rng.permutation(len(pools)):  # CLIP's tokenizer knows no case, so neither do names
            name, rows = pools[number]
            if name.casefold() not in chosen and len(chosen) < self.options.ways:
                chosen[name.casefold()] = name, rng.permutation(rows)[:shots]

        names = tuple(name for name, _ in chosen.values())
        rows = np.concatenate([class_rows for _, class_rows in chosen.values()])
        labels = [label for label, (_, class_rows) in enumerate(chosen.values()) for _ in class_rows]
        features = self.store.image.take(rows)

        batch: Batch = {"label": torch.tensor(labels), "embedding": features}
        if self.preprocess is not None:
            pixels = [self.store.pixels(int(row), self.preprocess) for row in rows]
            batch = {"label": torch.tensor(labels), "image": torch.stack(pixels)}

        return Side(names, batch, F.normalize(features.mean(0), dim=-1), rows)

    def _pools(self, classes: list[PseudoClass], used: set[int]) -> list[tuple[str, NDArray[np.int64]]]:
        """Return (name, pairs to draw from) of every class that can be drawn."""
        pools = []
        for pseudo_class in classes:
            free = [int(row) for row in pseudo_class.rows if int(row) not in used]
            if self.every_pair:
                pools += [(self.store.caption(row).rstrip(" ."), np.array([row])) for row in free]
            elif free:
                pools.append((pseudo_class.name, np.array(free)))
        return pools


class EpisodeBatches:
    """Batches of episodes for the trainer.

    Args:
        episodes: Draws them.
        batch_size: Episodes per outer step.
    """

    def __init__(self, episodes: Episodes, batch_size: int) -> None:
        self.episodes = episodes
        self.batch_size = batch_size

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`; episodes never come twice."""
        count = self.episodes.options.per_epoch
        numbers = np.arange(epoch * count, (epoch + 1) * count)
        return [numbers[i : i + self.batch_size] for i in range(0, count, self.batch_size)]

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        return {"episodes": [self.episodes.draw(int(i)) for i in indices]}
