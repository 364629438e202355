"""Weather: snow, frost, fog, and spatter of water and mud (Hendrycks and Dietterich, arXiv 1903.12261, section 4).

The published frost lays parts of six photographs over the image. Here the layers are noise with the range of
brightness, contrast and colour that those photographs have.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_propagation, distance_transform_edt, sobel, uniform_filter

from vlprompt.data.corruptions import CORRUPTIONS, Values
from vlprompt.data.corruptions._filters import blurred, enlarged, fractal, streaked

__all__ = ["fog", "frost", "snow", "spatter"]

_GREY = np.array((0.299, 0.587, 0.114), np.float32)  # of red, green and blue
_WATER = np.array((175, 238, 238), np.float32) / 255  # pale turquoise
_MUD = np.array((63, 42, 20), np.float32) / 255

# Of photographs of frost: mean brightness, its deviation inside one, and how channels differ from the mean.
_FROST_BRIGHTNESS = (0.35, 0.83)
_FROST_CONTRAST = (0.06, 0.17)
_FROST_TINT = np.array((-0.071, 0.013, 0.058), np.float32)
_NEEDLES = 3

# Of the edges around drops of water, whose distance makes their shading.
_EDGE_WEAK = 50
_EDGE_STRONG = 150
_EDGE_REACH = 20  # pixels
_RELIEF = np.array(((-2, -1, 0), (-1, 1, 1), (0, 1, 2)))


@CORRUPTIONS.register(
    "snow",
    summary="falling snow",
    levels=(
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
)
def snow(values: Values, level: tuple[float, ...], rng: np.random.Generator) -> Values:
    """Whiten the image, and lay streaks of enlarged noise over it, once as they are and once turned by 180 degrees."""
    mean, deviation, size, threshold, radius, sigma, kept = level
    flakes = rng.normal(mean, deviation, values.shape[:2]).astype(np.float32)
    flakes = enlarged(flakes, size)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = streaked(flakes, int(radius), sigma, rng.uniform(-135, -45))

    white = np.maximum(values, (1.5 * (values @ _GREY) + 0.5)[..., None])
    veiled = kept * values + (1 - kept) * white
    return veiled + (flakes + flakes[::-1, ::-1])[..., None]


@CORRUPTIONS.register(
    "frost", summary="ice on the lens", levels=((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
)
def frost(values: Values, level: tuple[float, float], rng: np.random.Generator) -> Values:
    """Add a layer of ice to the darkened image."""
    image, ice = level
    return image * values + ice * _frost_layer(values.shape[:2], rng)


@CORRUPTIONS.register(
    "fog", summary="patches of fog", levels=((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))
)
def fog(values: Values, level: tuple[float, float], rng: np.random.Generator) -> Values:
    """Add fractal noise, and bring the brightest value back to where it was."""
    density, decay = level
    brightest = float(values.max())
    hidden = values + density * fractal(values.shape[:2], decay, rng)[..., None]
    return hidden * brightest / (brightest + density)


@CORRUPTIONS.register(
    "spatter",
    summary="drops of water, then of mud",
    levels=(
        (0.65, 0.3, 4, 0.69, 0.6, "water"),
        (0.65, 0.3, 3, 0.68, 0.6, "water"),
        (0.65, 0.3, 2, 0.68, 0.5, "water"),
        (0.65, 0.3, 1, 0.65, 1.5, "mud"),
        (0.67, 0.4, 1, 0.65, 1.5, "mud"),
    ),
)
def spatter(
    values: Values, level: tuple[float, float, float, float, float, str], rng: np.random.Generator
) -> Values:
    """Lay drops over the image where blurred noise passes a threshold."""
    mean, deviation, sigma, threshold, strength, liquid = level
    layer = blurred(rng.normal(mean, deviation, values.shape[:2]).astype(np.float32), sigma)
    layer = np.where(layer < threshold, 0, layer)
    if liquid == "water":
        return values + strength * _water(layer)[..., None] * _WATER

    mud = blurred((layer > threshold).astype(np.float32), strength)
    mud = np.where(mud < 0.8, 0, mud)[..., None]
    return values * (1 - mud) + mud * _MUD


def _frost_layer(shape: tuple[int, int], rng: np.random.Generator) -> Values:
    """Return (H, W, 3) values of ice: clouds, and needles in a few directions."""
    pattern = _standardised(fractal(shape, 1.5, rng))
    for _ in range(_NEEDLES):
        seeds = (rng.random(shape) < 0.02).astype(np.float32)
        needles = streaked(seeds, 20, 10, rng.uniform(0, 360))
        pattern = pattern + 0.4 * _standardised(needles)

    brightness = rng.uniform(*_FROST_BRIGHTNESS)
    contrast = rng.uniform(*_FROST_CONTRAST)
    layer = np.float32(brightness) + np.float32(contrast) * _standardised(pattern)[..., None] + _FROST_TINT
    return np.clip(layer, 0, 1)


def _standardised(values: Values) -> Values:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def _water(layer: Values) -> Values:
    """Return (H, W) shading of drops in [0, 1]: bright on one side, dark on the other, by the distance from edges."""
    grey = np.floor(255 * np.clip(layer, 0, 1))
    edges = _edges(grey)
    if edges.any():
        distance = np.minimum(distance_transform_edt(~edges), _EDGE_REACH)
    else:
        distance = np.full(layer.shape, float(_EDGE_REACH))

    smooth = uniform_filter(distance, 3, mode="mirror").astype(int)
    evened = _equalised(smooth)
    padded = np.pad(evened, 1, mode="reflect")
    height, width = layer.shape
    relief = sum(
        weight * padded[row : row + height, column : column + width]
        for (row, column), weight in np.ndenumerate(_RELIEF)
        if weight
    )
    relief = uniform_filter(np.clip(relief, 0, 255).astype(np.float32), 3, mode="mirror")

    shading = grey * relief
    return (shading / max(float(shading.max()), 1e-6)).astype(np.float32)


def _edges(grey: Values) -> Values:
    """Return the (H, W) mask of edges: ridges of the slope that are strong, or weak and joined to strong ones.

    Canny, "A Computational Approach to Edge Detection", PAMI 8, 1986.
    """
    down = sobel(grey, 0, mode="nearest")
    right = sobel(grey, 1, mode="nearest")
    slope = np.abs(down) + np.abs(right)

    # A ridge is at least as steep as both neighbours in the direction of the slope, which is one of four.
    padded = np.pad(slope, 1)
    direction = np.round(np.arctan2(down, right) / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(slope.shape, bool)
    for number, (row, column) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + row : 1 + row + slope.shape[0], 1 + column : 1 + column + slope.shape[1]]
        behind = padded[1 - row : 1 - row + slope.shape[0], 1 - column : 1 - column + slope.shape[1]]
        ridge |= (direction == number) & (slope > behind) & (slope >= ahead)

    weak = ridge & (slope > _EDGE_WEAK)
    return binary_propagation(weak & (slope > _EDGE_STRONG), np.ones((3, 3), bool), weak)


def _equalised(levels: Values) -> Values:
    """Return (H, W) whole levels spread over 0 to 255 so that they are about equally frequent."""
    counts = np.bincount(levels.ravel(), minlength=256).cumsum()
    lowest = counts[counts > 0][0]
    rest = max(int(counts[-1] - lowest), 1)
    table = np.rint((counts - lowest).clip(min=0) * 255 / rest)
    return table[levels].astype(np.float32)
