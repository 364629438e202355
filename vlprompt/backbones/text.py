"""The text tower: how prompts become text features, and when the fast path applies.

:meth:`TextTower.encode` gives what a full pass over every padded sentence would give. On a causal tower it
gets there by :mod:`vlprompt.backbones.packed`; :meth:`TextTower.encode_plain` is the obvious pass, used for
towers where sharing would be wrong and as the reference in tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprompt.backbones.layout import PromptLayout, insert_rows
from vlprompt.backbones.packed import Adapter, encode_packed, is_packable_block, run_block
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import BackboneError, VLPromptError

__all__ = ["TextTower"]


class TextTower:
    """The text side of an open_clip model (a view: the parameters stay where they are).

    Args:
        model: ``open_clip.CLIP`` or ``open_clip.CustomTextCLIP``.
        tokenizer: Splits strings into token ids; None if it could not be had.
        missing_tokenizer: Why there is no tokenizer, for the error message.

    Attributes:
        width: Dt, width of token embeddings.
        layers: Number of blocks.
        context_length: Longest sentence in tokens.
        causal: Whether tokens look at earlier tokens only.
        refusal: Why learned context can't enter this tower, or None if it can.
        memory: Bytes of activations above which classes are processed in checkpointed chunks.
    """

    def __init__(
        self, model: nn.Module, tokenizer: TextTokenizer | None, missing_tokenizer: str = ""
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self._missing = missing_tokenizer
        self.memory = 3 << 30
        # CustomTextCLIP keeps the tower in .text, CLIP spreads it over itself
        inner: Any = getattr(model, "text", model)
        self.refusal = _refusal(inner)
        self.context_length = int(getattr(model, "context_length", 77))

        if self.refusal is not None:
            self.width = self.layers = 0
            self.causal = False
            return

        self.embedding: nn.Embedding = inner.token_embedding
        self.positions: nn.Parameter = inner.positional_embedding
        self.blocks: Any = inner.transformer.resblocks
        self.batch_first: bool = getattr(inner.transformer, "batch_first", True)
        self.norm = inner.ln_final
        self.projection = inner.text_projection
        self.causal_mask: Tensor | None = inner.attn_mask
        self.pooling = str(getattr(inner, "pool_type", None) or getattr(inner, "text_pool_type", "argmax"))
        self.width = self.embedding.embedding_dim
        self.layers = len(self.blocks)
        self.causal = self.causal_mask is not None
        # Pooling at the last place of a padded row makes the padding part of the sentence.
        self.packable = (
            self.causal
            and self.pooling in ("argmax", "eos")
            and all(is_packable_block(b) for b in self.blocks)
        )

    def layout(self, sentences: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> PromptLayout:
        """Arrange sentences of token ids and context slots for this tower (see :class:`PromptLayout`).

        Raises:
            BackboneError: If learned context can't enter this tower.
            VLPromptError: If a sentence is too long; the message names its class.
        """
        self.require_prompts()
        return PromptLayout(sentences, self.context_length, names, share_prefix=self.causal)

    def sentence(self, *pieces: str | int) -> list[int]:
        """Return [start, *pieces, end]: strings become token ids, context slots (ints) stay as they are."""
        tokenizer = self.require_tokenizer()
        inner = [s for p in pieces for s in ([p] if isinstance(p, int) else tokenizer.encode(p))]
        return [*tokenizer.start, *inner, *tokenizer.end]

    def require_prompts(self) -> None:
        """Raise BackboneError with the reason if learned context can't enter this tower."""
        if self.refusal is not None:
            raise BackboneError(f"text prompts can't be learned on this backbone: {self.refusal}")

    def require_adapters(self) -> None:
        """Raise BackboneError with the reason if adapters can't enter this tower's blocks."""
        self.require_prompts()
        if odd := next((type(b).__name__ for b in self.blocks if not is_packable_block(b)), None):
            raise BackboneError(
                f"attention can't be adapted on this backbone: its text tower's blocks ({odd}) have no packed "
                "projection of queries, keys and values. Leave the text tower alone."
            )

    def require_tokenizer(self) -> TextTokenizer:
        """Return the tokenizer, or raise BackboneError saying why there is none and what to do."""
        if self.tokenizer is None:
            raise BackboneError(self._missing)
        return self.tokenizer

    def embed_tokens(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Return (..., Dt) frozen token embeddings, without positions; for initialising context from a phrase."""
        self.require_prompts()
        index = torch.as_tensor(ids, dtype=torch.long, device=self.embedding.weight.device)
        return self.embedding(index).detach()

    def encode_strings(self, texts: Sequence[str], batch: int = 4096) -> Tensor:
        """Return (N, d) features of plain strings, not normalised, without gradient; too long ones are cut."""
        tokenizer = self.require_tokenizer()
        if self.refusal is not None:
            device = next(self.model.parameters()).device
            rows = tokenizer.rows(list(texts), self.context_length).to(device)
            with torch.no_grad():
                return torch.cat([self.model.encode_text(part).float() for part in rows.split(256)])

        room = self.context_length - len(tokenizer.start) - len(tokenizer.end)
        sentences = [[*tokenizer.start, *tokenizer.encode(t)[:room], *tokenizer.end] for t in texts]

        with torch.no_grad():
            return torch.cat(
                [self.encode(self.layout(sentences[i : i + batch])) for i in range(0, len(sentences), batch)]
            )

    def encode(
        self,
        layout: PromptLayout,
        context: Tensor | None = None,
        deep: Tensor | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> Tensor:
        """Return text features of every class, not normalised.

        Args:
            layout: The sentences, from :meth:`layout`.
            context: (K, Dt), or (G, K, Dt) for G independent sets (one per image or sample); K >=
                layout.slots.
            deep: (J, K, Dt) or (G, J, K, Dt): before block i = 1..J the states at the places of slot k are
                replaced by ``deep[i - 1, k]`` (MaPLe, Khattak et al. 2023, section 3.2).
            adapters: One per block, or None where there is none: functions of a block's normed input whose
                result is added to its queries, keys and values (see :meth:`require_adapters`).

        Returns:
            (C, d), or (G, C, d) if ``context`` or ``deep`` has a group axis. Float32.

        Raises:
            VLPromptError: If context or deep prompts don't fit the layout or the tower.
        """
        context, deep, grouped = self._check(layout, context, deep)
        if self.packable:
            features = encode_packed(self, layout, context, deep, adapters)
        else:
            features = _encode_plain(self, layout, context, deep, adapters=adapters)
        return features if grouped else features[0]

    def encode_plain(
        self,
        layout: PromptLayout,
        context: Tensor | None = None,
        deep: Tensor | None = None,
        length: int | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> Tensor:
        """Compute :meth:`encode` by a full pass over every sentence, padded to ``length`` (default: what is exact)."""
        context, deep, grouped = self._check(layout, context, deep)
        features = _encode_plain(self, layout, context, deep, length, adapters)
        return features if grouped else features[0]

    def encode_words(
        self, layout: PromptLayout, context: Tensor | None = None, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return every token's state beside the sentences' features; arguments as in :meth:`encode`, without groups.

        Returns:
            (C, T, Dt) states after the final norm, T tokens of the longest sentence, zeros after a sentence's end;
            and (C, d) features. Both float32.
        """
        context, deep, _ = self._check(layout, context, deep)
        x = _run_plain(self, layout, context, deep, self._shortest(layout))
        features = self.project(_pool(self, x, layout))
        places = torch.arange(x.shape[1], device=x.device)
        inside = places < torch.tensor(layout.lengths, device=x.device)[:, None]
        return torch.where(inside[..., None], self.norm(x).float(), 0.0), features

    def _shortest(self, layout: PromptLayout) -> int:
        """Return to how many tokens padded sentences may be cut without changing anything."""
        exact_when_cut = self.causal and self.pooling in ("argmax", "eos")
        return max(layout.lengths) if exact_when_cut else self.context_length

    def assemble(self, sources: Tensor, positions: Tensor, context: Tensor | None) -> Tensor:
        """Return (G or 1, R, Dt) embeddings plus positions of a flat list of R sources."""
        device = self.embedding.weight.device
        sources = sources.to(device)
        positions = positions.to(device)
        x = self.embedding(sources.clamp(min=0))[None]

        if context is not None:
            x = insert_rows(x.to(context.dtype), sources, context)
        return x + self.positions[positions].to(x.dtype)

    def project(self, x: Tensor) -> Tensor:
        """Apply the final norm and the projection into the joint space: (..., Dt) -> (..., d), float32."""
        x = self.norm(x)
        if isinstance(self.projection, nn.Linear):
            return self.projection(x).float()
        return (x if self.projection is None else x @ self.projection).float()

    def _check(
        self, layout: PromptLayout, context: Tensor | None, deep: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        self.require_prompts()
        slots = layout.slots

        available = 0 if context is None else context.shape[-2]
        if slots > available:
            raise VLPromptError(f"the sentences refer to {slots} context vectors, {available} were given.")

        for what, tensor in (("context", context), ("deep prompts", deep)):
            if tensor is not None and tensor.shape[-1] != self.width:
                raise VLPromptError(f"{what} have width {tensor.shape[-1]}, the text tower has {self.width}.")

        if deep is not None and deep.shape[-3] > self.layers - 1:
            raise VLPromptError(
                f"{deep.shape[-3]} layers of deep text prompts, the tower takes at most {self.layers - 1}."
            )

        grouped = (context is not None and context.dim() == 3) or (deep is not None and deep.dim() == 4)
        context = context[None] if context is not None and context.dim() == 2 else context
        deep = deep[None] if deep is not None and deep.dim() == 3 else deep
        return context, deep, grouped


def _refusal(inner: Any) -> str | None:
    kind = type(inner).__name__
    if left_out := getattr(inner, "text_left_out", None):
        return str(left_out)
    if not hasattr(inner, "token_embedding") or not hasattr(getattr(inner, "transformer", None), "resblocks"):
        return (
            f"its text tower ({kind}) keeps its token embeddings and blocks inside another library. "
            "Learners that leave the text tower alone (zero_shot, linear_probe) work."
        )
    if getattr(inner, "cls_emb", None) is not None:
        return (
            f"its text tower ({kind}) pools through a class token appended after the padding (CoCa), so a sentence "
            "has no end of its own. Learners that leave the text tower alone work."
        )

    return None


def _encode_plain(
    tower: TextTower,
    layout: PromptLayout,
    context: Tensor | None,
    deep: Tensor | None,
    length: int | None = None,
    adapters: Sequence[Adapter | None] | None = None,
) -> Tensor:
    """(G, C, d) by running every padded sentence through every block."""
    x = _run_plain(tower, layout, context, deep, length or tower._shortest(layout), adapters)
    return tower.project(_pool(tower, x, layout)).unflatten(0, (-1, len(layout)))


def _run_plain(
    tower: TextTower,
    layout: PromptLayout,
    context: Tensor | None,
    deep: Tensor | None,
    length: int,
    adapters: Sequence[Adapter | None] | None = None,
) -> Tensor:
    """(G * C, T, Dt) states of every padded sentence after every block, before the final norm."""
    pad = tower.tokenizer.pad if tower.tokenizer is not None else 0
    sources = layout.padded(length, pad)
    classes = len(layout)
    x = tower.assemble(sources.flatten(), torch.arange(length).repeat(classes), context)
    groups = max(len(x), 1 if deep is None else len(deep))
    x = x.expand(groups, -1, -1).reshape(groups * classes, length, tower.width)
    mask = None if tower.causal_mask is None else tower.causal_mask[:length, :length].to(x.dtype)

    for i, block in enumerate(tower.blocks):
        if deep is not None and 1 <= i <= deep.shape[1]:
            flat = insert_rows(x.reshape(groups, classes * length, -1), sources.flatten(), deep[:, i - 1])
            x = flat.reshape(groups * classes, length, -1)
        if adapters is not None and (adapter := adapters[i]) is not None:
            x = run_block(block, x, adapter, mask)
        elif tower.batch_first:
            x = block(x, attn_mask=mask)
        else:
            x = block(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)

    return x


def _pool(tower: TextTower, x: Tensor, layout: PromptLayout) -> Tensor:
    """(G * C, Dt) states that stand for their sentences."""
    if tower.pooling == "last":
        return x[:, -1]
    if tower.pooling == "first":
        return x[:, 0]
    ends = torch.tensor(layout.lengths, device=x.device).repeat(len(x) // len(layout)) - 1
    return x[torch.arange(len(x), device=x.device), ends]
