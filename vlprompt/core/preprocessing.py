"""What can be asked for by name of how images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.core.errors import ConfigError
from vlprompt.core.options import describe_problems

__all__ = ["PreprocessOptions", "ResizeMode", "read_preprocess_options"]

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
    if preprocess is not None and not isinstance(preprocess, Mapping):
        raise ConfigError([f"preprocess: it is made of keys and values, got {preprocess!r}."], source)
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
