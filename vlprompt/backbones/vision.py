"""The image tower: how visual prompts enter it, and which parts need no graph.

Two conventions for inserting prompts (they give different results, so a learner names one):
``after_cls``: between class token and patches, after the pre-norm, without positions (VPT, Jia et al. 2022,
section 3; MVLPT). ``append``: after the patches, before the pre-norm (MaPLe, Khattak et al. 2023; PromptSRC).
In both, deep prompts replace the prompt tokens' states before each further block; below depth L the last
ones' outputs flow on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlprompt.backbones.packed import Adapter, is_packable_block, run_block
from vlprompt.core.errors import BackboneError, VLPromptError

__all__ = ["Insertion", "VisionTower", "VisualPrompts"]

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


class VisionTower:
    """The image side of an open_clip model (a view: the parameters stay where they are).

    Args:
        visual: ``open_clip``'s VisionTransformer, ModifiedResNet or TimmModel.

    Attributes:
        kind: ``"vit"``, ``"timm_vit"`` or ``"conv"``.
        width: W, width of its tokens; 0 for convolutional towers.
        layers: Number of blocks; 0 for convolutional towers.
        refusal: Why visual prompts can't enter this tower, or None if they can.
    """

    def __init__(self, visual: nn.Module) -> None:
        self.visual: Any = visual
        self.kind, self.refusal = _kind(visual)
        self.blocks: Any = _blocks(self.visual, self.kind)
        self.layers = len(self.blocks)
        self.width = _width(visual, self.kind)

    def require_prompts(self) -> None:
        """Raise BackboneError with the reason if visual prompts can't enter this tower."""
        if self.refusal is not None:
            raise BackboneError(f"visual prompts can't be learned on this backbone: {self.refusal}")

    def require_adapters(self) -> None:
        """Raise BackboneError with the reason if adapters can't enter this tower's blocks."""
        fits = _has_packed_qkv if self.kind == "timm_vit" else is_packable_block
        odd = next((b for b in self.blocks if not fits(b)), None if self.layers else self.visual)
        if odd is not None:
            raise BackboneError(
                f"attention can't be adapted on this backbone: its image tower ({type(odd).__name__}) has no packed "
                "projection of queries, keys and values in every block. Leave the image tower alone."
            )

    def encode(
        self,
        images: Tensor,
        prompts: VisualPrompts | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> Tensor:
        """Return (B, d) image features, not normalised, float32.

        Args:
            images: (B, 3, H, W) preprocessed pixels.
            prompts: Prompt tokens, or None for the tower as it is.
            adapters: One per block, or None where there is none: functions of a block's normed input whose
                result is added to its queries, keys and values (see :meth:`require_adapters`).

        Raises:
            BackboneError: If the tower has no token sequence.
            VLPromptError: If the prompts' width, depth or batch don't fit.
        """
        if prompts is None:
            if adapters is None:
                return _first(self.visual(images)).float()
            # No tokens: the same tower, block by block.
            prompts = VisualPrompts(images.new_empty(1, 0, self.width))

        tokens = self._check(prompts, len(images))
        # What lies below the prompts is frozen, so it makes no graph by itself.
        x = self._embed(images, before_norm=prompts.insertion == "append")
        places = self._places(x.shape[1], tokens.shape[2], prompts.insertion)
        x = _put(x, tokens[:, 0], places)

        if prompts.insertion == "append":
            x = self._norm_before(x)

        for i, block in enumerate(self.blocks):
            if 1 <= i < tokens.shape[1]:
                x = torch.cat([x[:, : places.start], tokens[:, i].to(x.dtype), x[:, places.stop :]], dim=1)
            x = self._run(block, x, adapters[i] if adapters is not None else None)

        x = torch.cat([x[:, : places.start], x[:, places.stop :]], dim=1)
        return self.finish(x)

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

    def _run(self, block: Any, x: Tensor, adapter: Adapter | None) -> Tensor:
        if adapter is None:
            return block(x)
        if self.kind == "vit":
            return run_block(block, x, adapter)

        handle = block.attn.qkv.register_forward_hook(lambda _, inputs, output: output + adapter(inputs[0]))
        try:
            return block(x)
        finally:
            handle.remove()

    def _places(self, length: int, count: int, insertion: Insertion) -> slice:
        if insertion == "append":
            return slice(length, length + count)
        special = 1 if self.kind == "vit" else int(getattr(self.visual.trunk, "num_prefix_tokens", 1))
        return slice(special, special + count)

    def _embed(self, images: Tensor, before_norm: bool) -> Tensor:
        """Patches, class token and positions: (B, 1 + N, W), before or after the pre-norm."""
        visual = self.visual
        if self.kind == "timm_vit":
            x = visual.trunk._pos_embed(visual.trunk.patch_embed(images))
            return x if before_norm else visual.trunk.norm_pre(x)

        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + visual.positional_embedding.to(x.dtype)
        return x if before_norm else visual.ln_pre(x)

    def _norm_before(self, x: Tensor) -> Tensor:
        return self.visual.ln_pre(x) if self.kind == "vit" else self.visual.trunk.norm_pre(x)

    def finish(self, x: Tensor) -> Tensor:
        """Pooling and projection of (B, 1 + N, W), prompts already removed: (B, d), float32."""
        visual = self.visual
        if self.kind == "timm_vit":
            return visual.head(visual.trunk.forward_head(visual.trunk.norm(x))).float()
        pooled = _first(visual._pool(x))
        return (pooled if visual.proj is None else pooled @ visual.proj).float()


def _put(x: Tensor, tokens: Tensor, places: slice) -> Tensor:
    return torch.cat([x[:, : places.start], tokens.to(x.dtype), x[:, places.start :]], dim=1)


def _has_packed_qkv(block: Any) -> bool:
    """Tell whether a timm block's attention calls a linear layer for queries, keys and values together."""
    attention = getattr(block, "attn", None)
    return type(attention).__name__ == "Attention" and isinstance(getattr(attention, "qkv", None), nn.Linear)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _kind(visual: Any) -> tuple[str, str | None]:
    name = type(visual).__name__
    if name == "VisionTransformer":
        if not getattr(visual.transformer, "batch_first", True):
            return "conv", "its blocks run in a token-first layout that this open_clip version no longer uses"
        return "vit", None

    trunk = getattr(visual, "trunk", None)
    if getattr(trunk, "rope", None) is not None:
        return "conv", (
            f"its image tower ({type(trunk).__name__}) gives its tokens rotary positions by their place, which "
            "inserted tokens would shift. Use a learner that leaves the image tower alone (coop, linear_probe)."
        )
    if trunk is not None and all(
        hasattr(trunk, a) for a in ("patch_embed", "_pos_embed", "blocks", "forward_head")
    ):
        return "timm_vit", None

    what = type(trunk).__name__ if trunk is not None else name
    return "conv", (
        f"its image tower ({what}) is not a sequence of tokens. Use a ViT backbone (for example ViT-B-16 or tiny), or "
        "a learner that leaves the image tower alone (coop, linear_probe)."
    )


def _blocks(visual: Any, kind: str) -> Any:
    if kind == "vit":
        return visual.transformer.resblocks
    return visual.trunk.blocks if kind == "timm_vit" else ()


def _width(visual: Any, kind: str) -> int:
    if kind == "vit":
        return int(visual.class_embedding.shape[0])
    return int(visual.trunk.embed_dim) if kind == "timm_vit" else 0
