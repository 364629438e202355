"""ECALP: labels spread from texts to images over a graph that grows with the stream.

Paper: Li et al., "Efficient and Context-Aware Label Propagation for Zero-/Few-Shot Training-Free Adaptation of
    Vision-Language Model", ICLR 2025, arXiv 2412.18303, section 3.

As in the published code, the image that is named stands in the graph twice (``twin``), and an image's weighted cosines
with a new one are taken with the weights on the older. Where this differs: that code's answer is softmax(10,000 y),
here it is y / sum(y); negative cosines count as 0, where an even power would make them large; and nothing is left in
global variables.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views, confident_mean
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["LabelPropagation"]

# Products with compressed rows, which is all that is used of them here, give what they should.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

_TINY = 1e-6  # added to the square roots of degrees


@ADAPTERS.register(
    "ecalp", summary="labels spread over a growing graph of images; online, no gradients", paper="2412.18303"
)
class LabelPropagation(StreamAdapter):
    """Nodes are texts and images; every image has edges to its nearest texts and images, weighted cosine^power.

    Args:
        learner: See :class:`FeatureAdapter`.
        texts: Texts that an image is joined with.
        neighbours: Images that an image is joined with.
        power: Of the cosines.
        rounds: How often labels are passed on.
        twin: Whether the image that is named stands in the graph twice; its twin is then its nearest neighbour.
        window: Latest images that stay in the graph; None keeps all, and time and memory grow with the stream.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that represent an image, the most confident ones.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        texts: Annotated[int, Field(ge=1)] = 3,
        neighbours: Annotated[int, Field(ge=1)] = 8,
        power: Annotated[float, Field(ge=0)] = 10.0,
        rounds: Annotated[int, Field(ge=1)] = 3,
        twin: bool = True,
        window: Annotated[int, Field(ge=1)] | None = None,
        views: Views = 1,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed), share)
        self.texts = min(texts, len(self.weights))
        self.neighbours = neighbours
        self.power = power
        self.rounds = rounds
        self.twin = twin
        self.window = window
        # What differs between classes counts.
        self.emphasis = F.normalize(self.weights.var(0), dim=0)
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """See :meth:`StreamAdapter.empty`; row i of each tensor is image i of the graph."""
        device = self.weights.device
        return {
            "features": self.weights.new_zeros(0, self.weights.shape[1]),
            "texts": torch.zeros(0, self.texts, dtype=torch.long, device=device),
            "text_cosines": self.weights.new_zeros(0, self.texts),
            # Neighbours from the nearest on; a cosine of -1 marks a place that is free.
            "near": torch.zeros(0, self.neighbours, dtype=torch.long, device=device),
            "cosines": self.weights.new_zeros(0, self.neighbours),
            "labels": torch.zeros(0, dtype=torch.long, device=device),
            "values": self.weights.new_zeros(0),
        }

    def fits(self, name: str, expected: Tensor | None, tensor: Tensor | None) -> bool:
        """See :meth:`StreamAdapter.fits`; the number of images is free."""
        if expected is None or tensor is None:
            return False
        return expected.shape[1:] == tensor.shape[1:] and expected.dtype == tensor.dtype

    def many(
        self, features: Tensor, logits: Tensor, confident: Tensor
    ) -> Sequence[tuple[Tensor, Tensor | None]]:
        """See :meth:`StreamAdapter.many`."""
        images = F.normalize(confident_mean(features, confident), dim=1)
        text = (images @ self.weights.T).topk(self.texts, dim=1)
        # From each image, of the graph and of these, to each of these; the weights are on the older.
        known = torch.cat([self.memory["features"], images])
        to_new = (F.normalize(known * self.emphasis, dim=1) @ images.T).T.contiguous()

        answers = []
        dropped = 0
        for number in range(len(images)):
            count = len(self.memory["features"]) + 1
            graph = slice(dropped, dropped + count)
            self.memory["features"] = known[graph]
            cosines = to_new[number, graph]
            self._add(text.indices[number], text.values[number], cosines)
            if self.window is not None and count > self.window:
                self._drop_oldest()
                dropped += 1
                cosines = cosines[1:]

            values = self._spread(*self._edges(cosines))
            answer = values[-1]

            # Next time every image starts from a fifth of its best label.
            best = values[: len(self.memory["features"])].max(1)
            self.memory["values"] = best.values / 5
            self.memory["labels"] = best.indices
            total = answer.sum()
            # An image without any positive cosine is joined with nothing.
            probs = answer / total if float(total) > 0 else logits[number, 0].softmax(0)
            answers.append((probs, None))
        return answers

    def _add(self, texts: Tensor, text_cosines: Tensor, cosines: Tensor) -> None:
        """Put an image, whose feature is there, into the graph and into the lists of those that it is near to.

        Args:
            texts: (K,) its nearest texts.
            text_cosines: (K,).
            cosines: (N + 1,) from each image to this one, the last with itself.
        """
        memory = self.memory
        number = len(cosines) - 1
        near, nearest = _offered(memory["near"], memory["cosines"], cosines[:-1], number)
        own = cosines.topk(min(self.neighbours, len(cosines)))
        missing = self.neighbours - len(own.values)
        memory["near"] = torch.cat([near, F.pad(own.indices, (0, missing))[None]])
        memory["cosines"] = torch.cat([nearest, F.pad(own.values, (0, missing), value=-1.0)[None]])
        memory["texts"] = torch.cat([memory["texts"], texts[None]])
        memory["text_cosines"] = torch.cat([memory["text_cosines"], text_cosines[None]])
        memory["labels"] = F.pad(memory["labels"], (0, 1))
        memory["values"] = F.pad(memory["values"], (0, 1))

    def _edges(self, cosines: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return texts, their cosines, neighbours and their cosines of all images, and of a twin of the last.

        Args:
            cosines: (N,) from each image to the last.
        """
        memory = self.memory
        texts, text_cosines = memory["texts"], memory["text_cosines"]
        if not self.twin:
            return texts, text_cosines, memory["near"], memory["cosines"]

        near, nearest = _offered(memory["near"], memory["cosines"], cosines, len(cosines))
        # The twin sees what the last image sees, and is not kept.
        rows = [texts, text_cosines, near, nearest]
        texts, text_cosines, near, nearest = (torch.cat([part, part[-1:]]) for part in rows)
        return texts, text_cosines, near, nearest

    def _spread(self, texts: Tensor, text_cosines: Tensor, near: Tensor, cosines: Tensor) -> Tensor:
        """Return (N, C) labels of images after all rounds; arguments as :meth:`_edges` returns them."""
        count = len(near)
        classes = len(self.weights)
        to_texts = text_cosines.clamp(min=0) ** self.power
        to_images = (cosines.clamp(min=0) ** self.power) * (cosines > 0)

        # An edge counts for both of its ends.
        degree = to_texts.sum(1) + to_images.sum(1)
        degree.index_add_(0, near.flatten(), to_images.flatten())
        text_degree = to_texts.new_zeros(classes).index_add_(0, texts.flatten(), to_texts.flatten())
        scale = 1 / (degree.sqrt() + _TINY)
        text_scale = 1 / (text_degree.sqrt() + _TINY)

        # Texts are known, so what they give is the same in each round.
        given = to_texts.new_zeros(count, classes)
        given.scatter_(1, texts, to_texts * scale[:, None] * text_scale[texts])
        out, back = _both_ways(near, to_images * scale[:, None] * scale[near])
        images = self._begin(count)
        for _ in range(self.rounds):
            images = torch.addmm(torch.addmm(given, out, images), back, images)
        return images

    def _begin(self, count: int) -> Tensor:
        """Return the (N, C) labels that the rounds begin with: new images have none."""
        start = self.weights.new_zeros(count, len(self.weights))
        rows = torch.arange(len(self.memory["labels"]), device=start.device)
        start[rows, self.memory["labels"]] = self.memory["values"]
        return start

    def _drop_oldest(self) -> None:
        """Leave out image 0, and find another neighbour for those that it was near to."""
        memory = self.memory
        for name in memory:
            memory[name] = memory[name][1:]
        lost = ((memory["near"] == 0) & (memory["cosines"] > -1)).any(1)
        memory["near"] = memory["near"] - 1

        rows = lost.nonzero()[:, 0]
        weighted = F.normalize(memory["features"] * self.emphasis, dim=1)
        # The weights are on the older of two images.
        columns = torch.arange(len(weighted), device=rows.device)
        as_newer = memory["features"][rows] @ weighted.T
        as_older = weighted[rows] @ memory["features"].T
        cosines = torch.where(columns <= rows[:, None], as_newer, as_older)
        best = cosines.topk(min(self.neighbours, cosines.shape[1]), dim=1)
        missing = self.neighbours - best.values.shape[1]
        memory["near"][rows] = F.pad(best.indices, (0, missing))
        memory["cosines"][rows] = F.pad(best.values, (0, missing), value=-1.0)
        memory["near"].clamp_(min=0)


def _offered(near: Tensor, nearest: Tensor, cosines: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return the neighbours of N images after image ``number`` was offered to each, with these (N,) cosines.

    Args:
        near: (N, K) neighbours.
        nearest: (N, K) their cosines, the highest first.
        cosines: (N,).
        number: Of the offered image.
    """
    # Most have nearer ones already.
    rows = (cosines >= nearest[:, -1]).nonzero()[:, 0]
    if not len(rows):
        return near, nearest
    candidates = torch.cat([nearest[rows], cosines[rows, None]], 1)
    numbers = F.pad(near[rows], (0, 1), value=number)
    best = candidates.topk(near.shape[1], dim=1)
    return near.index_copy(0, rows, numbers.gather(1, best.indices)), nearest.index_copy(0, rows, best.values)


def _both_ways(near: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (N, N) sparse W and W^T of (N, K) weights of edges to neighbours."""
    count, degree = near.shape
    targets = near.flatten()
    rows = torch.arange(0, len(targets) + 1, degree, device=near.device)
    order = _sorted_order(targets, count)
    columns = F.pad(targets.bincount(minlength=count).cumsum(0), (1, 0))
    out = (rows, targets, weights.flatten())
    back = (columns, order // degree, weights.flatten()[order])
    first, second = (
        torch.sparse_csr_tensor(*parts, (count, count), check_invariants=False) for parts in (out, back)
    )
    return first, second


def _sorted_order(numbers: Tensor, bound: int) -> Tensor:
    """Return the order in which numbers below a bound rise; equal ones stay as they are."""
    if numbers.device.type != "cpu" or bound > 2**16:
        return numbers.argsort(stable=True)
    # NumPy sorts two bytes by their digits, forty times as fast as torch sorts eight by comparing.
    return torch.from_numpy(numbers.numpy().astype(np.uint16).argsort(kind="stable"))
