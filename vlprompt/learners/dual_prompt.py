"""DualPrompt: prompts that all sessions share, and one of each session, picked by the nearest key.

Paper: Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022, arXiv
2204.04799, section 4; sizes and blocks as in Smith et al., arXiv 2211.13218, section 5. A session has one key, as in
the paper; Smith et al.'s code has one in each block, and adds their losses up over images and blocks.
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

__all__ = ["DualPrompt"]


class _Expert(nn.Module):
    """A session's own prompts: (J, 2, M, W), and the (d,) key by which images find them."""

    def __init__(self, prompts: Tensor, key: Tensor) -> None:
        super().__init__()
        self.prompts = nn.Parameter(prompts)
        self.key = nn.Parameter(key)


@LEARNERS.register(
    "dual_prompt",
    summary="incremental: shared prompts, and one set per session that images pick",
    paper="2204.04799",
    needs=("vision",),
)
class DualPrompt(QueriedPrompts):
    """In training a session's own prompts are used; afterwards each image takes those whose key is nearest.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`HeadedSessions`.
        general_length: Rows of the shared prompt: half of them keys, half values.
        general_blocks: First blocks, which have the shared prompt.
        expert_length: Rows of a session's prompt.
        expert_blocks: Blocks behind those, which have the session's.
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
        general_length: Annotated[int, Field(ge=2, multiple_of=2)] = 6,
        general_blocks: Annotated[int, Field(ge=0)] = 2,
        expert_length: Annotated[int, Field(ge=2, multiple_of=2)] = 20,
        expert_blocks: Annotated[int, Field(ge=1)] = 3,
        head: HeadKind = "text",
        sessions: Sequence[Sequence[str]] | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates, sessions, head, seed)
        width = backbone.vision.width
        end = possible_depth(general_blocks + expert_blocks, backbone.vision.layers)
        self.first = min(general_blocks, end - 1)

        rng = torch_rng(seed, "dual prompt")
        shared = torch.rand(self.first, 2, general_length // 2, width, generator=rng) * 2e-2 - 1e-2
        self.shared = nn.Parameter(shared) if self.first else None

        experts = []
        for number in range(len(self.sessions)):
            own = torch_rng(seed, "expert", number)
            prompts = torch.rand(end - self.first, 2, expert_length // 2, width, generator=own) * 2e-2 - 1e-2
            experts.append(_Expert(prompts, torch.rand(backbone.dim, generator=own) * 2 - 1))
        self.experts = nn.ModuleList(experts)
        self.freeze_earlier(experts)

    def keys_values(self, query: Tensor, learning: bool) -> Mapping[int, KeysValues]:
        """See :meth:`QueriedPrompts.keys_values`."""
        picked = {}
        for block, (keys, values) in enumerate(() if self.shared is None else self.shared):
            picked[block] = KeysValues(keys, values)

        chosen = torch.full((query.shape[0],), self.newest, device=query.device)
        if not learning:
            chosen = (query @ self._keys().T).argmax(1)
        prompts = torch.stack([self._expert(number).prompts for number in range(len(self.sessions))])[chosen]
        for place, (keys, values) in enumerate(part.unbind(1) for part in prompts.unbind(1)):
            picked[self.first + place] = KeysValues(keys, values)
        return picked

    def key_loss(self, query: Tensor) -> Tensor:
        """See :meth:`QueriedPrompts.key_loss`: the distance of the newest key (Wang et al., equation 5)."""
        return 1 - (query @ self._keys()[self.newest]).mean()

    def _keys(self) -> Tensor:
        """Return (sessions, d) of unit length."""
        return F.normalize(torch.stack([self._expert(n).key for n in range(len(self.sessions))]), dim=-1)

    def _expert(self, number: int) -> _Expert:
        expert = self.experts[number]
        assert isinstance(expert, _Expert)
        return expert
