"""A convolutional stem in place of a ViT's patch embedding."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["ConvStem", "MapStem"]

_CHANNELS = (32, 64, 64, 128, 128)
_STRIDES = (2, 2, 1, 2, 1)


class MapStem(nn.Module):
    """A stem that halves an image several times, and whose maps on the way can be read too.

    Attributes:
        fine_widths: Channels of the maps before the last one, finest first: of strides 2, 4, 8 and so on.
    """

    fine_widths: tuple[int, ...] = ()

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return (B, C, h, w) maps of (B, 3, H, W) images: those of :attr:`fine_widths`, then what the stem returns."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return the last map alone."""
        return self.maps(images)[-1]


class ConvStem(nn.Sequential):
    """Five 3 x 3 convolutions and a projection: (B, 3, H, W) to (B, W', H / 8, W / 8).

    Early convolutions make small vision transformers learn far faster (Xiao et al., NeurIPS 2021). The stem takes
    the place of ``conv1`` in open_clip's VisionTransformer, whose other parts do not notice.

    Args:
        width: W' of the transformer.
        norm: With batch norm, as the stem is trained; without, as it is shipped (see :meth:`fused`).
    """

    def __init__(self, width: int, norm: bool = False) -> None:
        layers: list[nn.Module] = []
        before = 3

        for channels, stride in zip(_CHANNELS, _STRIDES, strict=True):
            layers.append(nn.Conv2d(before, channels, 3, stride, 1, bias=not norm))
            layers += [nn.BatchNorm2d(channels), nn.GELU()] if norm else [nn.GELU()]
            before = channels

        super().__init__(*layers, nn.Conv2d(before, width, 1, bias=False))
        self.width = width
        self.norm = norm

    def fused(self) -> dict[str, Tensor]:
        """Return the state of the same function without batch norm: its running statistics go into the weights."""
        if not self.norm:
            return self.state_dict()

        plain = ConvStem(self.width)
        layers: list[Any] = list(copy.deepcopy(self).eval())
        convolutions = [
            fuse_conv_bn_eval(conv, norm) for conv, norm in zip(layers[:-1:3], layers[1:-1:3], strict=True)
        ]

        places = list(plain)
        for slot, conv in zip((*places[:-1:2], places[-1]), (*convolutions, layers[-1]), strict=True):
            slot.load_state_dict(conv.state_dict())
        return plain.state_dict()
