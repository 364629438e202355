"""Image towers that are a sequence of tokens, taken apart: embedding, blocks, pooling.

Prompt tokens enter between these steps. Families differ in what they lay before the patches (a class token, registers,
nothing), in how a token knows its place (learned positions, rotary ones), and in how the tokens are pooled; which
family a tower belongs to is seen from what it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ClipStream",
    "NaFlexStream",
    "TimmStream",
    "TokenStream",
    "find_stream",
    "with_places_without_rotation",
]


class TokenStream:
    """The steps of an image tower.

    Args:
        visual: The tower, an open_clip module.

    Attributes:
        kind: ``"vit"`` for open_clip's own towers, ``"timm_vit"`` for timm's.
        blocks: Its blocks.
        width: W, width of its tokens.
        special: Tokens that stand before the patches.
        patch: (height, width) of a patch in pixels.
        native: (height, width) in pixels of the only images it reads, or None if it resizes its positions itself.
        rotates: Whether patches have rotary positions.
    """

    kind: str
    blocks: Any
    width: int
    special: int
    patch: tuple[int, int]
    native: tuple[int, int] | None
    rotates: bool = False

    def __init__(self, visual: Any) -> None:
        self.visual: Any = visual

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (B, special + N, W) tokens with positions, before the pre-norm, and their rotation if they have one.

        A rotation is (..., N, 2 D): sines, then cosines, for the patches alone. With an axis of blocks in front, every
        block has its own.
        """
        raise NotImplementedError

    def norm_before(self, x: Tensor) -> Tensor:
        """Apply what stands between embedding and blocks."""
        raise NotImplementedError

    def run(self, index: int, x: Tensor, rotation: Tensor | None) -> Tensor:
        """Run a block on (B, R, W) tokens."""
        block = self.blocks[index]
        return block(x) if rotation is None else block(x, rope=self.rotation_of(index, rotation))

    def rotation_of(self, index: int, rotation: Tensor) -> Tensor:
        """Return a block's own rotation."""
        return rotation

    def native_rotation(self) -> Tensor | None:
        """Return the rotation of images of the native size; None where tokens have none."""
        return None

    def rotation(self, x: Tensor) -> Tensor | None:
        """Return the rotation of images of the backbone's size, of which (B, special + N, W) tokens are left.

        It depends on the size alone, so the embedding of a black image tells it.
        """
        if not self.rotates:
            return None
        size = _pair(self.visual.image_size)
        return self.embed(x.new_zeros(1, 3, *size))[1]

    def finish(self, x: Tensor) -> Tensor:
        """Pool (B, special + N, W) tokens and project them into the joint space: (B, d)."""
        raise NotImplementedError

    def norm_after(self, x: Tensor) -> Tensor:
        """Apply the norm that follows the last block to (..., W) states."""
        raise NotImplementedError

    def outer_norms(self) -> list[nn.LayerNorm]:
        """Return the norms before the first and after the last block, where there are any."""
        raise NotImplementedError


class ClipStream(TokenStream):
    """open_clip's VisionTransformer."""

    kind = "vit"
    special = 1
    native = None

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.blocks = visual.transformer.resblocks
        self.width = int(visual.class_embedding.shape[0])
        self.patch = _pair(visual.patch_size)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`TokenStream.embed`."""
        visual = self.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return x + visual.positional_embedding.to(x.dtype), None

    def norm_before(self, x: Tensor) -> Tensor:
        """See :meth:`TokenStream.norm_before`."""
        return self.visual.ln_pre(x)

    def finish(self, x: Tensor) -> Tensor:
        """See :meth:`TokenStream.finish`."""
        pooled = self.visual._pool(x)
        pooled = pooled[0] if isinstance(pooled, tuple) else pooled
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def norm_after(self, x: Tensor) -> Tensor:
        """See :meth:`TokenStream.norm_after`."""
        return self.visual.ln_post(x)

    def outer_norms(self) -> list[nn.LayerNorm]:
        """See :meth:`TokenStream.outer_norms`."""
        return [norm for norm in (self.visual.ln_pre, self.visual.ln_post) if isinstance(norm, nn.LayerNorm)]


class TimmStream(TokenStream):
    """timm's VisionTransformer (SigLIP, MobileCLIP-B, ViTamin) and Eva (EVA-01, EVA-02, PE-Core)."""

    kind = "timm_vit"

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        trunk = visual.trunk
        self.trunk: Any = trunk
        self.blocks = trunk.blocks
        self.width = int(trunk.embed_dim)
        self.special = int(trunk.num_prefix_tokens)
        size = _pair(trunk.patch_embed.img_size)
        grid = _pair(
            trunk.patch_embed.grid_size
        )  # behind a stem of convolutions, patch_size is that of its map
        self.patch = (size[0] // grid[0], size[1] // grid[1])
        self.native = None if getattr(trunk, "dynamic_img_size", False) else size
        self.rotates = getattr(trunk, "rope", None) is not None
        self.own_rotations = bool(getattr(trunk, "rope_mixed", False))

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`TokenStream.embed`."""
        embedded = self.trunk._pos_embed(self.trunk.patch_embed(images))
        return embedded if isinstance(embedded, tuple) else (embedded, None)

    def norm_before(self, x: Tensor) -> Tensor:
        """See :meth:`TokenStream.norm_before`."""
        return self.trunk.norm_pre(x)

    def native_rotation(self) -> Tensor | None:
        """See :meth:`TokenStream.native_rotation`."""
        return self.trunk.rope.get_embed(shape=self.trunk.patch_embed.grid_size) if self.rotates else None

    def rotation_of(self, index: int, rotation: Tensor) -> Tensor:
        """See :meth:`TokenStream.rotation_of`."""
        return rotation[index] if self.own_rotations else rotation

    def finish(self, x: Tensor) -> Tensor:
        """See :meth:`TokenStream.finish`."""
        return self.visual.head(self.trunk.forward_head(self.trunk.norm(x)))

    def norm_after(self, x: Tensor) -> Tensor:
        """See :meth:`TokenStream.norm_after`; where the norm follows the pooling, there it is."""
        norms = (self.trunk.norm, getattr(self.trunk, "fc_norm", None))
        return next((norm(x) for norm in norms if isinstance(norm, nn.LayerNorm)), x)

    def outer_norms(self) -> list[nn.LayerNorm]:
        """See :meth:`TokenStream.outer_norms`."""
        norms = (self.trunk.norm_pre, self.trunk.norm, getattr(self.trunk, "fc_norm", None))
        return [norm for norm in norms if isinstance(norm, nn.LayerNorm)]


class NaFlexStream(TimmStream):
    """timm's NaFlexVit, with images of one size."""

    def __init__(self, visual: Any) -> None:
        TokenStream.__init__(self, visual)
        trunk = visual.trunk
        self.trunk = trunk
        self.blocks = trunk.blocks
        self.width = int(trunk.embed_dim)
        self.special = int(trunk.num_prefix_tokens)
        self.patch = _pair(trunk.embeds.patch_size)
        self.native = None
        self.rotates = trunk.rope is not None
        self.own_rotations = bool(trunk.rope_is_mixed)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`TokenStream.embed`."""
        x, grid = self.trunk.embeds(images)
        rope = self.trunk.rope
        return x, None if rope is None else rope.get_embed(shape=grid)


def find_stream(visual: Any) -> TokenStream | str:
    """Return how an image tower runs as a sequence of tokens, or why it isn't one that tokens can enter."""
    if hasattr(visual, "class_embedding") and hasattr(getattr(visual, "transformer", None), "resblocks"):
        if not getattr(visual.transformer, "batch_first", True):
            return "its blocks run in a token-first layout that open_clip used before 3.0"
        return ClipStream(visual)

    trunk = getattr(visual, "trunk", None)
    if trunk is None or not hasattr(trunk, "blocks") or not hasattr(trunk, "forward_head"):
        return f"its image tower ({type(visual if trunk is None else trunk).__name__}) is not a sequence of tokens"
    if hasattr(trunk, "patch_embed") and hasattr(trunk, "_pos_embed") and hasattr(trunk, "norm_pre"):
        return TimmStream(visual)
    if hasattr(trunk, "embeds") and hasattr(trunk, "rope_is_mixed") and hasattr(trunk, "norm_pre"):
        return NaFlexStream(visual)

    if hasattr(trunk, "shared_rel_pos"):
        return (
            f"its image tower ({type(trunk).__name__}) knows places by a table of pairs of patches, in which an "
            "inserted token has none"
        )
    return f"its image tower ({type(trunk).__name__}) is not a sequence of tokens"


def with_places_without_rotation(rotation: Tensor, count: int, front: bool) -> Tensor:
    """Return a rotation for ``count`` more tokens, which it leaves as they are: their sines are 0, their cosines 1.

    Args:
        rotation: (..., N, 2 D) of the patches.
        count: M, tokens without a place.
        front: Whether they stand before the patches or after them.
    """
    half = rotation.shape[-1] // 2
    still = rotation.new_zeros(*rotation.shape[:-2], count, 2 * half)
    still[..., half:] = 1
    return torch.cat([still, rotation] if front else [rotation, still], dim=-2)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
