"""The image tower: how visual prompts enter it, and which parts need no graph.

Two conventions for inserting prompt tokens (they give different results, so a learner names one):
``after_cls``: between class token and patches, after the pre-norm, without positions (VPT, Jia et al. 2022,
section 3; MVLPT). ``append``: after the patches, before the pre-norm (MaPLe, Khattak et al. 2023; PromptSRC).
In both, deep prompts replace the prompt tokens' states before each further block; below depth L the last
ones' outputs flow on. Where tokens turn by their place (rotary positions), prompt tokens have none and do not turn.

A tower that is no sequence of tokens takes prompts of pixels: values that are added to the image before the tower reads
it (Bahng et al., "Exploring Visual Prompts for Adapting Large-Scale Models", arXiv 2203.17274, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbones.attention import Projections, adapted, looking_at, projections_in, shows_its_keys
from vlprompt.backbones.edits import (
    Adapter,
    BlockEdit,
    attention_parts,
    check_keys_values,
    edit_of,
    edited_blocks,
    enter_tokens,
    entered_tokens,
    norms_of,
)
from vlprompt.backbones.packed import is_packable_block, quick_attention, run_block
from vlprompt.backbones.streams import TokenStream, find_stream, with_places_without_rotation
from vlprompt.core.errors import BackboneError, VLPromptError

__all__ = [
    "Images",
    "Insertion",
    "PixelPrompts",
    "Prompts",
    "TokenStates",
    "VisionTower",
    "VisualPrompts",
    "weights_dtype",
]

Insertion = Literal["after_cls", "append"]


@dataclass(frozen=True)
class VisualPrompts:
    """Prompt tokens for an image tower.

    Attributes:
        tokens: (J, M, W) or, one set per image, (B, J, M, W): row 0 enters before the first block, row i
            replaces the prompt tokens before block i.
        insertion: See the module's text.
    """

    tokens: Tensor
    insertion: Insertion = "after_cls"

    def dropped(self, share: float, batch: int) -> VisualPrompts:
        """Return one set per image in which a share of the values is dropped, drawn per image and layer."""
        tokens = self.tokens.expand(batch, -1, -1, -1)
        return replace(self, tokens=F.dropout(tokens, share))


@dataclass(frozen=True)
class PixelPrompts:
    """Pixels that are added to the preprocessed image; they enter every tower.

    Attributes:
        pixels: (3, H, W) or, one set per image, (B, 3, H, W), in units of the preprocessed image; 0 where nothing is
            learned. See :func:`vlprompt.backbones.pixels.place_pixels`.
    """

    pixels: Tensor

    def dropped(self, share: float, batch: int) -> PixelPrompts:
        """Return one set per image in which a share of the values is dropped."""
        return PixelPrompts(F.dropout(self.pixels.expand(batch, -1, -1, -1), share))


Prompts = VisualPrompts | PixelPrompts


@dataclass(frozen=True)
class TokenStates:
    """Images that have gone some way up the tower: what a kept prefix holds in place of their pixels.

    Attributes:
        tokens: (B, special + N, W), without prompts.
        blocks: Blocks that have run; 0: patches, class token and positions, before the pre-norm.
    """

    tokens: Tensor
    blocks: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> TokenStates:
        return replace(self, tokens=self.tokens[rows])

    def to(self, device: torch.device, non_blocking: bool = False) -> TokenStates:
        """Return them on another device."""
        return replace(self, tokens=self.tokens.to(device, non_blocking=non_blocking))

    @staticmethod
    def cat(parts: Sequence[TokenStates]) -> TokenStates:
        """Return the images of all parts, which are equally far up the tower."""
        return replace(parts[0], tokens=torch.cat([part.tokens for part in parts]))


Images = Tensor | TokenStates
"""(B, 3, H, W) preprocessed pixels, or what a part of the tower has made of them."""


class VisionTower:
    """The image side of an open_clip model (a view: the parameters stay where they are).

    Args:
        visual: Any image tower of open_clip's: its own, or one of timm's.

    Attributes:
        stream: Its steps, if it is a sequence of tokens.
        kind: ``"vit"`` (open_clip's own), ``"timm_vit"``, or ``"conv"`` where tokens can't enter.
        width: W, width of its tokens; 0 where tokens can't enter.
        layers: Number of blocks; 0 where tokens can't enter.
        reason: Why this is no tower that tokens can enter, or None.
        refusal: The same, with what works instead.
        attention: The projections that adapters join, in the order of the blocks; empty if there are none.
    """

    def __init__(self, visual: nn.Module) -> None:
        self.visual: Any = visual
        found = find_stream(visual)
        self.stream: TokenStream | None = None if isinstance(found, str) else found
        self.reason = found if isinstance(found, str) else None
        self.refusal = None if self.reason is None else _refusal(self.reason)

        self.kind = "conv" if self.stream is None else self.stream.kind
        self.blocks: Any = () if self.stream is None else self.stream.blocks
        self.layers = len(self.blocks)
        self.width = 0 if self.stream is None else self.stream.width
        self.attention: list[Projections] = _attention(visual, self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """What the tower computes in; pixels and prompts are cast to it where they enter."""
        return weights_dtype(self.visual)

    def require_prompts(self) -> None:
        """Raise BackboneError with the reason if prompt tokens can't enter this tower."""
        if self.refusal is not None:
            raise BackboneError(f"visual prompts can't be learned on this backbone: {self.refusal}")

    def require_adapters(self) -> None:
        """Raise BackboneError with the reason if adapters can't enter this tower's attention."""
        if not self.attention:
            name = type(getattr(self.visual, "trunk", self.visual)).__name__
            raise BackboneError(
                f"attention can't be adapted on this backbone: its image tower ({name}) has no layers that project "
                "queries, keys and values in its blocks. Leave the image tower alone (clip_lora: encoder=text), or "
                "learn its pixels (vpt) or weight masks."
            )

    def require_edits(self) -> None:
        """Raise BackboneError with the reason if this tower's blocks can't be edited (see :class:`BlockEdit`)."""
        if self.layers and all(norms_of(block) is not None for block in self.blocks):
            return

        name = type(getattr(self.visual, "trunk", self.visual)).__name__
        raise BackboneError(
            f"the image tower's blocks can't be edited on this backbone: {name} has none that begin with a LayerNorm. "
            "What works here: vpt, which learns pixels around the image instead (where=pixels), and learners that "
            "leave the image tower alone (coop, clip_adapter, tip_adapter, linear_probe)."
        )

    def require_attention_edits(self) -> None:
        """Raise BackboneError with the reason if nothing can follow attention, or stand in front of its keys."""
        self.require_edits()
        if all(is_packable_block(block) or shows_its_keys(block) for block in self.blocks):
            return

        kinds = sorted({type(block).__name__ for block in self.blocks})
        raise BackboneError(
            f"keys, values and what follows attention can't enter this backbone's image tower: its blocks "
            f"({', '.join(kinds)}) don't run torch's fused attention. What works here: vpt and maple."
        )

    def require_entering_tokens(self) -> None:
        """Raise BackboneError with the reason if no token can enter between this tower's blocks."""
        self.require_edits()
        if not self._stream().special:
            raise BackboneError(
                "tokens that stand behind the class token can't enter this backbone's image tower: it has none. "
                "What works here: learners whose tokens stand behind the patches (maple, promptsrc)."
            )

    def block_norms(self) -> list[tuple[nn.LayerNorm, nn.LayerNorm]]:
        """Return the norms before attention and before the MLP of every block (see :meth:`require_edits`)."""
        return [norms for norms in map(norms_of, self.blocks) if norms is not None]

    def outer_norms(self) -> list[nn.LayerNorm]:
        """Return the norms before the first and after the last block, where there are any."""
        return self._stream().outer_norms()

    def states(self, images: Tensor, blocks: int = 0) -> TokenStates:
        """Return the tokens of (B, 3, H, W) preprocessed pixels after the first ``blocks`` blocks.

        :meth:`encode` goes on from them and returns the same as it does from the pixels.

        Raises:
            BackboneError: If the tower is no sequence of tokens.
        """
        stream = self._stream()
        x, rotation = stream.embed(images.to(self.dtype))

        if blocks:
            x = stream.norm_before(x)
        for i in range(blocks):
            x = stream.run(i, x, rotation)
        return TokenStates(x, blocks)

    def block_of(self, weight: str) -> int | None:
        """Return the number of the block that a weight of the tower belongs to; None if it is in none (stem, pool)."""
        modules = set()
        while weight := weight.rpartition(".")[0]:
            modules.add(self.visual.get_submodule(weight))
        return next((i for i, block in enumerate(self.blocks) if block in modules), None)

    def encode(
        self,
        images: Images,
        prompts: Prompts | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> Tensor:
        """Return (B, d) image features, not normalised, float32.

        Args:
            images: (B, 3, H, W) preprocessed pixels, or what :meth:`states` made of them.
            prompts: Prompt tokens or pixels, or None for the tower as it is.
            adapters: One per entry of ``attention``, or None where there is none: functions of what its attention
                reads, whose result is added to queries, keys and values (see :meth:`require_adapters`); or edits of
                the blocks (see :class:`vlprompt.backbones.edits.BlockEdit` and :meth:`require_edits`).

        Raises:
            BackboneError: If there are prompt tokens and the tower has no token sequence.
            VLPromptError: If the prompts' width, depth, batch or image size don't fit, or if the images have gone past
                the place where prompts or adapters enter.
        """
        if isinstance(images, TokenStates):
            _check_entry(images, prompts, adapters)
        else:
            images = images.to(self.dtype)
        if isinstance(prompts, PixelPrompts):
            assert isinstance(images, Tensor)  # checked above
            images = _with_pixels(images, prompts)
            prompts = None

        if adapters is None:
            return self._features(images, prompts)

        return self._edited_features(images, prompts, adapters)[0]

    def encode_entered(self, images: Images, adapters: Sequence[Adapter | None]) -> tuple[Tensor, Tensor]:
        """Return (B, d) features as :meth:`encode`, and what became of the tokens that edits brought along.

        Args:
            images: See :meth:`encode`.
            adapters: See :meth:`encode`; edits, some of which bring tokens (see :meth:`require_entering_tokens`).

        Returns:
            The features, pooled from the tower's own tokens alone, and (B, K, W) states of the K tokens after the
            norm that follows the last block. Both float32.
        """
        if isinstance(images, TokenStates):
            _check_entry(images, None, adapters)
        else:
            images = images.to(self.dtype)
        features, tokens = self._edited_features(images, None, adapters)
        return features, self._stream().norm_after(tokens).float()

    def finish(self, x: Tensor) -> Tensor:
        """Pooling and projection of (B, special + N, W), prompts already removed: (B, d), float32."""
        return self._stream().finish(x).float()

    def _edited_features(
        self, images: Images, prompts: VisualPrompts | None, adapters: Sequence[Adapter | None]
    ) -> tuple[Tensor, Tensor]:
        """Run the tower with adapters; return features and the states of tokens that came with them."""
        edits = [edit_of(adapter) for adapter in adapters]
        if any(edit.changes_attention for edit in edits):
            self.require_attention_edits()
            tokens = images if isinstance(images, Tensor) else images.tokens
            check_keys_values(edits, self.width, (1, tokens.shape[0]))

        attention = attention_parts(adapters)
        joins = any(part is not None for part in attention)
        if joins or not self.layers:
            self.require_adapters()
        if not self.layers:
            with adapted(self.attention, attention):
                features = self._features(images, prompts)
            return features, features.new_empty(len(features), 0, 0)

        if all(is_packable_block(block) for block in self.blocks):  # open_clip's own blocks
            with quick_attention(self.blocks):
                return self._run(images, prompts, edits, own=True)
        with (
            adapted(self.attention, attention) if joins else nullcontext(),
            edited_blocks(self.blocks, edits),
            looking_at(self.blocks, edits),
        ):
            return self._run(images, prompts, edits, own=False)

    def _features(self, images: Images, prompts: VisualPrompts | None) -> Tensor:
        """Run the tower without edits."""
        with quick_attention(self.blocks):
            if prompts is None and isinstance(images, Tensor):
                return _first(self.visual(images)).float()
            return self._run(images, prompts, [BlockEdit()] * self.layers, own=False)[0]

    def _run(
        self, images: Images, prompts: VisualPrompts | None, edits: Sequence[BlockEdit], own: bool
    ) -> tuple[Tensor, Tensor]:
        """Run a sequence of tokens; return (B, d) features and (B, K, W) states of the tokens that edits brought.

        Args:
            images: Pixels or states.
            prompts: Tokens, or None.
            edits: One per block.
            own: Whether blocks run with their edits here, as open_clip's own can; else the caller has seen to it.
        """
        stream = self._stream()
        if isinstance(images, TokenStates):
            start = images.blocks
            x = images.tokens.to(self.dtype)
            rotation = stream.rotation(x)
        else:
            # What lies below the prompts is frozen, so it makes no graph by itself.
            start = 0
            x, rotation = stream.embed(images)

        if prompts is None:  # no tokens: the same tower, block by block
            prompts = VisualPrompts(x.new_empty(1, 0, self.width))
        tokens = self._check(prompts, x.shape[0])
        append = prompts.insertion == "append"

        x = x if append or start else stream.norm_before(x)
        first = x.shape[1] if append else stream.special
        places = slice(first, first + tokens.shape[2])
        x = torch.cat([x[:, :first], tokens[:, 0].to(x.dtype), x[:, first:]], dim=1)

        if append:
            x = stream.norm_before(x)
        if rotation is not None:
            rotation = with_places_without_rotation(rotation, tokens.shape[2], front=not append)

        brought = entered_tokens(edits)
        entered = slice(0, 0)
        if brought:
            _check_alone(prompts)
        for i in range(start, self.layers):
            if 1 <= i < tokens.shape[1]:
                x = torch.cat([x[:, : places.start], tokens[:, i].to(x.dtype), x[:, places.stop :]], dim=1)
            if edits[i].tokens is not None:
                x = enter_tokens(x, edits[i], at=stream.special, is_first=not entered.stop)
                if rotation is not None and not entered.stop:
                    rotation = with_places_without_rotation(rotation, brought, front=True)
                entered = slice(stream.special, stream.special + brought)
            hand_run = own and edits[i].changes_block
            x = run_block(self.blocks[i], x, edits[i]) if hand_run else stream.run(i, x, rotation)

        states = x[:, entered]
        for part in (entered, places):
            x = torch.cat([x[:, : part.start], x[:, part.stop :]], dim=1)
        return self.finish(x), states

    def _stream(self) -> TokenStream:
        self.require_prompts()
        assert self.stream is not None  # there is a reason where there is none
        return self.stream

    def _check(self, prompts: VisualPrompts, batch: int) -> Tensor:
        self.require_prompts()
        tokens = prompts.tokens[None] if prompts.tokens.dim() == 3 else prompts.tokens
        if tokens.shape[-1] != self.width:
            raise VLPromptError(
                f"visual prompts have width {tokens.shape[-1]}, the image tower has {self.width}."
            )
        if tokens.shape[1] > self.layers:
            raise VLPromptError(
                f"visual prompts for {tokens.shape[1]} layers, the image tower has {self.layers}."
            )
        if len(tokens) not in (1, batch):
            raise VLPromptError(f"visual prompts for {len(tokens)} images, the batch has {batch}.")
        return tokens.expand(batch, -1, -1, -1)


def weights_dtype(module: nn.Module) -> torch.dtype:
    """Return the type of the first layer's weight: what a model computes in, whatever its norms and tables are."""
    layers = (m.weight.dtype for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return next(layers, torch.float32)


def _check_entry(
    states: TokenStates, prompts: Prompts | None, adapters: Sequence[Adapter | None] | None
) -> None:
    """Refuse states that have gone past the place where something enters."""
    if isinstance(prompts, PixelPrompts):
        raise VLPromptError(
            "prompts of pixels enter at the pixels, and these images are token states already."
        )

    if prompts is not None and states.blocks:
        raise VLPromptError(
            f"visual prompts enter before the first block, and {states.blocks} blocks have run on these images."
        )

    below = [i for i, adapter in enumerate(adapters or ()) if adapter is not None and i < states.blocks]
    if below:
        raise VLPromptError(
            f"block {below[0]} has an adapter, and {states.blocks} blocks have run on these images without it."
        )


def _check_alone(prompts: VisualPrompts) -> None:
    """Refuse prompt tokens beside tokens that enter between blocks."""
    if prompts.tokens.shape[-2]:
        raise VLPromptError("visual prompts can't be combined with tokens that enter between blocks.")


def _with_pixels(images: Tensor, prompts: PixelPrompts) -> Tensor:
    pixels = prompts.pixels if prompts.pixels.dim() == 4 else prompts.pixels[None]
    if pixels.shape[1:] != images.shape[1:]:
        raise VLPromptError(
            f"a visual prompt of {pixels.shape[-2]} x {pixels.shape[-1]} pixels, images of {images.shape[-2]} x "
            f"{images.shape[-1]}."
        )
    if pixels.shape[0] not in (1, images.shape[0]):
        raise VLPromptError(f"visual prompts for {len(pixels)} images, the batch has {images.shape[0]}.")
    return images + pixels.to(images.dtype)


def _attention(visual: nn.Module, blocks: Any) -> list[Projections]:
    """Return the projections of a tower: one per block of a sequence of tokens, else all there are."""
    if not len(blocks):
        return projections_in(visual)

    by_block = [projections_in(block) for block in blocks]
    return [places[0] for places in by_block] if all(len(places) == 1 for places in by_block) else []


def _refusal(reason: str) -> str:
    return (
        f"{reason}. What works here: vpt, which learns pixels around the image instead (where=pixels), and learners "
        "that leave the image tower alone (coop, clip_adapter, tip_adapter, linear_probe)."
    )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
