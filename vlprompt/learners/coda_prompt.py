"""CODA-Prompt: prompts are sums of components, weighted by how an attended image matches each component's key.

Paper: Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual
Learning", CVPR 2023, arXiv 2211.13218, section 4. Differs: components are so many for each session, where the authors
divide a fixed number among sessions whose number must be known; new components stand at right angles to all that the
earlier ones span, where the authors' code takes away their part along each of them alone, which is the same only while
those are at right angles themselves.
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

__all__ = ["CodaPrompt"]


class _Components(nn.Module):
    """A session's components in J blocks.

    Attributes:
        prompts: (J, n, 2, M, W).
        keys: (J, n, d).
        attention: (J, n, d).
    """

    def __init__(self, shape: tuple[int, int, int, int, int], dim: int, rng: torch.Generator) -> None:
        super().__init__()
        layers, count, *_ = shape
        self.prompts = nn.Parameter(torch.randn(shape, generator=rng))
        self.keys = nn.Parameter(torch.randn(layers, count, dim, generator=rng))
        self.attention = nn.Parameter(torch.randn(layers, count, dim, generator=rng))


@LEARNERS.register(
    "coda_prompt",
    summary="incremental: prompts mixed of components, some more for each session",
    paper="2211.13218",
    needs=("vision",),
)
class CodaPrompt(QueriedPrompts):
    """The prompt of an image is the sum of all components, each times cos(query * attention, key).

    Components of earlier sessions are fixed; new ones start at right angles to them (Gram-Schmidt), as far as there are
    directions left.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`HeadedSessions`.
        components: n, components of each session.
        length: Rows of a component: half of them keys, half values.
        depth: J, blocks with prompts, the first ones.
        orthogonality: Weight of a loss that keeps the components of all sessions, their keys and their attention
            vectors at right angles and of unit length; 0, as in the authors' runs.
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
        components: Annotated[int, Field(ge=1)] = 10,
        length: Annotated[int, Field(ge=2, multiple_of=2)] = 8,
        depth: Annotated[int, Field(ge=1)] = 5,
        orthogonality: Annotated[float, Field(ge=0)] = 0.0,
        head: HeadKind = "text",
        sessions: Sequence[Sequence[str]] | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates, sessions, head, seed)
        self.orthogonality = orthogonality
        layers = possible_depth(depth, backbone.vision.layers)
        shape = (layers, components, 2, length // 2, backbone.vision.width)
        parts = [
            _Components(shape, backbone.dim, torch_rng(seed, "components", number))
            for number in range(len(self.sessions))
        ]
        self.parts = nn.ModuleList(parts)
        self.freeze_earlier(parts)
        if len(parts) == 1:
            self.begin_session()

    def begin_session(self) -> None:
        """See :meth:`SessionLearner.begin_session`: the newest components, at right angles to all others."""
        newest = self._part(self.newest)
        earlier = [self._part(number) for number in range(self.newest)]
        with torch.no_grad():
            for block in range(len(newest.prompts)):
                others = [part.prompts[block].flatten(1) for part in earlier]
                newest.prompts[block] = _at_right_angles(newest.prompts[block].flatten(1), others).view_as(
                    newest.prompts[block]
                )
                newest.keys[block] = _at_right_angles(
                    newest.keys[block], [part.keys[block] for part in earlier]
                )
                newest.attention[block] = _at_right_angles(
                    newest.attention[block], [part.attention[block] for part in earlier]
                )

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`QueriedPrompts.loss`; with ``orthogonality``, if it has a weight."""
        losses = super().loss(batch)
        if not self.orthogonality:
            return losses

        parts = [self._part(number) for number in range(len(self.sessions))]
        total = torch.zeros((), device=self.device)
        for name in ("prompts", "keys", "attention"):
            rows = torch.cat([part.get_parameter(name) for part in parts], dim=1).flatten(2)  # (J, all n, D)
            products = rows @ rows.transpose(1, 2)
            total = (
                total + (products - torch.eye(rows.shape[1], device=rows.device)).square().mean((1, 2)).sum()
            )
        return {**losses, "orthogonality": self.orthogonality * total}

    def keys_values(self, query: Tensor, learning: bool) -> Mapping[int, KeysValues]:
        """See :meth:`QueriedPrompts.keys_values`."""
        parts = [self._part(number) for number in range(len(self.sessions))]
        prompts = torch.cat([part.prompts for part in parts], dim=1)  # (J, all n, 2, M, W)
        keys = F.normalize(torch.cat([part.keys for part in parts], dim=1), dim=-1)
        attention = torch.cat([part.attention for part in parts], dim=1)

        attended = F.normalize(query[:, None, None] * attention, dim=-1)  # (B, J, all n, d)
        weights = (attended * keys).sum(-1)
        mixed = torch.einsum("bjn,jnkmw->bjkmw", weights, prompts)
        return {block: KeysValues(mixed[:, block, 0], mixed[:, block, 1]) for block in range(mixed.shape[1])}

    def _part(self, number: int) -> _Components:
        part = self.parts[number]
        assert isinstance(part, _Components)
        return part


def _at_right_angles(rows: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return (n, D) unit rows at right angles to each other and to further rows, as far as D directions go.

    Gram-Schmidt in order, first of the further rows among themselves; a row for which no direction is left keeps the
    one that it was drawn with.
    """
    basis: list[Tensor] = []

    def at_right_angles(row: Tensor) -> Tensor:
        rest = row.clone()
        for _ in range(2):  # once more, for what rounding left
            for other in basis:
                rest = rest - (rest @ other) * other

        if len(basis) == len(row) or bool(rest.norm() <= 1e-4 * row.norm()):
            return F.normalize(row, dim=0)
        basis.append(F.normalize(rest, dim=0))
        return basis[-1]

    for part in others:
        for row in part:
            at_right_angles(row)
    return torch.stack([at_right_angles(row) for row in rows])
