"""Noise: Gaussian, shot, impulse and speckle (Hendrycks and Dietterich, arXiv 1903.12261, section 4)."""

from __future__ import annotations

import numpy as np

from vlprompt.data.corruptions import CORRUPTIONS, Values

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


@CORRUPTIONS.register(
    "gaussian_noise", summary="normal noise, as of low light", levels=(0.08, 0.12, 0.18, 0.26, 0.38)
)
def gaussian_noise(values: Values, deviation: float, rng: np.random.Generator) -> Values:
    """Add normal noise of a standard deviation, in units of white."""
    return values + rng.normal(scale=deviation, size=values.shape)


@CORRUPTIONS.register("shot_noise", summary="noise of counted light", levels=(60, 25, 12, 5, 3))
def shot_noise(values: Values, photons: float, rng: np.random.Generator) -> Values:
    """Count ``photons`` at white, fewer where it is darker: Poisson noise."""
    return rng.poisson(values * photons) / photons


@CORRUPTIONS.register(
    "impulse_noise", summary="values that are black or white", levels=(0.03, 0.06, 0.09, 0.17, 0.27)
)
def impulse_noise(values: Values, share: float, rng: np.random.Generator) -> Values:
    """Set a share of the values to 0 or to 1, half of them each; channels are hit alone."""
    hit = rng.random(values.shape) <= share
    white = rng.random(values.shape) <= 0.5
    return np.where(hit, white, values)


@CORRUPTIONS.register(
    "speckle_noise", summary="noise in proportion to the value", levels=(0.15, 0.2, 0.35, 0.45, 0.6)
)
def speckle_noise(values: Values, deviation: float, rng: np.random.Generator) -> Values:
    """Multiply by 1 plus normal noise of a standard deviation."""
    return values * (1 + rng.normal(scale=deviation, size=values.shape))
