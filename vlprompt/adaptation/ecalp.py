"""ECALP: labels spread from texts to images over a graph that grows with the stream.

Paper: Li et al., "Efficient and Context-Aware Label Propagation for Zero-/Few-Shot Training-Free Adaptation of
    Vision-Language Model", ICLR 2025, arXiv 2412.18303, section 3.

As in the published code, the image that is named stands in the graph twice (``twin``), and an image's weighted cosines
with a new one are taken with the weights on the older. Where this differs: that code's answer is softmax(10,000 y),
here it is y / sum(y); negative cosines count as 0, where an even power would make them large; and nothing is left in
global variables.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["LabelPropagation"]

_TINY = 1e-6  # added to the square roots of degrees
_GROWS = ("features", "near", "cosines", "labels", "values")


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

    def one(self, features: Tensor, logits: Tensor, confident: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`StreamAdapter.one`."""
        feature = F.normalize(features[confident].mean(0), dim=0)
        self._add(feature)
        if self.window is not None and len(self.memory["features"]) > self.window:
            self._drop_oldest()

        near, cosines = (
            self._with_twin(feature) if self.twin else (self.memory["near"], self.memory["cosines"])
        )
        values = self._spread(near, cosines)
        answer = values[-1]

        # Next time every image starts from a fifth of its best label.
        best = values[: len(self.memory["features"])].max(1)
        self.memory["values"] = best.values / 5
        self.memory["labels"] = best.indices
        total = answer.sum()
        # An image without any positive cosine is joined with nothing.
        return (answer / total if float(total) > 0 else logits[0].softmax(0)), None

    def _add(self, feature: Tensor) -> None:
        """Put an image into the graph, and into the lists of those that it is near to."""
        memory = self.memory
        known = torch.cat([memory["features"], feature[None]])
        to_new = F.normalize(known * self.emphasis, dim=1) @ feature  # from each image, itself last

        near, cosines = self._offered(to_new[:-1], len(known) - 1)
        own = to_new.topk(min(self.neighbours, len(known)))
        missing = self.neighbours - len(own.values)
        memory["near"] = torch.cat([near, F.pad(own.indices, (0, missing))[None]])
        memory["cosines"] = torch.cat([cosines, F.pad(own.values, (0, missing), value=-1.0)[None]])
        memory["features"] = known
        memory["labels"] = F.pad(memory["labels"], (0, 1))
        memory["values"] = F.pad(memory["values"], (0, 1))

    def _offered(self, cosines: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return the neighbours of all images after image ``number`` was offered to each, with these (N,) cosines."""
        numbers = torch.full_like(self.memory["near"][:, :1], number)
        candidates = torch.cat([self.memory["cosines"], cosines[:, None]], 1)
        best = candidates.topk(self.neighbours, dim=1)
        return torch.cat([self.memory["near"], numbers], 1).gather(1, best.indices), best.values

    def _with_twin(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return neighbours and cosines of all images and of a twin of the last, which are not kept."""
        memory = self.memory
        count = len(memory["features"])
        to_new = F.normalize(memory["features"] * self.emphasis, dim=1) @ feature
        near, cosines = self._offered(to_new, count)
        # The twin sees what the last image sees.
        return torch.cat([near, near[-1:]]), torch.cat([cosines, cosines[-1:]])

    def _spread(self, near: Tensor, cosines: Tensor) -> Tensor:
        """Return (N, C) labels of images after all rounds."""
        classes = len(self.weights)
        count = len(near)
        features = self.memory["features"]
        if count > len(features):
            features = torch.cat([features, features[-1:]])

        text = (features @ self.weights.T).topk(self.texts, dim=1)
        targets = torch.cat([text.indices, near + classes], 1)
        weights = torch.cat([text.values, cosines], 1).clamp(min=0) ** self.power
        weights = torch.cat([weights[:, : self.texts], weights[:, self.texts :] * (cosines > 0)], 1)

        sources = classes + torch.arange(count, device=near.device)[:, None].expand_as(targets)
        ends = torch.stack([sources.flatten(), targets.flatten()])
        flat = weights.flatten()
        degree = flat.new_zeros(classes + count).index_add(0, ends[0], flat).index_add(0, ends[1], flat)
        inverse = 1 / (degree.sqrt() + _TINY)
        flat = flat * inverse[ends[0]] * inverse[ends[1]]

        both = torch.cat([ends, ends.flip(0)], 1)
        graph = torch.sparse_coo_tensor(both, torch.cat([flat, flat]), (classes + count, classes + count))
        known = torch.eye(classes, device=near.device)
        images = self._begin(count)
        for _ in range(self.rounds):
            images = torch.sparse.mm(graph, torch.cat([known, images]))[classes:]
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
        for name in _GROWS:
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
