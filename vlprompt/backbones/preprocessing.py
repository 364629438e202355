"""How pixels become a tower's input, and how that is changed on a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from vlprompt.backbones.base import Backbone, content_id
from vlprompt.core.errors import DataError
from vlprompt.core.pixels import to_rgb

__all__ = ["change_preprocessing", "preprocessing_facts", "transform_of"]


def preprocessing_facts(config: PreprocessCfg) -> dict[str, Any]:
    """Return a preprocessing as a fingerprint holds it."""
    size = list(config.size) if isinstance(config.size, (tuple, list)) else config.size
    facts = {
        "size": size,
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": config.interpolation,
        "resize_mode": config.resize_mode,
    }
    # Only what pads has a colour; without the key, identities stay what they were.
    return {**facts, "fill_color": config.fill_color} if config.fill_color else facts


def transform_of(config: PreprocessCfg) -> Callable[[Image.Image], Tensor]:
    """Return the function from a PIL image of any mode to a (3, H, W) tensor."""
    return _AnyMode(image_transform_v2(config, is_train=False))


@dataclass(frozen=True)
class _AnyMode:
    """Prepares an image of any mode as its file would be read.

    open_clip's own transform cuts more than 8 bits off, and puts black under transparency.
    """

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return (3, H, W).

        Raises:
            DataError: If it is no PIL image.
        """
        if not isinstance(image, Image.Image):
            raise DataError(
                f"backbone.preprocess takes a PIL image; got {type(image).__name__}. vlprompt.predict(learner, ...) "
                "takes paths and arrays, too."
            )
        return self.transform(to_rgb(image))


def change_preprocessing(backbone: Backbone, changes: Mapping[str, Any]) -> None:
    """Prepare a backbone's images in another way, in place.

    Args:
        backbone: A new one, that nobody else uses.
        changes: Fields of ``PreprocessCfg``.
    """
    if not changes:
        return

    config = PreprocessCfg(**{**backbone.fingerprint["preprocess"], **changes})
    backbone.preprocess = transform_of(config)
    fingerprint = {**backbone.fingerprint, "preprocess": preprocessing_facts(config)}
    fingerprint["id"] = content_id(fingerprint)
    backbone.fingerprint = fingerprint
