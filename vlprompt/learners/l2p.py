"""L2P: a pool of prompts, of which each image picks those whose keys are nearest to it.

Paper: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, arXiv 2112.08654, section 4. As "L2P++" of
Smith et al., "CODA-Prompt", CVPR 2023, arXiv 2211.13218, section 5: prompts are keys and values in front of a block's
own. The choice is each image's own; the authors' first code lets a batch vote, which gives its session away. So is the
pull on the keys; in Smith et al.'s code an image also pulls the keys that others of its batch have chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import KeysValues
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import LEARNERS
from vlprompt.learners._session_heads import HeadKind
from vlprompt.learners._session_prompts import QueriedPrompts
from vlprompt.learners._visual import possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES

__all__ = ["L2P"]


@LEARNERS.register(
    "l2p",
    summary="incremental: a pool of prompts that each image picks from",
    paper="2112.08654",
    needs=("vision",),
)
class L2P(QueriedPrompts):
    """The pool goes on learning from session to session; heads of earlier sessions are fixed.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`HeadedSessions`.
        pool: P, prompts in the pool.
        length: Rows of a prompt: half of them keys, half values.
        top: Prompts that an image picks.
        depth: Blocks with prompts, the first ones; the same prompts are picked in all.
        head: See :class:`HeadedSessions`.
        sessions: Classes by session, see :class:`SessionLearner`.
        seed: Of the random start.

    Raises:
        BackboneError: If keys and values can't enter the backbone's image tower.
    """

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        pool: Annotated[int, Field(ge=1)] = 30,
        length: Annotated[int, Field(ge=2, multiple_of=2)] = 20,
        top: Annotated[int, Field(ge=1)] = 5,
        depth: Annotated[int, Field(ge=1)] = 1,
        head: HeadKind = "text",
        sessions: Sequence[Sequence[str]] | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates, sessions, head, seed)
        self.top = min(top, pool)

        rng = torch_rng(seed, "l2p")
        layers = possible_depth(depth, backbone.vision.layers)
        shape = (layers, pool, 2, length // 2, backbone.vision.width)
        self.prompts = nn.Parameter(torch.rand(shape, generator=rng) * 2e-2 - 1e-2)
        self.keys = nn.Parameter(torch.rand(pool, backbone.dim, generator=rng) * 2 - 1)

    def keys_values(self, query: Tensor, learning: bool) -> Mapping[int, KeysValues]:
        """See :meth:`QueriedPrompts.keys_values`: the chosen prompts, one after the other."""
        chosen = self._similarities(query).topk(self.top, dim=1).indices  # (B, top)
        picked = {}
        for block, prompts in enumerate(self.prompts):
            keys, values = prompts[chosen].unbind(2)  # (B, top, length / 2, W)
            picked[block] = KeysValues(keys.flatten(1, 2), values.flatten(1, 2))
        return picked

    def key_loss(self, query: Tensor) -> Tensor:
        """See :meth:`QueriedPrompts.key_loss`: the distance of the chosen keys (Wang et al., equation 5)."""
        return (1 - self._similarities(query).topk(self.top, dim=1).values).sum(1).mean()

    def _similarities(self, query: Tensor) -> Tensor:
        """Return (B, P) cosines."""
        return query @ F.normalize(self.keys, dim=-1).T
