"""A canvas that is painted from back to front, and knows afterwards what is seen of every thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vlprompt.core.seeding import numpy_rng

__all__ = ["Canvas", "Colour", "Points", "Texture", "mixed", "noise"]

Colour = Sequence[float] | NDArray[np.floating[Any]]
Points = Sequence[tuple[float, float]]

_TILE = 512  # pixels of a tile of noise
_TILES = 24
_ROUGHNESS = (0.6, 1.2, 2.0)  # exponents of 1/f: fine grain, bark, clouds


@lru_cache(maxsize=1)
def _tiles() -> NDArray[np.float32]:
    """Return (3, 24, 512, 512) noise with mean 0 and deviation 1, by roughness."""
    rng = numpy_rng(0, "noise", "tiles")
    rows = np.fft.fftfreq(_TILE)[:, None]
    columns = np.fft.rfftfreq(_TILE)[None]
    frequency = np.sqrt(rows**2 + columns**2)
    frequency[0, 0] = 1

    tiles = np.empty((len(_ROUGHNESS), _TILES, _TILE, _TILE), np.float32)
    for kind, exponent in enumerate(_ROUGHNESS):
        for number in range(_TILES):
            spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE))) / frequency**exponent
            spectrum[0, 0] = 0
            tile = np.fft.irfft2(spectrum, (_TILE, _TILE))
            tiles[kind, number] = tile / tile.std()

    return tiles


def noise(rng: np.random.Generator, side: int, kind: int = 1, stretch: float = 1.0) -> NDArray[np.float32]:
    """Return (side, side) noise with deviation about 1.

    Args:
        rng: Draws the place.
        side: Pixels, at most 512.
        kind: 0 fine grain, 1 bark, 2 clouds.
        stretch: How much longer than high its grains are.
    """
    tile = _tiles()[kind, int(rng.integers(_TILES))]
    if stretch != 1:
        width = max(8, min(_TILE, round(side / stretch)))
        left = int(rng.integers(_TILE - width + 1))
        columns = np.linspace(left, left + width - 1, side)
        tile = tile[:, columns.astype(int)]
    else:
        left = int(rng.integers(_TILE - side + 1))
        tile = tile[:, left : left + side]

    top = int(rng.integers(_TILE - side + 1))
    part = tile[top : top + side]
    return part[:, ::-1] if rng.random() < 0.5 else part


def mixed(rng: np.random.Generator, first: Colour, second: Colour) -> NDArray[np.float32]:
    """Return a colour between two, in [0, 1], a little off."""
    share = float(rng.random())
    colour = share * np.asarray(first) + (1 - share) * np.asarray(second)
    return np.clip(colour + rng.normal(0, 0.03, 3), 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Texture:
    """What a thing is filled with; see :meth:`Canvas.textured`."""

    colour: NDArray[np.float32]
    grain: float
    kind: int
    stretch: float
    light: float


class Canvas:
    """Pixels, and a mask of what is seen of every thing.

    Args:
        side: Of the square image in pixels.
        rng: Draws textures.

    Attributes:
        pixels: (side, side, 3) in [0, 1].
        masks: Name of a thing to (side, side) bool.
    """

    def __init__(self, side: int, rng: np.random.Generator) -> None:
        self.side = side
        self.rng = rng
        self.pixels: NDArray[np.floating[Any]] = np.zeros((side, side, 3), np.float32)
        self.masks: dict[str, NDArray[np.bool_]] = {}

    def polygon(self, points: Points) -> NDArray[np.bool_]:
        """Return the inside of a polygon; (x, y) in units of the side."""
        image = Image.new("1", (self.side, self.side))
        scaled = [(x * self.side, y * self.side) for x, y in points]
        ImageDraw.Draw(image).polygon(scaled, fill=1)
        return np.asarray(image)

    def ellipse(self, x: float, y: float, width: float, height: float) -> NDArray[np.bool_]:
        """Return the inside of an ellipse around (x, y), in units of the side."""
        rows, columns = np.ogrid[0 : self.side, 0 : self.side]
        across = (columns / self.side - x) / max(width / 2, 1e-3)
        down = (rows / self.side - y) / max(height / 2, 1e-3)
        return across**2 + down**2 <= 1

    def box(self, left: float, top: float, right: float, bottom: float) -> NDArray[np.bool_]:
        """Return the inside of a box, in units of the side."""
        mask = np.zeros((self.side, self.side), bool)
        x0, y0, x1, y1 = (max(0, round(v * self.side)) for v in (left, top, right, bottom))
        mask[y0:y1, x0:x1] = True
        return mask

    def blob(self, x: float, y: float, width: float, height: float, rough: float = 0.3) -> NDArray[np.bool_]:
        """Return an ellipse with a rough outline, in units of the side."""
        rows, columns = np.ogrid[0 : self.side, 0 : self.side]
        across = (columns / self.side - x) / max(width / 2, 1e-3)
        down = (rows / self.side - y) / max(height / 2, 1e-3)
        return np.sqrt(across**2 + down**2) + rough * noise(self.rng, self.side, 1) * 0.5 <= 1

    def textured(
        self, colour: Colour, grain: float = 0.05, kind: int = 1, stretch: float = 1.0, light: float = 0.0
    ) -> Texture:
        """Return a colour, lighter and darker by noise, and slowly so across the image.

        Args:
            colour: In [0, 1].
            grain: Deviation of the noise.
            kind: Of the noise.
            stretch: Of the noise.
            light: How much lighter the top of what is painted is than its foot, or darker where negative.
        """
        return Texture(np.asarray(colour, np.float32), grain, kind, stretch, light)

    def paint(
        self,
        names: Sequence[str],
        mask: NDArray[np.bool_],
        texture: Texture | NDArray[np.float32],
        part_of: Sequence[str] = (),
    ) -> None:
        """Paint a thing over what is there.

        Args:
            names: What it is called, all of them; none for what has no name here.
            mask: (side, side).
            texture: Of :meth:`textured`, one colour, or (side, side, 3) pixels.
            part_of: Things that keep what the mask covers: a window is part of a house.
        """
        box = _bounds(mask)
        if box is None:
            return

        inside = mask[box]
        self.pixels[box][inside] = self._filled(texture, box, inside)
        for name, other in self.masks.items():
            if name not in part_of and name not in names:
                other[box] &= ~inside
        for name in names:
            self.masks.setdefault(name, np.zeros((self.side, self.side), bool))[box] |= inside

    def shade(self, mask: NDArray[np.bool_], factor: float) -> None:
        """Make a part of the image darker or lighter without changing what it is."""
        self.pixels[mask] *= factor

    def _filled(
        self, texture: Texture | NDArray[np.float32], box: tuple[slice, slice], inside: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Return the colours of the pixels inside, (n, 3) or one colour."""
        if not isinstance(texture, Texture):
            return texture[box][inside] if texture.ndim == 3 else texture

        side = max(inside.shape)
        height, width = inside.shape
        slow = 0.05 * noise(self.rng, self.side, 2)[box]
        fast = texture.grain * noise(self.rng, side, texture.kind, texture.stretch)[:height, :width]
        down = texture.light * np.linspace(0.5, -0.5, height, dtype=np.float32)[:, None]
        brightness = (1 + slow + fast + down)[inside]
        return texture.colour * brightness[:, None]


def _bounds(mask: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """Return the rows and columns that a mask fills, or None."""
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return None
    columns = np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
