"""CLIPSeg's decoder: tokens of three blocks, reduced, summed from deep to shallow, and modulated by a phrase.

Lüddecke and Ecker, CVPR 2022, arXiv 2112.10003, section 3.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FilmDecoder"]


class FilmDecoder(nn.Module):
    """Reduced token states and a phrase's feature to logits.

    Args:
        width: W of the tapped states.
        dim: d of the phrase's feature.
        patch: Side of a patch in pixels.
        taps: Number of tapped blocks.
        reduce: Width of the decoder.
        heads: Attention heads.
        hidden: Width of its MLPs.
        refined: Upsample in two steps after a 3 x 3 convolution, instead of in one.
        conditional: At which of the decoder's layers the phrase enters (0: the deepest tap).
    """

    def __init__(
        self,
        width: int,
        dim: int,
        patch: int,
        *,
        taps: int = 3,
        reduce: int = 64,
        heads: int = 4,
        hidden: int = 2048,
        refined: bool = False,
        conditional: int = 0,
    ) -> None:
        super().__init__()
        self.conditional = conditional
        self.width = reduce
        self.film_mul = nn.Linear(dim, reduce)
        self.film_add = nn.Linear(dim, reduce)
        self.reduces = nn.ModuleList(nn.Linear(width, reduce) for _ in range(taps))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(reduce, heads, hidden, dropout=0.0, batch_first=True)
            for _ in range(taps)
        )
        self.upsample = _refined(reduce, patch) if refined else nn.ConvTranspose2d(reduce, 1, patch, patch)

    def reduced(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return (B, R, reduce) tokens of every tap, deepest first, from (B, R, W) states, shallowest first."""
        return tuple(reduce(state) for reduce, state in zip(self.reduces, reversed(states), strict=True))

    def features(self, reduced: tuple[Tensor, ...], condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return (B, reduce, rows, columns) maps; tokens beside the grid's (class token, prompts) are dropped last."""
        x = reduced[0]
        for number, layer in enumerate(self.layers):
            x = x + reduced[number] if number else x
            if number == self.conditional:
                x = self.film_mul(condition)[:, None] * x + self.film_add(condition)[:, None]
            x = layer(x)

        patches = x[:, 1 : 1 + grid[0] * grid[1]]
        return patches.transpose(1, 2).unflatten(2, grid)

    def last(self) -> nn.Module:
        """Return the layer that makes logits."""
        return self.upsample[-1] if isinstance(self.upsample, nn.Sequential) else self.upsample


def _refined(reduce: int, patch: int) -> nn.Sequential:
    """Return an upsampling in two steps whose factors multiply to the patch.

    The published one is always 4 x 4, which fits patches of 16 pixels only.
    """
    first = next(factor for factor in range(int(patch**0.5), 0, -1) if patch % factor == 0)
    second = patch // first
    return nn.Sequential(
        nn.Conv2d(reduce, reduce, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(reduce, reduce // 2, first, first),
        nn.ReLU(),
        nn.ConvTranspose2d(reduce // 2, 1, second, second),
    )
