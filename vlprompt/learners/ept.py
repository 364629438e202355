"""EPT, a reconstruction: decomposed prompts whose context reads the offsets and is mixed out of several subspaces.

Paper: Lan et al., "Efficient Prompt Tuning by Multi-Space Projection and Prompt Fusion", arXiv 2405.11464.

The paper's ideas, in equations and sizes of ours: neither code nor sizes are public. What is measured with this
learner are no results of EPT's. With P (M, Dt) the context and B (r, Dt) the offsets' matrix of ``dept``:

    fusion      P1 = P + softmax((P Wq) (B Wk)^T / sqrt(h)) (B Wv) Wo
    projection  Z_k = P1 + act(P1 D_k) U_k,  k = 1 .. K
    gate        g = softmax(mean of P1's rows G / T)
    context     sum_k g_k Z_k

Nothing of it depends on a sentence or an image: :meth:`EPT.fold` returns the ``dept`` that says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Position
from vlprompt.learners._offsets import OffsetOptions
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.dept import DePT
from vlprompt.learners.recipe import Recipe

__all__ = ["EPT", "PromptFusion"]

_SPREAD = 0.02  # standard deviation of random starts, as of the context


class PromptFusion(nn.Module):
    """Makes a context of a context and the offsets' matrix; at the start it changes nothing.

    Args:
        width: Dt.
        spaces: K.
        inner: h.
        fuses: Whether the context reads the offsets' matrix.
        by_row: Whether each vector has a gate of its own, instead of one for all.
        activation: Between the projections.
        temperature: T of the gate.
        generator: Draws all that does not start at 0.
    """

    def __init__(
        self,
        width: int,
        *,
        spaces: int,
        inner: int,
        fuses: bool,
        by_row: bool,
        activation: Literal["gelu", "relu"],
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.by_row = by_row
        self.activation = activation
        self.temperature = temperature

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(shape[-2] ** -0.5 * torch.randn(shape, generator=generator))

        self.attention = nn.ParameterDict()
        if fuses:
            self.attention.update({name: drawn(width, inner) for name in ("query", "key", "value")})
            self.attention["out"] = nn.Parameter(torch.zeros(inner, width))
        self.down = drawn(spaces, width, inner)
        self.up = nn.Parameter(torch.zeros(spaces, inner, width))
        self.gate = nn.Parameter(torch.zeros(width, spaces))

    def forward(self, context: Tensor, matrix: Tensor) -> Tensor:
        """Return the (M, Dt) context that enters the sentences, of (M, Dt) and (r, Dt)."""
        context = self.fused(context, matrix)
        act = F.gelu if self.activation == "gelu" else F.relu
        spaces = context + act(context @ self.down) @ self.up  # (K, M, Dt)
        return torch.einsum("mk,kmd->md", self.gates(context).expand(len(context), -1), spaces)

    def fused(self, context: Tensor, matrix: Tensor) -> Tensor:
        """Return the context after it has read the offsets' matrix."""
        if not self.attention:
            return context
        query = context @ self.attention["query"]
        key = matrix @ self.attention["key"]
        weights = (query @ key.T / query.shape[-1] ** 0.5).softmax(-1)
        return context + weights @ (matrix @ self.attention["value"]) @ self.attention["out"]

    def gates(self, context: Tensor) -> Tensor:
        """Return (1 or M, K) weights of the subspaces, which sum to 1."""
        read = context if self.by_row else context.mean(0, keepdim=True)
        return (read @ self.gate / self.temperature).softmax(-1)


@LEARNERS.register(
    "ept",
    summary="dept whose context reads its offsets, mixed of subspaces (reconstruction)",
    paper="2405.11464",
    needs=("text",),
)
class EPT(DePT):
    """Decomposed prompts with a :class:`PromptFusion`; it starts as ``dept`` does, and folds into it.

    The matrix B of offsets starts at random and A at 0, the reverse of ``dept``, since the context reads B from the
    first step on. By token A and B start as there.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        context_length: See :class:`DePT`.
        budget: See :class:`DePT`; the numbers of fusion and projection come on top, many more than it holds.
        position: See :class:`DePT`.
        init: See :class:`DePT`.
        spaces: K, subspaces.
        width: h, width of fusion and projections.
        fusion: Whether the context reads the offsets' matrix.
        gate: One for the whole ``prompt``, or one per ``row``.
        activation: Between the projections.
        temperature: T of the gate.
        seed: Of all random starts.
        offsets: See :class:`OffsetOptions`.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        ConfigError: If the budget leaves nothing for offsets.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.002, "batch_size": 32}, epochs_by_shots=((1, 50), (2, 100), (8, 200)))

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        budget: Annotated[int, Field(ge=1, le=1024)] = 16,
        position: Position = "end",
        init: str = "",
        spaces: Annotated[int, Field(ge=1, le=64)] = 4,
        width: Annotated[int, Field(ge=1)] = 16,
        fusion: bool = True,
        gate: Literal["prompt", "row"] = "prompt",
        activation: Literal["gelu", "relu"] = "gelu",
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(
            backbone,
            classnames,
            templates,
            context_length=context_length,
            budget=budget,
            position=position,
            init=init,
            seed=seed,
            **offsets,
        )
        self.position: Position = position
        self.fusion = PromptFusion(
            backbone.text.width,
            spaces=spaces,
            inner=width,
            fuses=fusion,
            by_row=gate == "row",
            activation=activation,
            temperature=temperature,
            generator=torch_rng(seed, "ept"),
        )

        assert self.offsets is not None  # dept always has some
        if self.offsets.mode != "token":
            matrix = self.offsets.right
            with torch.no_grad():
                self.offsets.left.zero_()
                matrix.copy_(_SPREAD * torch.randn(matrix.shape, generator=torch_rng(seed, "ept", "matrix")))

    def fused_context(self) -> Tensor:
        """Return the (M, Dt) context that enters the sentences."""
        assert self.offsets is not None
        return self.fusion(self.context, self.offsets.right)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self._encode(self.fused_context())

    def figures(self) -> dict[str, float]:
        """Return the gate's entropy in nats, the mean of its rows; log K where all subspaces count alike."""
        assert self.offsets is not None
        with torch.no_grad():
            gates = self.fusion.gates(self.fusion.fused(self.context, self.offsets.right))
        return {"gate_entropy": float(torch.special.entr(gates).sum(-1).mean())}

    def fold(self) -> DePT:
        """Return the ``dept`` with the context that enters the sentences, which costs as much as any."""
        shared: OffsetOptions = {
            name: value for name, value in self.options.items() if name.startswith("offset_")
        }  # type: ignore[assignment]  # the options were checked
        folded = DePT(
            self.backbone,
            self.classnames,
            self.templates,
            context_length=len(self.context),
            position=self.position,
            **shared,
        )
        folded.method = "dept"
        state = {name: t for name, t in self.trainable_state().items() if not name.startswith("fusion.")}
        state["context"] = self.fused_context().detach()
        folded.to(self.backbone.device).load_trainable_state(state)
        folded.train(self.training)
        return folded
