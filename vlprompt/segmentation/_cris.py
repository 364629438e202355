"""CRIS' decoder: a neck that fuses three maps with a phrase, a transformer over words, a kernel made of the phrase.

Wang et al., "CRIS: CLIP-Driven Referring Image Segmentation", CVPR 2022, arXiv 2111.15174, section 3. The parts have
the names of published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.segmentation._fine import FineMaps, likeness

__all__ = ["CrisDecoder"]


class CrisDecoder(nn.Module):
    """Three maps, a phrase's feature and its words' states to logits.

    Args:
        widths: Channels of the maps, finest first; the last is d.
        words: Dt, width of the words' states.
        deepest: Channels of a ResNet's last stage, beside the attention pool; None without one.
        width: Channels of the fused map; half and twice as many elsewhere.
        layers: Of the transformer.
        heads: Its attention heads.
        hidden: Width of its MLPs.
        dropout: In the transformer, while the decoder itself learns.
        fine: Channels of finer maps of a stem, finest first, if they are read too; the decoder then also sees how like
            the phrase each place of the coarsest map is.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        words: int,
        deepest: int | None = None,
        *,
        width: int = 512,
        layers: int = 3,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
        fine: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.width = width
        self.levels = len(fine)
        self.neck = _Neck(widths, width)
        self.decoder = _Transformer(width, words, layers, heads, hidden, dropout)
        self.proj = _Projector(widths[2], width, fine)
        self.likeness = nn.Conv2d(2, width, 1) if fine else None
        self.connect = None if deepest is None else _zero(nn.Conv2d(deepest, widths[2], 1, bias=False))

    def joined(self, pooled: Tensor, deepest: Tensor) -> Tensor:
        """Return the coarsest map of a ResNet: its dense attention pool and the last stage itself."""
        return torch.relu(pooled if self.connect is None else pooled + self.connect(deepest))

    def features(
        self,
        maps: tuple[Tensor, Tensor, Tensor],
        condition: Tensor,
        words: Tensor,
        dense: Tensor | None = None,
    ) -> Tensor:
        """Return (B, width, h, w) of the middle scale.

        Args:
            maps: Of :meth:`_Neck.prepared`, coarsest first.
            condition: (B, d).
            words: (B, T, Dt).
            dense: (B, N, d) unit-length features of the coarsest map's places; for decoders with finer maps.
        """
        fused = self.neck(maps, condition)
        if self.likeness is not None and dense is not None:
            alike = likeness(dense, condition).transpose(1, 2).unflatten(2, maps[0].shape[-2:])
            fused = fused + self.likeness(_doubled(alike))
        return self.decoder(fused, words)

    def upsample(self, features: Tensor, condition: Tensor, fine: Sequence[Tensor] = ()) -> Tensor:
        """Return logits, (B, 1, 4 h, 4 w) or of the finest map's size.

        Args:
            features: (B, width, h, w), of :meth:`features`.
            condition: (B, d).
            fine: (B, C, h', w') finer maps, finest first, if they are read.
        """
        return self.proj(features, condition, fine)


def _zero(convolution: nn.Conv2d) -> nn.Sequential:
    """Return a convolution whose weights are 0: CLIP has no such connection, and this one leaves it as it is."""
    nn.init.zeros_(convolution.weight)
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


def _conv(before: int, after: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


class _Neck(nn.Module):
    """Fuses a phrase into the coarsest map and all maps into the middle scale."""

    def __init__(self, widths: tuple[int, int, int], width: int) -> None:
        super().__init__()
        fine = width // 2
        middle = width
        coarse = 2 * width
        self.txt_proj = nn.Sequential(
            nn.Linear(widths[2], coarse, bias=False), nn.BatchNorm1d(coarse), nn.ReLU()
        )
        self.f1_v_proj = _conv(widths[2], coarse, 1)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(coarse), nn.ReLU())
        self.f2_v_proj = _conv(widths[1], middle, 3)
        self.f2_cat = _conv(coarse + middle, middle, 1)
        self.f3_v_proj = _conv(widths[0], fine, 3)
        self.f3_cat = _conv(fine + middle, middle, 1)
        self.f4_proj5 = _conv(coarse, middle, 3)
        self.f4_proj4 = _conv(middle, middle, 3)
        self.f4_proj3 = _conv(middle, middle, 3)
        self.aggr = _conv(3 * middle, middle, 1)
        self.coordconv = nn.Sequential(_CoordConv(middle), _conv(middle, middle, 3))

    def prepared(self, maps: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the part that no phrase enters, coarsest map first."""
        fine, middle, coarse = maps
        return self.f1_v_proj(coarse), self.f2_v_proj(middle), F.avg_pool2d(self.f3_v_proj(fine), 2)

    def forward(self, prepared: tuple[Tensor, Tensor, Tensor], condition: Tensor) -> Tensor:
        """Return (B, width, h, w) of the middle scale."""
        coarse, middle, fine = prepared
        coarse = self.norm_layer(coarse * self.txt_proj(condition)[:, :, None, None])
        middle = self.f2_cat(torch.cat([middle, _doubled(coarse)], dim=1))
        fine = self.f3_cat(torch.cat([fine, middle], dim=1))
        parts = [self.f4_proj3(fine), self.f4_proj4(middle), _doubled(self.f4_proj5(coarse))]
        return self.coordconv(self.aggr(torch.cat(parts, dim=1)))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class _CoordConv(nn.Module):
    """A convolution that reads positions: x and y in [-1, 1] are two more channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _conv(width + 2, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, h, w)."""
        columns = torch.linspace(-1, 1, x.shape[3], device=x.device, dtype=x.dtype).expand(
            len(x), 1, *x.shape[2:]
        )
        rows = torch.linspace(-1, 1, x.shape[2], device=x.device, dtype=x.dtype)
        rows = rows[:, None].expand(len(x), 1, *x.shape[2:])
        return self.conv1(torch.cat([x, columns, rows], dim=1))


class _Transformer(nn.Module):
    """Every position of the map attends to all positions and to all words."""

    def __init__(self, width: int, words: int, layers: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, words, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Return (B, width, h, w).

        Args:
            x: (B, width, h, w).
            words: (B, T, Dt) states, zeros where there is no word.
        """
        height, width = x.shape[2:]
        half = x.shape[1] // 2
        by_column = _waves(torch.arange(width, device=x.device), half)[None].expand(height, -1, -1)
        by_row = _waves(torch.arange(height, device=x.device), half)[:, None].expand(-1, width, -1)
        positions = torch.cat([by_column, by_row], dim=2).flatten(0, 1).to(x.dtype)  # (h w, width)
        order = _waves(torch.arange(words.shape[1], device=x.device), words.shape[2]).to(words.dtype)
        is_padding = (words == 0).all(2)

        tokens = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, words, positions, order, is_padding)
        return self.norm(tokens).transpose(1, 2).unflatten(2, (height, width))


def _waves(positions: Tensor, width: int) -> Tensor:
    """Return (P, width) sines and cosines in turn, of wavelengths from 2 pi to 10,000 * 2 pi."""
    rates = 1e-4 ** (torch.arange(0, width, 2, device=positions.device) / width)
    angles = positions[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class _Layer(nn.Module):
    """Pre-norm attention to positions, attention to words, MLP; the outputs of both attentions are normed again."""

    def __init__(self, width: int, words: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(width)
        self.cross_attn_norm = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(
            width, heads, dropout, kdim=words, vdim=words, batch_first=True
        )
        self.ffn = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, width),
        )
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, words: Tensor, positions: Tensor, order: Tensor, is_padding: Tensor
    ) -> Tensor:
        """Return (B, N, width).

        Args:
            x: (B, N, width) tokens of the map.
            words: (B, T, Dt).
            positions: (N, width) of the map's tokens.
            order: (T, Dt) positions of the words.
            is_padding: (B, T), true where there is no word.
        """
        value = self.norm1(x)
        key = value + positions
        attended = self.self_attn(key, key, value, need_weights=False)[0]
        x = x + self.dropout1(self.self_attn_norm(attended))

        query = self.norm2(x) + positions
        attended = self.multihead_attn(query, words + order, words, is_padding, need_weights=False)[0]
        x = x + self.dropout2(self.cross_attn_norm(attended))
        return x + self.dropout3(self.ffn(self.norm3(x)))


class _Projector(nn.Module):
    """Four times finer, or as fine as a stem's maps; then a 3 x 3 convolution whose kernel the phrase makes."""

    def __init__(self, dim: int, width: int, fine: Sequence[int] = ()) -> None:
        super().__init__()
        self.vis = FineMaps(width, dim, fine) if fine else _quadrupling(width)
        out = self.vis.width if isinstance(self.vis, FineMaps) else width // 2
        self.txt = nn.Linear(dim, out * 9 + 1)

    def last(self) -> nn.Module:
        """Return the last convolution before the phrase's."""
        return self.vis.last() if isinstance(self.vis, FineMaps) else self.vis[-1]

    def forward(self, x: Tensor, condition: Tensor, fine: Sequence[Tensor] = ()) -> Tensor:
        """Return (B, 1, H, W); arguments as of :meth:`CrisDecoder.upsample`."""
        x = self.vis(x, fine, condition) if isinstance(self.vis, FineMaps) else self.vis(x)
        kernel = self.txt(condition)
        weight = kernel[:, :-1].reshape(len(x), -1, 3, 3)
        # One convolution whose groups are the images.
        out = F.conv2d(x.flatten(0, 1)[None], weight, kernel[:, -1], padding=1, groups=len(x))
        return out.transpose(0, 1)


def _quadrupling(width: int) -> nn.Sequential:
    out = width // 2
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear"),
        _conv(width, width, 3),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        _conv(width, out, 3),
        nn.Conv2d(out, out, 1),
    )
