"""The text tower: how prompts become text features, and when the fast path applies.

:meth:`TextTower.encode` gives what a full pass over every padded sentence would give. On a causal tower of open_clip's
it gets there by :mod:`vlprompt.backbones.packed`; :meth:`TextTower.encode_plain` is the obvious pass, used for towers
where sharing would be wrong and as the reference in tests and benchmarks. Which tower a model has is found by
:func:`vlprompt.backbones.text_towers.build_text_tower`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlprompt.backbones.attention import Projections
from vlprompt.backbones.edits import (
    Adapter,
    check_keys_values,
    edit_of,
    entered_tokens,
    keys_values_sets,
    norms_of,
)
from vlprompt.backbones.layout import DeepPrompts, PromptLayout, Slots, add_rows, insert_rows
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import BackboneError, VLPromptError
from vlprompt.core.shares import Division, division

__all__ = ["TextTower"]

# Sentences in one pass without gradient; packed, they take no padding and share their beginnings.
_PACKED_BATCH = 4096
_PLAIN_BATCH = 256

# Classes per process below which dividing them saves less than the processes' meeting takes.
_FEWEST_CLASSES = 64


class TextTower:
    """The text side of an open_clip model (a view: the parameters stay where they are).

    This class is a tower that nothing is known of: strings go through the model's own ``encode_text``, learned context
    can't enter. The towers that it can enter derive from it.

    Args:
        model: ``open_clip.CLIP``, ``open_clip.CustomTextCLIP`` or ``open_clip.CoCa``.
        tokenizer: Splits strings into token ids; None if it could not be had.
        missing_tokenizer: Why there is no tokenizer, for the error message.

    Attributes:
        width: Dt, width of token embeddings.
        layers: Number of blocks.
        context_length: Longest sentence in tokens.
        causal: Whether tokens look at earlier tokens only.
        packable: Whether sentences are packed and their beginnings shared.
        refusal: Why learned context can't enter this tower, or None if it can.
        memory: Bytes of activations above which classes are processed in checkpointed chunks.
        attention: The projections that adapters join, one per block; empty if there are none.
    """

    width: int = 0
    layers: int = 0
    causal: bool = False
    packable: bool = False
    refusal: str | None = None

    embedding: nn.Embedding
    norm: Any
    projection: Any
    blocks: Any
    attention: list[Projections]

    def __init__(
        self, model: nn.Module, tokenizer: TextTokenizer | None, missing_tokenizer: str = ""
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self._missing = missing_tokenizer
        self.memory = 3 << 30
        # CustomTextCLIP keeps the tower in .text, CLIP spreads it over itself
        self.inner: Any = getattr(model, "text", model)
        self.context_length = int(getattr(model, "context_length", 0)) or 77
        self.attention = []
        self.blocks = ()
        self.connect()

    def connect(self) -> None:
        """Find the tower's parts; here: say why there are none that a prompt could enter."""
        left_out = getattr(self.inner, "text_left_out", None)
        self.refusal = (
            str(left_out)
            if left_out
            else (
                f"its text tower ({type(self.inner).__name__}) shows neither token embeddings nor blocks. What works "
                "here: learners that leave the text tower alone (vpt, clip_adapter, tip_adapter, linear_probe)."
            )
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the tower computes in; learned context is cast to it where it enters."""
        return self.embedding.weight.dtype

    def layout(
        self,
        sentences: Sequence[Sequence[int]],
        names: Sequence[str] | None = None,
        share_prefix: bool = True,
    ) -> PromptLayout:
        """Arrange sentences of token ids and context slots for this tower (see :class:`PromptLayout`).

        Args:
            sentences: C lists of sources.
            names: What to call them in error messages.
            share_prefix: Run a common beginning once, if the tower is causal.

        Raises:
            BackboneError: If learned context can't enter this tower.
            VLPromptError: If a sentence is too long; the message names its class.
        """
        self.require_prompts()
        layout = PromptLayout(sentences, self.context_length, names, share_prefix and self.causal)
        if self.packable:
            _ = layout.tiles  # made now: what is made while a graph is traced belongs to the graph
        return layout

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
        if not self.attention:
            odd = type(self.blocks[0]).__name__
            raise BackboneError(
                f"attention can't be adapted on this backbone: its text tower's blocks ({odd}) have no layers that "
                "project queries, keys and values. Leave the text tower alone (clip_lora: encoder=vision)."
            )

    def require_edits(self) -> None:
        """Raise BackboneError with the reason if this tower's blocks can't be edited (see :class:`BlockEdit`)."""
        self.require_prompts()
        raise BackboneError(
            f"the text tower's blocks can't be edited on this backbone: {self._odd_blocks()}. What works here: "
            "learners of context (coop, kgcoop) and clip_lora."
        )

    def require_entering_tokens(self) -> None:
        """Raise BackboneError with the reason if no token can enter between this tower's blocks."""
        self.require_edits()

    def block_norms(self) -> list[tuple[nn.LayerNorm, nn.LayerNorm]]:
        """Return the norms before attention and before the MLP of every block (see :meth:`require_edits`)."""
        return [norms for norms in map(norms_of, self.blocks) if norms is not None]

    def outer_norms(self) -> list[nn.LayerNorm]:
        """Return the norm after the last block, if there is one."""
        norm = self.final_norm()
        return [norm] if isinstance(norm, nn.LayerNorm) else []

    def _odd_blocks(self) -> str:
        kinds = sorted({type(block).__name__ for block in self.blocks}) or [type(self.inner).__name__]
        return f"its blocks ({', '.join(kinds)}) are not open_clip's own"

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

    def encode_strings(self, texts: Sequence[str], batch: int | None = None) -> Tensor:
        """Return (N, d) features of plain strings, not normalised, without gradient; too long ones are cut.

        Args:
            texts: The strings.
            batch: How many in one pass; None: what suits the tower.
        """
        tokenizer = self.require_tokenizer()
        if self.refusal is not None:
            device = next(self.model.parameters()).device
            rows = tokenizer.rows(list(texts), self.context_length).to(device)
            with torch.no_grad():
                return torch.cat([self.model.encode_text(part).float() for part in rows.split(_PLAIN_BATCH)])

        room = self.context_length - len(tokenizer.start) - len(tokenizer.end)
        sentences = [[*tokenizer.start, *tokenizer.encode(t)[:room], *tokenizer.end] for t in texts]

        batch = batch or (_PACKED_BATCH if self.packable else _PLAIN_BATCH)
        with torch.no_grad():
            parts = [sentences[i : i + batch] for i in range(0, len(sentences), batch)]
            return torch.cat([self.encode(self.layout(part)) for part in parts])

    def encode(
        self,
        layout: PromptLayout,
        context: Tensor | None = None,
        deep: Tensor | Mapping[int, Tensor] | None = None,
        adapters: Sequence[Adapter | None] | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Return text features of every class, not normalised.

        Args:
            layout: The sentences, from :meth:`layout`.
            context: (K, Dt), or (G, K, Dt) for G independent sets (one per image or sample); K >=
                layout.slots.
            deep: (J, K, Dt) or (G, J, K, Dt): before block i = 1..J the states at the places of slot k < K are
                replaced by ``deep[i - 1, k]`` (MaPLe, Khattak et al. 2023, section 3.2). For chosen blocks: number of
                the block, from 1, to (K, Dt) or (G, K, Dt). Slots from K on keep their states; slots that each class
                has to itself (``c * M + m``) take prompts that differ between classes.
            adapters: One per entry of ``attention``, or None where there is none: functions of what its attention
                reads, whose result is added to queries, keys and values (see :meth:`require_adapters`); or edits of
                the blocks (see :class:`vlprompt.backbones.edits.BlockEdit` and :meth:`require_edits`).
            offsets: (K, Dt) or (G, K, Dt), added to the frozen embeddings of the tokens that have their numbers in the
                layout, before positions; K >= layout.offset_count.

        Returns:
            (C, d), or (G, C, d) if ``context``, ``deep``, ``offsets`` or keys and values of an edit have a group axis.
            Float32.

        In a training step of several processes each encodes its share of the classes, if there are at least 64 for
        every process and no groups, and what they encode is gathered with its gradient.

        Raises:
            VLPromptError: If context or deep prompts don't fit the layout or the tower.
        """
        context, blocks, grouped = self._check(layout, context, deep, adapters, offsets)
        offsets = offsets[None] if offsets is not None and offsets.dim() == 2 else offsets
        # A traced graph belongs to one process.
        divided = None if torch.compiler.is_compiling() else division()

        learned = (context, offsets, *blocks.values())
        if divided is None or grouped or not _is_worth_dividing(divided, layout, learned, adapters):
            features = self.run(layout, context, blocks, adapters, offsets)
            return features if grouped else features[0]

        own = layout.part(divided.part(len(layout)))
        return divided.gather(self.run(own, context, blocks, adapters, offsets)[0], len(layout))

    def encode_plain(
        self,
        layout: PromptLayout,
        context: Tensor | None = None,
        deep: Tensor | Mapping[int, Tensor] | None = None,
        length: int | None = None,
        adapters: Sequence[Adapter | None] | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Compute :meth:`encode` by a full pass over every sentence, padded to ``length`` (default: what is exact)."""
        context, blocks, grouped = self._check(layout, context, deep, adapters, offsets)
        offsets = offsets[None] if offsets is not None and offsets.dim() == 2 else offsets
        pooled, _ = self.run_plain(
            layout, context, blocks, length or self.shortest(layout), adapters, offsets
        )
        features = self.project(pooled).unflatten(0, (-1, len(layout)))
        return features if grouped else features[0]

    def encode_words(
        self,
        layout: PromptLayout,
        context: Tensor | None = None,
        deep: Tensor | Mapping[int, Tensor] | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return every token's state beside the sentences' features; arguments as in :meth:`encode`, without groups.

        Returns:
            (C, T, Dt) states after the final norm, T tokens of the longest sentence, zeros after a sentence's end;
            and (C, d) features. Both float32. K tokens that edits brought along stand behind the first token, so that T
            is larger by K.
        """
        context, blocks, _ = self._check(layout, context, deep, adapters)
        pooled, x = self.run_plain(layout, context, blocks, self.shortest(layout), adapters)
        places = torch.arange(x.shape[1], device=x.device) - entered_tokens(adapters)
        inside = places < torch.tensor(layout.lengths, device=x.device)[:, None]
        return torch.where(inside[..., None], self.final_norm()(x).float(), 0.0), self.project(pooled)

    def run(
        self,
        layout: PromptLayout,
        context: Tensor | None,
        deep: DeepPrompts,
        adapters: Sequence[Adapter | None] | None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Return (G, C, d) features in the fastest way that is exact; arguments as of :meth:`encode`, with groups."""
        pooled, _ = self.run_plain(layout, context, deep, self.shortest(layout), adapters, offsets)
        return self.project(pooled).unflatten(0, (-1, len(layout)))

    def shortest(self, layout: PromptLayout) -> int:
        """Return to how many tokens padded sentences may be cut without changing anything."""
        raise NotImplementedError

    def run_plain(
        self,
        layout: PromptLayout,
        context: Tensor | None,
        deep: DeepPrompts,
        length: int,
        adapters: Sequence[Adapter | None] | None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run every sentence, padded to ``length`` tokens, through every block; arguments as of :meth:`encode`.

        Returns:
            (G * C, Dt) states that stand for the sentences and (G * C, T, Dt) states of their tokens, both before the
            final norm.
        """
        raise NotImplementedError

    def spread(
        self, x: Tensor, layout: PromptLayout, deep: DeepPrompts, length: int, groups: int = 1
    ) -> Tensor:
        """Return (G * C, T, Dt) states, one row for each group and sentence, of (G or 1, C * T, Dt) embeddings.

        Args:
            x: The embeddings.
            layout: The C sentences, padded to T tokens.
            deep: Deep prompts of chosen blocks, which may have groups.
            length: T.
            groups: Of what else enters.
        """
        groups = max(groups, x.shape[0], *(rows.shape[0] for rows in deep.values()))
        return x.expand(groups, -1, -1).reshape(groups * len(layout), length, self.width)

    def padded_sources(self, layout: PromptLayout, length: int) -> Tensor:
        """Return (C, T) sources of the sentences, padded as the tokenizer pads."""
        return layout.padded(length, self.tokenizer.pad if self.tokenizer is not None else 0)

    def embed(
        self,
        sources: Tensor,
        slots: Slots,
        context: Tensor | None,
        offsets: tuple[Slots, Tensor] | None = None,
    ) -> Tensor:
        """Return (G or 1, R, Dt) embeddings of a flat list of R sources and its slots, without positions."""
        sources = sources.to(self.embedding.weight.device)
        x = self.embedding(sources.clamp(min=0))[None].to(self.dtype)
        if offsets is not None:
            x = add_rows(x, *offsets)
        return x if context is None else insert_rows(x, slots, context)

    def final_norm(self) -> nn.Module:
        """Return the final norm by itself: a hidden layer behind it (``photo``) belongs to the projection."""
        norm: nn.Module = self.norm[0] if isinstance(self.norm, nn.Sequential) else self.norm
        return norm

    def project(self, x: Tensor) -> Tensor:
        """Apply the final norm and the projection into the joint space: (..., Dt) -> (..., d), float32."""
        x = self.norm(x)
        if self.projection is None:
            return x.float()
        return (self.projection(x) if isinstance(self.projection, nn.Module) else x @ self.projection).float()

    def _check(
        self,
        layout: PromptLayout,
        context: Tensor | None,
        deep: Tensor | Mapping[int, Tensor] | None,
        adapters: Sequence[Adapter | None] | None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor | None, DeepPrompts, bool]:
        """Return context and deep prompts with a group axis, and whether one of them came with it."""
        self.require_prompts()
        slots = layout.slots

        available = 0 if context is None else context.shape[-2]
        if slots > available:
            raise VLPromptError(f"the sentences refer to {slots} context vectors, {available} were given.")

        available = 0 if offsets is None else offsets.shape[-2]
        if layout.offset_count > available:
            raise VLPromptError(
                f"the sentences refer to {layout.offset_count} offsets, {available} were given."
            )

        blocks = _by_block(deep)
        deep_rows = [("deep prompts", rows) for rows in blocks.values()]
        for what, tensor in [("context", context), ("offsets", offsets), *deep_rows]:
            if tensor is not None and tensor.shape[-1] != self.width:
                raise VLPromptError(f"{what} have width {tensor.shape[-1]}, the text tower has {self.width}.")

        if blocks and entered_tokens(adapters):
            raise VLPromptError("deep text prompts can't be combined with tokens that enter between blocks.")
        if isinstance(deep, Tensor) and len(blocks) > self.layers - 1:
            raise VLPromptError(
                f"{len(blocks)} layers of deep text prompts, the tower takes at most {self.layers - 1}."
            )
        outside = [block for block in blocks if not 1 <= block < self.layers]
        if outside:
            raise VLPromptError(
                f"deep text prompts before block {outside[0]}, the tower takes them before blocks 1 to "
                f"{self.layers - 1}."
            )

        edits = [edit_of(adapter) for adapter in adapters or ()]
        if any(edit.changes_attention for edit in edits):
            self.require_edits()
            check_keys_values(edits, self.width)
        grouped = keys_values_sets(adapters) is not None or any(
            tensor is not None and tensor.dim() == 3 for tensor in (context, offsets, *blocks.values())
        )
        context = context[None] if context is not None and context.dim() == 2 else context
        blocks = {block: rows if rows.dim() == 3 else rows[None] for block, rows in blocks.items()}
        return context, blocks, grouped


def _by_block(deep: Tensor | Mapping[int, Tensor] | None) -> dict[int, Tensor]:
    """Return the prompts of each block, of those of blocks 1 to J in one tensor or as they are."""
    if deep is None:
        return {}
    if isinstance(deep, Tensor):
        return dict(enumerate(deep.unbind(-3), 1))
    return dict(deep)


def _is_worth_dividing(
    divided: Division,
    layout: PromptLayout,
    learned: Sequence[Tensor | None],
    adapters: Sequence[Adapter | None] | None,
) -> bool:
    """Return whether the classes of a pass that learns are many enough to be divided among processes."""
    learns = adapters is not None or any(t is not None and t.requires_grad for t in learned)
    return learns and torch.is_grad_enabled() and len(layout) >= _FEWEST_CLASSES * divided.count
