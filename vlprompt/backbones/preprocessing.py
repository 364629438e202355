"""How pixels become a tower's input: what can be asked for by name, and how it is put on a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from vlprompt.backbones.base import Backbone, content_id
from vlprompt.core.errors import ConfigError
from vlprompt.core.options import describe_problems

__all__ = [
    "PreprocessOptions",
    "ResizeMode",
    "change_preprocessing",
    "preprocessing_facts",
    "read_preprocess_options",
    "transform_of",
]

ResizeMode = Literal["shortest", "longest", "squash"]
"""Keep proportions and crop, keep them and pad, or don't keep them."""

_Channels = tuple[float, float, float]
_Positive = Annotated[float, Field(gt=0)]


class PreprocessOptions(BaseModel):
    """The ``preprocess`` option: what weights were trained with. What is left out comes from the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: _Channels | None = Field(None, description="of red, green and blue, of pixels in [0, 1]")
    std: tuple[_Positive, _Positive, _Positive] | None = Field(None, description="of red, green and blue")
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: ResizeMode | None = Field(
        None, description="keep proportions and crop, keep them and pad, or don't keep them"
    )
    fill_color: Annotated[int, Field(ge=0, le=255)] | None = Field(
        None, description="grey that resize_mode longest pads with"
    )


def read_preprocess_options(
    preprocess: Mapping[str, Any] | None, resize: str | None, source: str
) -> dict[str, Any]:
    """Return what was asked for, by the names of open_clip's ``PreprocessCfg``.

    Args:
        preprocess: See :class:`PreprocessOptions`.
        resize: Another way to say ``resize_mode``.
        source: What they are options of, for messages.

    Raises:
        ConfigError: For an unknown key, a bad value, or two different modes of resizing.
    """
    content = {key: value for key, value in dict(preprocess or {}).items() if value is not None}
    if resize is not None:
        content.setdefault("resize_mode", resize)

    try:
        options = PreprocessOptions.model_validate(content)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, PreprocessOptions, "preprocess"), source) from error

    if resize is not None and options.resize_mode != resize:
        raise ConfigError(
            [
                f"resize is {resize!r}, preprocess.resize_mode is {options.resize_mode!r}: leave one of them out."
            ],
            source,
        )
    return options.model_dump(exclude_none=True)


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
    """Return the function from a PIL image to a (3, H, W) tensor."""
    return image_transform_v2(config, is_train=False)


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
