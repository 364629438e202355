"""Digital: brightness, contrast, saturation, elastic transforms, pixels and JPEG (arXiv 1903.12261, section 4)."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from vlprompt.data.corruptions import CORRUPTIONS, Values

__all__ = ["brightness", "contrast", "elastic_transform", "jpeg_compression", "pixelate", "saturate"]

_SMOOTHNESS = 0.01  # of elastic displacements: the Gaussian's deviation, as a share of the side
_REACH = 0.005  # of the draws before they are smoothed, as a share of the height


@CORRUPTIONS.register("brightness", summary="a brighter image", levels=(0.1, 0.2, 0.3, 0.4, 0.5))
def brightness(values: Values, amount: float, rng: np.random.Generator) -> Values:
    """Add to the value of hue, saturation and value."""
    value = values.max(2, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    # Hue and saturation are ratios, so every channel grows alike; black has none and becomes grey.
    return np.where(value > 0, values * brighter / np.maximum(value, 1e-6), brighter)


@CORRUPTIONS.register("contrast", summary="less contrast", levels=(0.4, 0.3, 0.2, 0.1, 0.05))
def contrast(values: Values, share: float, rng: np.random.Generator) -> Values:
    """Keep a share of every channel's distance from its mean."""
    means = values.mean((0, 1), keepdims=True)
    return means + share * (values - means)


@CORRUPTIONS.register(
    "saturate", summary="paler, then more colourful", levels=((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
)
def saturate(values: Values, level: tuple[float, float], rng: np.random.Generator) -> Values:
    """Multiply the saturation of hue, saturation and value, and add to it; the hue of grey is red."""
    factor, shift = level
    value = values.max(2, keepdims=True)
    distance = value - values
    saturation = distance.max(2, keepdims=True) / np.maximum(value, 1e-6)
    wanted = np.clip(factor * saturation + shift, 0, 1)

    red = value * (1 - wanted * np.array((0, 1, 1), np.float32))
    return np.where(saturation > 0, value - distance * wanted / np.maximum(saturation, 1e-6), red)


@CORRUPTIONS.register(
    "elastic_transform", summary="small regions pulled about", levels=(12.5, 16.25, 21.25, 25.0, 30.0)
)
def elastic_transform(values: Values, strength: float, rng: np.random.Generator) -> Values:
    """Read every pixel from a place nearby, displaced by smoothed noise."""
    height, width = values.shape[:2]
    reach = _REACH * height
    sigmas = (_SMOOTHNESS * height, _SMOOTHNESS * width)
    right, down = (
        strength * gaussian_filter(rng.uniform(-reach, reach, (height, width)), sigmas, truncate=3)
        for _ in range(2)
    )
    places = np.mgrid[:height, :width] + np.stack([down, right])
    channels = [map_coordinates(values[..., c], places, order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, 2)


@CORRUPTIONS.register("pixelate", summary="large pixels", levels=(0.6, 0.5, 0.4, 0.3, 0.25))
def pixelate(values: Values, share: float, rng: np.random.Generator) -> Values:
    """Bring the image to a share of its size and back."""
    image = _image(values)
    small = image.resize((int(image.width * share), int(image.height * share)), Image.Resampling.BOX)
    return _values(small.resize(image.size, Image.Resampling.NEAREST))


@CORRUPTIONS.register("jpeg_compression", summary="JPEG of low quality", levels=(25, 18, 15, 10, 7))
def jpeg_compression(values: Values, quality: int, rng: np.random.Generator) -> Values:
    """Compress the image and open it again."""
    data = io.BytesIO()
    _image(values).save(data, "JPEG", quality=quality)
    with Image.open(data) as compressed:
        return _values(compressed.convert("RGB"))


def _image(values: Values) -> Image.Image:
    return Image.fromarray(np.rint(255 * values).astype(np.uint8))


def _values(image: Image.Image) -> Values:
    # A little above what was a byte, so that cutting gives that byte back.
    return (np.asarray(image, np.float32) + 0.1) / 255
