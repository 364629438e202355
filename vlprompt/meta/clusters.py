"""Cross-modal hierarchical clustering: pairs become domains, domains pseudo-classes with names.

That GRAM clusters both modalities hierarchically is the paper's claim; the rest is our reconstruction. The first level
takes one modality, the second the other. CLIP's two modalities lie far apart (the modality gap), so each is centred by
its own mean before the two are ever compared or put together.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import derive_seed
from vlprompt.data.captions.store import CaptionStore
from vlprompt.meta.names import pseudo_name
from vlprompt.meta.options import ClusterOptions, Space

__all__ = ["Hierarchy", "PseudoClass", "cluster_pairs", "quotas", "spherical_kmeans"]


@dataclass(frozen=True)
class PseudoClass:
    """A cluster of the second level.

    Attributes:
        domain: Number of the domain it lies in.
        name: What a classifier calls it.
        rows: (n,) its pairs, the medoid first.
        coherence: Mean cosine of its images with their captions, in [-1, 1].
    """

    domain: int
    name: str
    rows: NDArray[np.int64]
    coherence: float


@dataclass(frozen=True)
class Hierarchy:
    """The result of the clustering.

    Attributes:
        domain: (N,) domain of every pair.
        centroids: (K1, d) unit-length centres of the domains' images, centred.
        classes: The pseudo-classes that tasks are made of.
        dropped: How many were left out: too small, or images and captions that don't agree.
    """

    domain: NDArray[np.int64]
    centroids: Tensor
    classes: tuple[PseudoClass, ...]
    dropped: int

    def of(self, domain: int) -> list[PseudoClass]:
        """Return the pseudo-classes of a domain."""
        return [c for c in self.classes if c.domain == domain]

    @property
    def digest(self) -> str:
        """12 hex digits that identify the assignment and the names."""
        state = hashlib.sha256(self.domain.tobytes())
        for pseudo_class in self.classes:
            state.update(pseudo_class.name.encode() + b"\x1f" + np.sort(pseudo_class.rows).tobytes())
        return state.hexdigest()[:12]


def cluster_pairs(store: CaptionStore, options: ClusterOptions, members: int, seed: int = 1) -> Hierarchy:
    """Cluster a store in two levels and name the pseudo-classes.

    Args:
        store: N pairs.
        options: See there.
        members: Fewest pairs of a pseudo-class.
        seed: Of the starts of k-means.

    Raises:
        DataError: If fewer than two domains have two pseudo-classes, so that no task can be made.
    """
    image = store.image.all()
    text = store.text.all()
    first = _space(image, text, options.first, options.weight)
    second = _space(image, text, options.second, options.weight)

    domain, _ = spherical_kmeans(first, options.domains, derive_seed(seed, "domains"), options.iterations)
    count = int(domain.max()) + 1
    rows_of = [np.flatnonzero(domain == number) for number in range(count)]

    agreement = (image * text).sum(1).numpy()
    candidates: list[PseudoClass] = []
    for number, parts_wanted in enumerate(_classes_per_domain(second, rows_of, options)):
        rows_here = rows_of[number]
        split_seed = derive_seed(seed, "classes", number)
        parts = _split(second, rows_here, parts_wanted, split_seed, options.iterations)
        outside = [store.caption(row) for row in rows_here.tolist()] if options.names == "phrase" else []
        for rows in parts:
            captions = [store.caption(row) for row in rows.tolist()]
            name = pseudo_name(captions, options.names, options.shared, outside)
            candidates.append(PseudoClass(number, name, rows, float(agreement[rows].mean())))

    large = [c for c in candidates if len(c.rows) >= members]
    coherent = _coherent(large, options.drop_incoherent)
    usable = _usable_domains(coherent)
    if len(usable) < 2:
        raise DataError(
            f"clustering left {len(usable)} domains with two or more pseudo-classes of at least {members} pairs; tasks "
            f"need two such domains. {len(store)} pairs are few: give more, or fewer meta.clusters.domains and classes."
        )
    classes = tuple(c for c in coherent if c.domain in usable)

    centred = _centred(image)
    centres = torch.stack([centred[rows].mean(0) if len(rows) else centred[0] for rows in rows_of])
    return Hierarchy(domain, F.normalize(centres, dim=-1), classes, len(candidates) - len(classes))


def _usable_domains(classes: list[PseudoClass]) -> set[int]:
    """Return the domains with at least two different names."""
    names: dict[int, set[str]] = {}
    for pseudo_class in classes:
        names.setdefault(pseudo_class.domain, set()).add(pseudo_class.name)
    return {domain for domain, distinct in names.items() if len(distinct) > 1}


def spherical_kmeans(
    points: Tensor, count: int, seed: int, iterations: int = 30, starts: int = 3
) -> tuple[NDArray[np.int64], Tensor]:
    """Cluster unit vectors by cosine; centres are unit vectors too (Dhillon and Modha 2001).

    The best of several starts by scikit-learn's k-means++. A cluster that runs empty starts again from the point that
    fits its own worst.

    Args:
        points: (n, d), unit length.
        count: Clusters; no more than points are made.
        seed: Of the starts.
        iterations: At most, per start.
        starts: How many.

    Returns:
        (n,) cluster of every point and (k, d) centres.
    """
    count = min(count, len(points))

    best: tuple[float, Tensor, Tensor] | None = None
    for turn in range(starts):
        state = derive_seed(seed, "k-means++", turn) % 2**32
        start, _ = kmeans_plusplus(points.numpy(), count, random_state=state)
        centres = _lloyd(points, F.normalize(torch.from_numpy(start), dim=-1), iterations)
        similarity, label = _nearest(points, centres)
        if best is None or float(similarity.mean()) > best[0]:
            best = float(similarity.mean()), label, centres

    assert best is not None
    return best[1].numpy(), best[2]


def _lloyd(points: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Return (k, d) centres after Lloyd's iterations, which end early when no point moves."""
    label = torch.full((len(points),), -1)

    for _ in range(iterations):
        similarity, nearest = _nearest(points, centres)
        if torch.equal(nearest, label):
            break
        label = nearest

        sums = torch.zeros_like(centres).index_add_(0, label, points)
        # A cluster that ran empty starts again from the point that fits its own worst.
        empty = (torch.bincount(label, minlength=len(centres)) == 0).nonzero().flatten()
        sums[empty] = points[similarity.topk(len(empty), largest=False).indices]
        centres = F.normalize(sums, dim=-1)

    return centres


def quotas(weights: NDArray[np.float64], total: int, least: int = 2) -> list[int]:
    """Share ``total`` out in proportion to weights, at least ``least`` each; rounded by largest remainder."""
    spare = max(0, total - least * len(weights))
    exact = spare * weights / max(weights.sum(), 1e-12)

    shares = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: spare - shares.sum()]] += 1
    return (shares + least).tolist()


def _space(image: Tensor, text: Tensor, space: Space, weight: float) -> Tensor:
    """Return (N, d) or (N, 2 d) unit vectors, each modality centred by its own mean."""
    if space == "joint":
        parts = [weight**0.5 * _centred(image), (1 - weight) ** 0.5 * _centred(text)]
        return F.normalize(torch.cat(parts, dim=1), dim=-1)
    return _centred(image if space == "image" else text)


def _centred(x: Tensor) -> Tensor:
    return F.normalize(x - x.mean(0), dim=-1)


def _nearest(points: Tensor, centres: Tensor, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    best = [(part @ centres.T).max(1) for part in points.split(chunk)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def _classes_per_domain(
    second: Tensor, rows_of: list[NDArray[np.int64]], options: ClusterOptions
) -> list[int]:
    """Return how many pseudo-classes each domain is cut into."""
    if not options.complexity_aware:
        return [options.classes] * len(rows_of)

    # The trace of the covariance of unit vectors: 1 - |mean|^2; times the size, so that a domain of few pairs gets few.
    spread = []
    for rows in rows_of:
        spread.append(len(rows) * float(1 - second[rows].mean(0).square().sum()) if len(rows) else 0.0)
    return quotas(np.array(spread), options.classes * len(rows_of))


def _split(
    second: Tensor, rows: NDArray[np.int64], count: int, seed: int, iterations: int
) -> list[NDArray[np.int64]]:
    """Cut a domain into pseudo-classes: the rows of each, nearest to its centre first."""
    if not len(rows):
        return []

    points = second[rows]
    label, centres = spherical_kmeans(points, count, seed, iterations)

    parts = []
    for number, centre in enumerate(centres):
        members = np.flatnonzero(label == number)
        if len(members):
            order = torch.argsort(points[members] @ centre, descending=True, stable=True).numpy()
            parts.append(rows[members[order]])
    return parts


def _coherent(classes: list[PseudoClass], share: float) -> list[PseudoClass]:
    """Leave out the share of clusters whose images and captions agree least."""
    order = sorted(range(len(classes)), key=lambda number: classes[number].coherence)
    worst = set(order[: int(share * len(classes))])
    return [pseudo_class for number, pseudo_class in enumerate(classes) if number not in worst]
