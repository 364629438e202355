"""The text towers that learned context can enter: open_clip's own (CLIP, SigLIP, MobileCLIP), CoCa's, transformers'."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from vlprompt.backbones.attention import adapted, projections_in
from vlprompt.backbones.edits import (
    Adapter,
    attention_parts,
    edit_of,
    enter_tokens,
    entered_tokens,
    keys_values_sets,
)
from vlprompt.backbones.layout import DeepPrompts, PromptLayout, Slots, insert_rows
from vlprompt.backbones.packed import Offsets, encode_packed, is_packable_block, run_block
from vlprompt.backbones.text import TextTower
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.backbones.vision import weights_dtype
from vlprompt.core.errors import BackboneError

__all__ = ["CoCaTower", "HuggingFaceTower", "OwnTower", "build_text_tower"]

log = logging.getLogger("vlprompt.backbones")

_TESTED = "3.0 to 3.3"  # versions of open_clip whose blocks are packed


def build_text_tower(
    model: nn.Module, tokenizer: TextTokenizer | None, missing_tokenizer: str = ""
) -> TextTower:
    """Return the text side of an open_clip model, as what it is seen to be; arguments as of :class:`TextTower`."""
    inner: Any = getattr(model, "text", model)
    kind = TextTower
    if hasattr(inner, "token_embedding") and hasattr(getattr(inner, "transformer", None), "resblocks"):
        masks_padding = getattr(inner, "cls_emb", None) is not None or getattr(inner, "use_pad_mask", False)
        kind = CoCaTower if masks_padding else OwnTower
    elif hasattr(getattr(inner, "transformer", None), "get_input_embeddings") and hasattr(inner, "pooler"):
        kind = HuggingFaceTower
    return kind(model, tokenizer, missing_tokenizer)


class OwnTower(TextTower):
    """A text transformer of open_clip's own blocks.

    Attributes:
        positions: (T, Dt) learned positions.
        pooling: Which token stands for a sentence: ``argmax`` and ``eos`` (its end), ``first`` or ``last``.
    """

    def connect(self) -> None:
        """See :meth:`TextTower.connect`."""
        inner = self.inner
        self.embedding = inner.token_embedding
        self.positions: nn.Parameter = inner.positional_embedding
        self.blocks = inner.transformer.resblocks
        self.batch_first: bool = getattr(inner.transformer, "batch_first", True)
        self.norm = inner.ln_final
        self.projection = inner.text_projection
        self.causal_mask: Tensor | None = inner.attn_mask
        self.pooling = str(getattr(inner, "pool_type", None) or getattr(inner, "text_pool_type", "argmax"))
        self.width = self.embedding.embedding_dim
        self.layers = len(self.blocks)
        self.causal = self.causal_mask is not None

        places = [projections_in(block) for block in self.blocks]
        self.attention = [p[0] for p in places] if all(len(p) == 1 for p in places) else []
        self.packable = self._is_packable()

    def _is_packable(self) -> bool:
        # Pooling at the last place of a padded row makes the padding part of the sentence.
        if not (self.causal and self.pooling in ("argmax", "eos")):
            return False

        odd = sorted({type(block).__name__ for block in self.blocks if not is_packable_block(block)})
        if odd:
            _warn_once(
                f"this text tower is causal, but its blocks ({', '.join(odd)}) are not those of open_clip {_TESTED} "
                f"(installed: {open_clip.__version__}), so its sentences are not packed: the text side of coop and its "
                "relatives is several times slower, with the same result."
            )
        return not odd

    @property
    def dtype(self) -> torch.dtype:
        """See :meth:`TextTower.dtype`."""
        return weights_dtype(self.blocks)

    def run(
        self,
        layout: PromptLayout,
        context: Tensor | None,
        deep: DeepPrompts,
        adapters: Sequence[Adapter | None] | None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`TextTower.run`."""
        # Tokens that are brought along stand in the shared beginning, if there is one.
        if self.packable and (layout.shared or not entered_tokens(adapters)):
            return encode_packed(self, layout, context, deep, adapters, offsets)
        return super().run(layout, context, deep, adapters, offsets)

    def require_edits(self) -> None:
        """See :meth:`TextTower.require_edits`."""
        self.require_prompts()
        if not all(is_packable_block(block) for block in self.blocks):
            super().require_edits()

    def require_entering_tokens(self) -> None:
        """See :meth:`TextTower.require_entering_tokens`: a causal tower whose sentences have a start and an end."""
        self.require_edits()
        if not (self.causal and self.pooling in ("argmax", "eos") and self.require_tokenizer().start):
            raise BackboneError(
                "tokens can't enter between the blocks of this backbone's text tower: they stand behind a sentence's "
                f"start, and this tower is no causal one that reads its sentences' ends (it pools {self.pooling!r}). "
                "What works here: learners of context (coop, kgcoop) and clip_lora."
            )

    def shortest(self, layout: PromptLayout) -> int:
        """See :meth:`TextTower.shortest`."""
        exact_when_cut = self.causal and self.pooling in ("argmax", "eos")
        return max(layout.lengths) if exact_when_cut else self.context_length

    def assemble(
        self,
        sources: Tensor,
        slots: Slots,
        positions: Tensor,
        context: Tensor | None,
        offsets: Offsets | None = None,
    ) -> Tensor:
        """Return (G or 1, R, Dt) embeddings, with offsets, plus positions of a flat list of R sources and its slots."""
        x = self.embed(sources, slots, context, offsets)
        return x + self.positions[positions.to(x.device)].to(x.dtype)

    def begin(
        self,
        layout: PromptLayout,
        context: Tensor | None,
        deep: DeepPrompts,
        length: int,
        adapters: Sequence[Adapter | None] | None,
        offsets: Tensor | None,
    ) -> Tensor:
        """Return (G * C, T, Dt) states before the first block: embeddings and context with their positions."""
        sources = self.padded_sources(layout, length)
        positions = torch.arange(length).repeat(len(layout))
        added = None if offsets is None else (layout.padded_offsets(length), offsets)
        x = self.assemble(sources.flatten(), layout.padded_slots(length), positions, context, added)
        return self.spread(x, layout, deep, length, keys_values_sets(adapters) or 1)

    def run_plain(
        self,
        layout: PromptLayout,
        context: Tensor | None,
        deep: DeepPrompts,
        length: int,
        adapters: Sequence[Adapter | None] | None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`TextTower.run_plain`."""
        x = self.begin(layout, context, deep, length, adapters, offsets)

        mask = None if self.causal_mask is None else self.causal_mask[:length, :length].to(x.dtype)
        x = self.run_blocks(x, mask, layout, deep, adapters)
        return self._pool(x, layout, entered_tokens(adapters)), x

    def run_blocks(
        self,
        x: Tensor,
        mask: Tensor | None,
        layout: PromptLayout,
        deep: DeepPrompts,
        adapters: Sequence[Adapter | None] | None,
    ) -> Tensor:
        """Run (G * C, R, Dt) states through all blocks.

        Args:
            x: Tokens, and perhaps more after them.
            mask: Added to attention's logits: (R, R), or (G * C, 1, R, R) if sentences differ.
            layout: The C sentences.
            deep: Deep prompts of chosen blocks.
            adapters: See :meth:`TextTower.encode`.
        """
        slots = layout.padded_slots(x.shape[1])
        hooked = adapters is not None and any(place.layers for place in self.attention)
        has_tokens = False
        with adapted(self.attention, attention_parts(adapters or ())) if hooked else nullcontext():
            for i, block in enumerate(self.blocks):
                if i in deep:
                    x = _replace(x, len(layout), slots, deep[i])
                edit = edit_of(None if hooked or adapters is None else adapters[i])
                x = enter_tokens(x, edit, at=1, is_first=not has_tokens)
                if edit.tokens is not None and not has_tokens:
                    has_tokens = True
                    mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=x.dtype, device=x.device).triu(
                        1
                    )
                if edit.keys_values is not None:
                    edit = replace(edit, keys_values=edit.keys_values.repeated(len(layout)))
                x = self._run(block, x, mask, edit if edit.changes_block else None)
        return x

    def _run(self, block: Any, x: Tensor, mask: Tensor | None, adapter: Adapter | None) -> Tensor:
        by_sentence = mask is not None and mask.dim() == 4
        if adapter is not None or (by_sentence and is_packable_block(block)):
            return run_block(block, x, adapter, mask)
        if mask is not None and by_sentence:
            mask = mask[:, 0].repeat_interleave(int(block.attn.num_heads), 0)

        if self.batch_first:
            return block(x, attn_mask=mask)
        return block(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)

    def _pool(self, x: Tensor, layout: PromptLayout, brought: int = 0) -> Tensor:
        """(G * C, Dt) states that stand for their sentences; ``brought`` tokens have entered behind the first."""
        if self.pooling == "last":
            return x[:, -1]
        if self.pooling == "first":
            return x[:, 0]
        ends = torch.tensor(layout.lengths, device=x.device).repeat(x.shape[0] // len(layout)) - 1 + brought
        return x[torch.arange(x.shape[0], device=x.device), ends]


class CoCaTower(OwnTower):
    """A text transformer of open_clip's own blocks that masks padding, with or without CoCa's appended class token.

    The class token stands behind the padding and reads the sentence alone, so it stands right behind the longest
    sentence here, with the position of its own place.
    """

    def connect(self) -> None:
        """See :meth:`TextTower.connect`."""
        super().connect()
        self.cls: nn.Parameter | None = self.inner.cls_emb
        self.context_length = min(self.context_length, len(self.positions) - (self.cls is not None))

    def _is_packable(self) -> bool:
        return False

    def require_entering_tokens(self) -> None:
        """See :meth:`TextTower.require_entering_tokens`."""
        raise BackboneError(
            "tokens can't enter between the blocks of this backbone's text tower: it masks padding by its place. What "
            "works here: learners of context (coop, kgcoop) and clip_lora."
        )

    def shortest(self, layout: PromptLayout) -> int:
        """See :meth:`TextTower.shortest`."""
        if self.cls is None and self.pooling == "last":
            return self.context_length
        # The published mask is off by one place (see below), so the first padding token counts.
        return min(max(layout.lengths) + 1, self.context_length)

    def run_plain(
        self,
        layout: PromptLayout,
        context: Tensor | None,
        deep: DeepPrompts,
        length: int,
        adapters: Sequence[Adapter | None] | None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`TextTower.run_plain`."""
        sources = self.padded_sources(layout, length)
        x = self.begin(layout, context, deep, length, adapters, offsets)
        groups = x.shape[0] // len(layout)

        if self.cls is not None:
            token = (self.cls + self.positions[self.context_length]).to(x.dtype)
            x = torch.cat([x, token.expand(x.shape[0], 1, -1)], dim=1)

        mask = self._mask(sources.to(x.device), x.dtype).repeat(groups, 1, 1, 1)
        x = self.run_blocks(x, mask, layout, deep, adapters)
        if self.cls is None:
            return self._pool(x, layout), x
        return x[:, -1], x[:, :-1]

    def _mask(self, sources: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (C, 1, R, R) for (C, T) sources: 0 where a token may look, else minus infinity."""
        valid = sources != self.inner.pad_id
        length = sources.shape[1]

        if self.cls is not None and getattr(self.inner, "correct_cls_mask", False):
            valid = torch.cat([valid, valid.new_ones(len(valid), 1)], dim=1)
        elif self.cls is not None:
            # Published weights were trained with the class token's entry in front, which shifts the others by one. Its
            # entry is then that of the row's last token, which is padding wherever rows were cut.
            last = valid[:, -1:] if length == self.context_length else valid.new_zeros(len(valid), 1)
            valid = torch.cat([valid.new_ones(len(valid), 1), valid[:, :-1], last], dim=1)

        size = valid.shape[1]
        mask = torch.zeros(len(valid), 1, size, size, dtype=dtype, device=sources.device)
        mask = mask.masked_fill(~valid[:, None, None, :], float("-inf"))
        return mask if self.causal_mask is None else mask + self.causal_mask[:size, :size].to(mask)


class HuggingFaceTower(TextTower):
    """An encoder of the transformers library (BERT, XLM-RoBERTa, mT5, NLLB) with open_clip's pooler and projection.

    Context enters through ``inputs_embeds``, deep prompts in front of the encoder's layers. Padding is masked, so
    sentences are as long as the longest of them.
    """

    def connect(self) -> None:
        """See :meth:`TextTower.connect`."""
        transformer = self.inner.transformer
        self.embedding = transformer.get_input_embeddings()
        self.norm = nn.Identity()
        self.projection = self.inner.proj
        self.width = int(self.embedding.embedding_dim)
        self.pad = self.inner.config.pad_token_id

        encoder = getattr(transformer, "encoder", transformer)
        lists = [m for m in encoder.children() if isinstance(m, nn.ModuleList)]
        self.blocks = lists[0] if lists else ()
        self.layers = len(self.blocks)
        places = [projections_in(block) for block in self.blocks]
        self.attention = [p[0] for p in places] if all(len(p) == 1 for p in places) else []
        self.context_length = self._context_length()

    def _context_length(self) -> int:
        """Return the tokenizer's row length, at most what the encoder has positions for."""
        config = self.inner.config
        wanted = (None if self.tokenizer is None else self.tokenizer.context_length) or 77
        positions = int(getattr(config, "max_position_embeddings", 0) or 0)
        if not positions:  # relative positions, as mT5's
            return wanted
        # RoBERTa counts positions from behind the padding token's number.
        table = getattr(getattr(self.inner.transformer, "embeddings", None), "position_embeddings", None)
        offset = 0 if table is None or table.padding_idx is None else table.padding_idx + 1
        return min(wanted, positions - offset)

    def shortest(self, layout: PromptLayout) -> int:
        """See :meth:`TextTower.shortest`."""
        masked = self.tokenizer is not None and self.tokenizer.pad == self.pad
        return max(layout.lengths) if masked else self.context_length

    def run_plain(
        self,
        layout: PromptLayout,
        context: Tensor | None,
        deep: DeepPrompts,
        length: int,
        adapters: Sequence[Adapter | None] | None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`TextTower.run_plain`."""
        sources = self.padded_sources(layout, length)
        slots = layout.padded_slots(length)
        added = None if offsets is None else (layout.padded_offsets(length), offsets)
        x = self.spread(self.embed(sources.flatten(), slots, context, added), layout, deep, length)
        groups = x.shape[0] // len(layout)
        mask = (sources != self.pad).long().to(x.device).repeat(groups, 1)

        with ExitStack() as stack:
            if adapters is not None:
                stack.enter_context(adapted(self.attention, attention_parts(adapters)))
            for block, rows in deep.items():
                hook = _replacing(len(layout), slots, rows)
                handle = self.blocks[block].register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            output = self.inner.transformer(inputs_embeds=x, attention_mask=mask)

        # open_clip's pooler of maxima fills where its mask is true, so what it needs is the padding.
        wants_padding = type(self.inner.pooler).__name__ == "MaxPooler"
        return self.inner.pooler(output, mask == 0 if wants_padding else mask), output.last_hidden_state


def _replace(x: Tensor, classes: int, slots: Slots, rows: Tensor) -> Tensor:
    """Put (G or 1, K, Dt) learned vectors into (G * C, R, Dt) states; slots are those of C sentences of R tokens."""
    flat = x.reshape(x.shape[0] // classes, classes * x.shape[1], -1)
    return insert_rows(flat, slots, rows).reshape(-1, *x.shape[1:])


def _replacing(classes: int, slots: Slots, rows: Tensor) -> Callable[..., tuple[Any, Any]]:
    """Return a hook that does :func:`_replace` to the states that a layer is called with."""

    def hook(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if positional:
            return (_replace(positional[0], classes, slots, rows), *positional[1:]), named
        return positional, {**named, "hidden_states": _replace(named["hidden_states"], classes, slots, rows)}

    return hook


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)
