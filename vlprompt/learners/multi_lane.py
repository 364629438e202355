"""MULTI-LANE: a lane of prompts for each session beside the frozen image tower; no session touches another's.

Paper: De Min et al., "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning",
CoLLAs 2024, arXiv 2405.15633, sections 3.2 and 3.3. Differs on purpose: the loss is over the session's own classes and
not over zeros for all classes that will ever come; initial values are orthonormal in every lane; the head reads the
class names (``head="text"``), where the authors have a linear layer (``head="linear"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
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
from vlprompt.learners._session_heads import HeadedSessions, HeadKind, orthonormal
from vlprompt.learners._visual import possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["MultiLane"]


class _LaneParameters(nn.Module):
    """What is learned of a session's lane.

    Args:
        selectors: (S, W).
        prompts: (J, 2, M, W).
    """

    def __init__(self, selectors: Tensor, prompts: Tensor) -> None:
        super().__init__()
        self.selectors = nn.Parameter(selectors)
        self.prompts = nn.Parameter(prompts)

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
class MultiLane(HeadedSessions):
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
        head: HeadKind = "text",
        lane_start: Literal["tower", "raw"] = "tower",
        sessions: Sequence[Sequence[str]] | None = None,
        seed: int = 1,
    ) -> None:
        require_lanes(backbone.vision)
        width = backbone.vision.width
        super().__init__(backbone, classnames, templates, sessions, head, width, seed)

        layers = possible_depth(depth, backbone.vision.layers)
        parts = []
        for number in range(len(self.sessions)):
            rng = torch_rng(seed, "lane", number)
            queries = orthonormal((selectors, width), rng) * width**0.5
            parts.append(_LaneParameters(queries, orthonormal((layers, 2, prompts, width), rng)))
        self.lanes = nn.ModuleList(parts)
        self.freeze_earlier(parts)

        # Where a tower pools its patches, nothing has learned to read its class token.
        from_patches = lane_start == "tower" and pools_patches(backbone.vision)
        start = None if from_patches else class_token(backbone.vision, placed=lane_start == "tower")
        self.register_buffer("start", start, persistent=False)

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
        lanes = [self.lane(number).lane for number in self.read_sessions]
        states = run_lanes(tower, images.to(self.device), lanes, self.start)
        return lane_features(tower, states, projected=self.head == "text").flatten(1)

    def begin_session(self) -> None:
        """See :meth:`SessionLearner.begin_session`: the new lane is a copy of the one before."""
        before = self.lane(self.newest - 1)
        newest = self.lane(self.newest)
        newest.selectors.copy_(before.selectors)
        newest.prompts.copy_(before.prompts)
