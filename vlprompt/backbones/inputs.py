"""What a person hands to a tower as images, checked: features of anything else would mean nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlprompt.core.errors import DataError

__all__ = ["check_images"]


def check_images(images: Any, size: tuple[int, int] | None = None) -> None:
    """Refuse what was not preprocessed.

    Args:
        images: (B, 3, H, W) floats.
        size: The only (H, W) that is read; None for any.

    Raises:
        DataError: Says what it is instead.
    """
    if not isinstance(images, Tensor):
        raise DataError(
            "images are a tensor (B, 3, H, W), made by backbone.preprocess of a PIL image; got "
            f"{type(images).__name__}. vlprompt.predict(learner, ...) takes images of any kind."
        )

    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3:
        raise DataError(
            f"images are (B, 3, H, W), as backbone.preprocess makes them and torch.stack joins them; got {shape}."
        )
    if size is not None and shape[2:] != size:
        raise DataError(
            f"the image tower reads {size[0]} x {size[1]} (H x W) pixels; got {shape[2]} x {shape[3]}. "
            "backbone.preprocess makes them of a PIL image."
        )
    if not images.is_floating_point():
        raise DataError(
            f"images are floats, as backbone.preprocess makes them; got {str(images.dtype).partition('.')[2]}, raw "
            "pixels. vlprompt.predict(learner, ...) takes these."
        )
