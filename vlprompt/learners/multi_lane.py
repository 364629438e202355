"""MULTI-LANE: a lane of prompts for each session beside the frozen image tower; no session touches another's.

Paper: De Min et al., "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning",
CoLLAs 2024, arXiv 2405.15633, sections 3.2 and 3.3. Differs on purpose: the loss is over the session's own classes and
not over zeros for all classes that will ever come; initial values are orthonormal in every lane; the head reads the
class names (``head="text"``), where the authors have a linear layer (``head="linear"``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.lanes import (
    BlockInputs,
    Lane,
    block_inputs,
    class_token,
    lane_features,
    pools_patches,
    require_lanes,
    run_lanes,
)
from vlprompt.backbones.vision import Images
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import LEARNERS
from vlprompt.learners._sessions import SessionLearner
from vlprompt.learners._visual import possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.hooks import TrainingSamples
from vlprompt.learners.recipe import Recipe

__all__ = ["MultiLane"]

_SURVEYED = 4  # batches that the start of the bias looks at


class _LaneParameters(nn.Module):
    """What is learned in one session.

    Args:
        selectors: (S, W).
        prompts: (J, 2, M, W).
        scale: Of the cosine.
        weight: (C_t, W) of a linear head; None with a text head.
        classes: C_t.
    """

    weight: nn.Parameter | None

    def __init__(
        self, selectors: Tensor, prompts: Tensor, scale: float, weight: Tensor | None, classes: int
    ) -> None:
        super().__init__()
        self.selectors = nn.Parameter(selectors)
        self.prompts = nn.Parameter(prompts)
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.bias = nn.Parameter(torch.zeros(1 if weight is None else classes))
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))

    @property
    def lane(self) -> Lane:
        """As the tower runs it."""
        return Lane(self.selectors, self.prompts)


@LEARNERS.register(
    "multi_lane",
    summary="incremental: a lane of selectors and prompts per session beside the tower",
    paper="2405.15633",
    needs=("vision",),
)
class MultiLane(SessionLearner):
    """Each session has a class token that reads mixtures of the frozen tokens and learned keys and values.

    The logit of a class is that of its session's lane: scale * cosine(lane feature, class vector) + bias, with a scale
    and a bias for each lane. A class that no session had is named by the newest lane (text head only).

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Sentences whose features make the class vectors of the text head.
        selectors: S, mixtures of tokens that a lane reads in each block.
        prompts: M, learned keys and values in each prompted block.
        depth: J, blocks with prompts, the first ones, at most all there are.
        head: ``text``: class vectors are the texts' features; ``linear``: they are learned, as in the authors' code.
        lane_start: ``tower``: the lane's class token begins with its position, or at the mean of the patches where the
            tower's feature is their mean; ``raw``: the class token without position, as in the authors' code.
        sessions: Classes by session, see :class:`SessionLearner`.
        seed: Of the random start of the first lane; each later one begins as a copy of the one before.

    Raises:
        BackboneError: If lanes can't run beside the backbone's image tower.
    """

    static_images = False
    start: Tensor | None
    recipe = Recipe({"lr": 0.05, "batch_size": 256, "epochs": 30, "optimizer": "adam", "weight_decay": 0.0})

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        selectors: Annotated[int, Field(ge=1, le=64)] = 10,
        prompts: Annotated[int, Field(ge=1, le=64)] = 10,
        depth: Annotated[int, Field(ge=1)] = 5,
        head: Literal["text", "linear"] = "text",
        lane_start: Literal["tower", "raw"] = "tower",
        sessions: Sequence[Sequence[str]] | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates, sessions)
        require_lanes(backbone.vision)
        self.class_bound = head == "linear"
        self.head = head

        width = backbone.vision.width
        layers = possible_depth(depth, backbone.vision.layers)
        parts = []
        for number, names in enumerate(self.sessions):
            rng = torch_rng(seed, "lane", number)
            queries = _orthonormal((selectors, width), rng) * width**0.5
            keys = _orthonormal((layers, 2, prompts, width), rng)
            weight = _orthonormal((len(names), width), rng) if head == "linear" else None
            parts.append(_LaneParameters(queries, keys, backbone.logit_scale, weight, len(names)))
        self.lanes = nn.ModuleList(parts)
        self.freeze_earlier(parts)

        # Where a tower pools its patches, nothing has learned to read its class token.
        from_patches = lane_start == "tower" and pools_patches(backbone.vision)
        start = None if from_patches else class_token(backbone.vision, placed=lane_start == "tower")
        self.register_buffer("start", start, persistent=False)
        texts = backbone.class_weights(self.classnames, self.templates) if head == "text" else torch.zeros(0)
        self.register_buffer("texts", texts, persistent=False)

        places = [place or (len(parts) - 1, -1) for place in self.session_places()]
        self.read_lanes = sorted({session for session, _ in places})
        lane_of = [self.read_lanes.index(session) for session, _ in places]
        self.register_buffer("lane_of", torch.tensor(lane_of), persistent=False)  # (C,) among read_lanes
        self.places = places

    def lane(self, number: int) -> _LaneParameters:
        """Return what was learned in a session, counted from 0."""
        part = self.lanes[number]
        assert isinstance(part, _LaneParameters)
        return part

    # --- images

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: all of the tower is frozen, and lanes read every block."""
        return 1 + self.backbone.vision.layers

    @torch.no_grad()
    def frozen_states(self, images: Tensor) -> BlockInputs:
        """See :meth:`Learner.frozen_states`: what every block reads."""
        return block_inputs(self.backbone.vision, images.to(self.device))

    def embed_images(self, images: Images) -> Tensor:
        """Return (B, T * d) features of the lanes that the classes need, one after the other."""
        tower = self.backbone.vision
        lanes = [self.lane(number).lane for number in self.read_lanes]
        states = run_lanes(tower, images.to(self.device), lanes, self.start)
        return lane_features(tower, states, projected=self.head == "text").flatten(1)

    # --- the classifier

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`: those of the texts."""
        return self.get_buffer("texts") if self.head == "text" else super().class_embeddings()

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; those of a linear head are (C, W)."""
        if self.head == "text":
            return self.get_buffer("texts")
        weights = [self.lane(session).weight for session, _ in self.places]
        rows = [w[row] for w, (_, row) in zip(weights, self.places, strict=True) if w is not None]
        return F.normalize(torch.stack(rows), dim=-1)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of what :meth:`embed_images` returned: of each class by the lane of its session."""
        lanes = [self.lane(number) for number in self.read_lanes]
        features = F.normalize(embeddings.unflatten(1, (len(lanes), -1)), dim=-1)
        lane_of = self.get_buffer("lane_of")

        cosines = torch.einsum("btd,cd->btc", features, self._weights())
        cosines = cosines.gather(1, lane_of.expand(len(cosines), 1, -1)).squeeze(1)
        scales = torch.cat([lane.log_scale for lane in lanes]).exp()[lane_of]
        return scales * cosines + self._biases()

    def survey(self, sources: Sequence[TrainingSamples]) -> None:
        """See :meth:`LearnerHooks.survey`: the newest bias starts where the mean logit is 0."""
        newest = self.lane(len(self.sessions) - 1)
        if self.read_lanes != [len(self.sessions) - 1]:
            return

        with torch.no_grad():
            newest.bias.zero_()
            means = [
                self.batch_logits(batch).mean()
                for source in sources
                for batch in islice(source.first_epoch(), _SURVEYED)
            ]
            newest.bias.fill_(-float(torch.stack(means).mean()))

    def begin_session(self) -> None:
        """See :meth:`SessionLearner.begin_session`: the new lane is a copy of the one before."""
        before = self.lane(len(self.sessions) - 2)
        newest = self.lane(len(self.sessions) - 1)
        newest.selectors.copy_(before.selectors)
        newest.prompts.copy_(before.prompts)

    def _biases(self) -> Tensor:
        """Return (C,) biases: one for each lane, or one for each class."""
        rows = [self.lane(session).bias[row if self.head == "linear" else 0] for session, row in self.places]
        return torch.stack(rows)


def _orthonormal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Return rows of unit length that stand at right angles to each other in every matrix of the last two axes."""
    *outer, rows, width = shape
    drawn = torch.randn(*outer, width, rows, generator=rng)
    return torch.linalg.qr(drawn).Q.transpose(-1, -2).contiguous()
