"""ECALP: labels spread from texts to images over a graph that grows with the stream.

Paper: Li et al., "Efficient and Context-Aware Label Propagation for Zero-/Few-Shot Training-Free Adaptation of
    Vision-Language Model", ICLR 2025, arXiv 2412.18303, section 3.

As in the published code, the image that is named stands in the graph twice (``twin``), and an image's weighted cosines
with a new one are taken with the weights on the older. Where this differs: that code's answer is softmax(10,000 y),
here it is y / sum(y); negative cosines count as 0, where an even power would make them large; and nothing is left in
global variables.

With S the diagonal of 1 / sqrt(degree), a round Y' = S (E + E^T) S Y + S T is X' = S^2 ((E + E^T) X + T) for X = S Y.
So the edges E keep their weights from image to image, and only those that an image moves are written.
"""

from __future__ import annotations

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

_TINY = 1e-6  # added to the square roots of degrees
_LEAST_LENGTH = 1e-12
_SUM = 0  # torch's number for it


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
            # Of the features with emphasis.
            "lengths": self.weights.new_zeros(0),
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
        emphasised = images * self.emphasis
        lengths = torch.linalg.vector_norm(emphasised, dim=1).clamp(min=_LEAST_LENGTH)
        graph = _Graph(self, images, lengths)
        # From each image, of the graph and of these, to each of these; the weights are on the older.
        to_new = emphasised @ graph.features.T / graph.lengths

        answers = []
        for number, parts in enumerate(zip(text.indices, text.values, to_new, strict=True)):
            answer = graph.add(*parts)
            total = answer.sum()
            # An image without any positive cosine is joined with nothing.
            probs = answer / total if float(total) > 0 else logits[number, 0].softmax(0)
            answers.append((probs, None))
        self.memory = graph.memory()
        return answers


class _Graph:
    """The graph while some images come. Images behind the window keep their rows until all have come.

    Args:
        adapter: Its memory is the start.
        images: (B, d) unit-length features that will come.
        lengths: (B,) of the features with emphasis.

    Attributes:
        features: (N + B, d), also of the images that will come.
        lengths: (N + B,).
    """

    def __init__(self, adapter: LabelPropagation, images: Tensor, lengths: Tensor) -> None:
        self.adapter = adapter
        memory = adapter.memory
        self.features = torch.cat([memory["features"], images])
        self.lengths = torch.cat([memory["lengths"], lengths])
        # One row more for the twin.
        more = len(images) + 1
        self.texts = F.pad(memory["texts"], (0, 0, 0, more))
        self.text_cosines = F.pad(memory["text_cosines"], (0, 0, 0, more))
        self.near = F.pad(memory["near"], (0, 0, 0, more))
        self.cosines = F.pad(memory["cosines"], (0, 0, 0, more), value=-1.0)
        self.labels = F.pad(memory["labels"], (0, more))
        self.values = F.pad(memory["values"], (0, more))

        # Weights of edges; all but a few stay as they are when an image comes.
        self.to_texts = self.text_cosines.clamp(min=0) ** adapter.power
        self.to_images = self._weights(self.cosines)
        numbers = torch.arange(len(self.near) + 1, device=images.device)
        self.sources = numbers[:-1].repeat_interleave(adapter.neighbours)
        self.starts = numbers * adapter.neighbours
        self.first = 0
        self.end = len(memory["features"])

    def memory(self) -> dict[str, Tensor]:
        """Return what stays of the graph, see :meth:`LabelPropagation.empty`."""
        kept = slice(self.first, self.end)
        return {
            "features": self.features[kept],
            "lengths": self.lengths[kept],
            "texts": self.texts[kept],
            "text_cosines": self.text_cosines[kept],
            "near": self._numbers(self.end),
            "cosines": self.cosines[kept],
            "labels": self.labels[kept],
            "values": self.values[kept],
        }

    def add(self, texts: Tensor, text_cosines: Tensor, cosines: Tensor) -> Tensor:
        """Put the next image into the graph, pass labels on, and return its (C,) labels; their sum may be anything.

        Args:
            texts: (K,) its nearest texts.
            text_cosines: (K,).
            cosines: (N + B,) from each image to this one.
        """
        number = self.end
        self.end += 1
        self._offer(cosines, number)
        self.texts[number] = texts
        self.text_cosines[number] = text_cosines
        self.to_texts[number] = text_cosines.clamp(min=0) ** self.adapter.power
        self._join(number, cosines)
        if self.adapter.window is not None and self.end - self.first > self.adapter.window:
            self._drop_oldest(cosines)

        if not self.adapter.twin:
            return self._spread(self.end)

        # The twin sees what the image sees; it and its places in the lists of others are not kept.
        rows = self._takers(cosines, self.end)
        places = rows * self.adapter.neighbours + (self.adapter.neighbours - 1)
        near, weights = self.near.view(-1), self.to_images.view(-1)
        before = near.index_select(0, places), weights.index_select(0, places)
        near.index_fill_(0, places, self.end)
        weights.index_copy_(0, places, self._weights(cosines.index_select(0, rows)))
        for part in (self.texts, self.to_texts, self.near, self.to_images):
            part[self.end] = part[number]

        answer = self._spread(self.end + 1)
        near.index_copy_(0, places, before[0])
        weights.index_copy_(0, places, before[1])
        return answer

    def _takers(self, cosines: Tensor, number: int) -> Tensor:
        """Return the images before ``number`` to which it is as near as the last of their neighbours, or nearer.

        Args:
            cosines: (N + B,) from each image to it.
            number: Of an image, or of a twin.
        """
        rows = (cosines[self.first : number] >= self.cosines[self.first : number, -1]).nonzero()[:, 0]
        return rows + self.first if self.first else rows

    def _offer(self, cosines: Tensor, number: int) -> None:
        """Put an image into the lists of those before it, in the place of the last; arguments as :meth:`_takers`."""
        rows = self._takers(cosines, number)
        if not len(rows):
            return
        values = self.cosines.index_select(0, rows)
        values[:, -1] = cosines.index_select(0, rows)
        numbers = self.near.index_select(0, rows)
        numbers[:, -1] = number
        values, order = values.sort(dim=1, descending=True, stable=True)
        self._write(rows, numbers.gather(1, order), values)

    def _join(self, number: int, cosines: Tensor) -> None:
        """Give an image its nearest images, itself among them; arguments as :meth:`_offer`."""
        best = cosines[self.first : number + 1].topk(min(self.adapter.neighbours, number + 1 - self.first))
        missing = self.adapter.neighbours - len(best.values)
        near = best.indices + self.first
        values = best.values
        if missing:
            near = F.pad(near, (0, missing))
            values = F.pad(values, (0, missing), value=-1.0)
        self.near[number] = near
        self.cosines[number] = values
        self.to_images[number] = self._weights(values)

    def _drop_oldest(self, cosines: Tensor) -> None:
        """Leave out the first image, and find another neighbour for those that it was near to.

        Args:
            cosines: (N + B,) from each image to the latest.
        """
        near = self.near[self.first + 1 : self.end]
        lost = ((near == self.first) & (self.cosines[self.first + 1 : self.end] > -1)).any(1)
        self.first += 1
        rows = lost.nonzero()[:, 0]
        if not len(rows):
            return

        # The weights are on the older of two images.
        features = self.features[self.first : self.end]
        lengths = self.lengths[self.first : self.end]
        columns = torch.arange(len(features), device=rows.device)
        older = torch.where(columns <= rows[:, None], lengths, lengths[rows, None])
        candidates = (features[rows] * self.adapter.emphasis) @ features.T / older
        # The latest and its twin must be equally near, to the last bit.
        candidates[:, -1] = cosines[self.first : self.end].index_select(0, rows)
        best = candidates.topk(min(self.adapter.neighbours, len(features)), dim=1)
        missing = self.adapter.neighbours - best.values.shape[1]
        values = F.pad(best.values, (0, missing), value=-1.0)
        numbers = F.pad(best.indices + self.first, (0, missing))
        self._write(rows + self.first, numbers, values)

    def _spread(self, end: int) -> Tensor:
        """Pass labels on among the images before ``end``, keep the best of each, and return the (C,) of the last."""
        kept = slice(self.first, end)
        texts, to_texts = self.texts[kept], self.to_texts[kept]
        near, to_images = self._numbers(end), self.to_images[kept]
        count, classes = len(near), len(self.adapter.weights)
        targets = near.flatten()
        order = _sorted_order(targets, count)
        # Edges by their source, and by their target: numbers of the other end, weights, and where a row begins.
        out = (targets, to_images.flatten(), self.starts[: count + 1])
        ends = targets.bincount(minlength=count).cumsum(0)
        back = (self.sources.index_select(0, order), out[1].index_select(0, order), F.pad(ends, (1, 0)))

        # An edge counts for both of its ends.
        degree = to_texts.sum(1).add_(to_images.sum(1)).index_add_(0, targets, out[1])
        text_degree = to_texts.new_zeros(classes).index_add_(0, texts.flatten(), to_texts.flatten())
        lengths = degree.sqrt_().add_(_TINY)
        text_lengths = text_degree.sqrt_().add_(_TINY)
        squares = lengths.square().reciprocal_()[:, None]

        # Texts are known, so what they give is the same in each round.
        from_texts = to_texts / text_lengths.index_select(0, texts.flatten()).view_as(texts)
        given = to_texts.new_zeros(count, classes).scatter_(1, texts, from_texts.mul_(squares))
        # An image that is new has the value 0.
        labels = torch.zeros_like(given).scatter_(1, self.labels[kept, None], self.values[kept, None])
        labels.div_(lengths[:, None])
        for _ in range(self.adapter.rounds):
            passed = _passed(labels, *out).add_(_passed(labels, *back))
            labels = torch.addcmul(given, squares, passed)

        # Next time every image starts from a fifth of its best label.
        count = self.end - self.first
        best, values = _best(labels[:count])
        self.labels[self.first : self.end] = best
        self.values[self.first : self.end] = values.mul_(lengths[:count]).div_(5)
        return labels[-1] * lengths[-1]

    def _numbers(self, end: int) -> Tensor:
        """Return the (N, K) neighbours of images before ``end``, counted from the first that is not left out."""
        near = self.near[self.first : end]
        return (near - self.first).clamp_(min=0) if self.first else near

    def _weights(self, cosines: Tensor) -> Tensor:
        """Return the weights of edges to images from cosines."""
        weights = cosines.clamp(min=0) ** self.adapter.power
        # To the power of 0, also a cosine of 0 is 1.
        return weights if self.adapter.power else weights * (cosines > 0)

    def _write(self, rows: Tensor, near: Tensor, cosines: Tensor) -> None:
        """Set (R, K) neighbours of (R,) images and their cosines, the highest first."""
        self.near.index_copy_(0, rows, near)
        self.cosines.index_copy_(0, rows, cosines)
        self.to_images.index_copy_(0, rows, self._weights(cosines))


def _passed(labels: Tensor, numbers: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Return (N, C) weighted sums of (N, C) labels; row i takes the edges ``starts[i]`` to ``starts[i + 1]``."""
    return torch.embedding_bag(
        labels, numbers, starts, per_sample_weights=weights, mode=_SUM, include_last_offset=True
    )[0]


def _best(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (N,) best columns of rows, and the values there."""
    if labels.device.type != "cpu":
        values, best = labels.max(1)
        return best, values
    # NumPy finds it three times as fast.
    best = torch.from_numpy(labels.numpy().argmax(1))
    return best, labels.gather(1, best[:, None])[:, 0]


def _sorted_order(numbers: Tensor, bound: int) -> Tensor:
    """Return the order in which numbers below a bound rise; equal ones stay as they are."""
    if numbers.device.type != "cpu" or bound > 2**16:
        return numbers.argsort(stable=True)
    # NumPy sorts two bytes by their digits, forty times as fast as torch sorts eight by comparing.
    return torch.from_numpy(numbers.numpy().astype(np.uint16).argsort(kind="stable"))
