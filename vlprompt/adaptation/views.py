"""Views of an image: the image itself, then random crops and flips, with AugMix on top if asked.

Every view is a function of (seed, image, view number), and does not depend on the batch, on the order of the stream or
on the number of workers.

AugMix differs from ``torchvision.transforms.AugMix`` in two points: it has the strength that test-time prompt tuning
uses (severity 1 of the authors' scale; at torchvision's severity 1 the geometric operations do nothing), and it mixes
after normalisation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.core.options import matching
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.decoding import read_image
from vlprompt.data.images import pixel_key
from vlprompt.data.inputs import open_image
from vlprompt.data.transforms import Cut, affine_of, crop_box, cut_views

__all__ = ["Augment", "Images", "OpenedImage", "ViewPlan", "open_images"]

Augment = Annotated[
    str,
    matching(
        r"(crop_flip|crop_flip_pil|augmix)(:(0?\.\d*[1-9]\d*|1|1\.0*))?",
        "crop_flip, crop_flip_pil or augmix, or one of these with the least share of the image in (0, 1], such as "
        "crop_flip:0.5",
    ),
]
"""``crop_flip``, ``crop_flip_pil`` or ``augmix``; ``crop_flip:0.5`` cuts crops of at least half of the image."""
Images = Tensor | Image.Image | str | Path | Sequence[Image.Image | str | Path | Tensor]
_LEAST_AREA = 0.08  # of a crop, as a share of the image, as in torchvision's RandomResizedCrop
_CHAINS = 3  # of AugMix


@dataclass(frozen=True)
class OpenedImage:
    """One sample.

    Attributes:
        key: A hash of its pixels, from which its views are drawn: the same image has the same views, whether it comes
            as a file, a PIL image or a tensor.
        image: RGB; None for ready-made views.
        first: (3, H, W) view 0, if the image came as preprocessed pixels; None if the backbone has to preprocess it.
        ready: (V, 3, H, W) ready-made views; no others are made then.
        crops: What :meth:`ViewPlan.cut` returned for some plans, if a loading worker did it already.
    """

    key: str
    image: Image.Image | None
    first: Tensor | None = None
    ready: Tensor | None = None
    crops: Mapping[ViewPlan, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ViewPlan:
    """How views are made.

    Attributes:
        count: V, including view 0, the image as the backbone's preprocessing gives it.
        augment: ``"crop_flip"`` (a crop of 8 to 100 % of the area, bilinear, then a left-right flip of half of
            them), ``"crop_flip_pil"`` (the same crops, cut and resized by Pillow as the papers' code does) or
            ``"augmix"`` (these, then AugMix); ``"crop_flip:0.5"`` cuts 50 to 100 %.
        seed: Of all draws.
    """

    count: int = 64
    augment: Augment = "crop_flip"
    seed: int = 0

    def make(self, opened: OpenedImage, backbone: Backbone) -> Tensor:
        """Return (V, 3, H, W) preprocessed views."""
        if opened.ready is not None:
            return opened.ready
        image = opened.image
        assert image is not None

        first = backbone.preprocess(image) if opened.first is None else opened.first
        if self.count == 1:
            return first[None]

        affine = affine_of(backbone.preprocess, backbone.image_size) if self.kind == "crop_flip" else None
        if affine is None:
            rest = [self._by_pillow(image, opened.key, number, backbone) for number in range(1, self.count)]
            return torch.stack([first, *rest])

        crops = opened.crops.get(self)
        if crops is None:
            crops = self.cut(image, opened.key, backbone.image_size)
        views = torch.empty(self.count, *first.shape)
        views[0] = first
        affine(crops, out=views[1:])
        return views

    @property
    def kind(self) -> str:
        """The name of ``augment``, without its share."""
        return self.augment.partition(":")[0]

    def cut(self, image: Image.Image, key: str, size: tuple[int, int]) -> Tensor:
        """Return the crops behind view 0, (V - 1, 3, H, W) uint8, of an image that was decoded once."""
        cuts = [self._cut(image, self._draws(key, number)) for number in range(1, self.count)]
        return cut_views(image, cuts, size, "bilinear")

    def _draws(self, key: str, number: int) -> np.random.Generator:
        return numpy_rng(self.seed, "view", key, number)

    def _cut(self, image: Image.Image, rng: np.random.Generator) -> Cut:
        least = float(self.augment.partition(":")[2] or _LEAST_AREA)
        box = crop_box(image.height, image.width, (least, 1.0), rng.random)
        return Cut(*box, flipped=rng.random() < 0.5)

    def _by_pillow(self, image: Image.Image, key: str, number: int, backbone: Backbone) -> Tensor:
        """Return one view, cut by Pillow."""
        rng = self._draws(key, number)
        cut = self._cut(image, rng)
        box = (cut.top, cut.left, cut.height, cut.width)
        crop = tvf.resized_crop(image, *box, list(backbone.image_size), InterpolationMode.BILINEAR)
        if cut.flipped:
            crop = tvf.horizontal_flip(crop)
        return augmix(crop, backbone.preprocess, rng) if self.kind == "augmix" else backbone.preprocess(crop)


def open_images(images: Images, backbone: Backbone) -> list[OpenedImage]:
    """Return images of whatever a user has.

    Args:
        images: PIL images and paths, one or several; an uint8 tensor (B, 3, h, w) of RGB values; a float tensor
            (B, 3, H, W) of preprocessed pixels, as learners take (its views are crops of the image it shows); or a
            float tensor (B, V, 3, H, W) of ready-made views. The axis B may be missing before (3, ...).
        backbone: Says H and W, and undoes its normalisation.

    Raises:
        DataError: If there is nothing, an image can't be read (it is named) or a tensor's shape doesn't fit.
    """
    if isinstance(images, Tensor):
        return _from_tensor(images, backbone)
    if isinstance(images, (Image.Image, str, Path)):
        images = [images]

    opened: list[OpenedImage] = []
    for image in images:
        opened += _open(image, backbone)
    if not opened:
        raise DataError("no images to adapt to: the batch is empty.")
    return opened


def augmix(
    image: Image.Image, preprocess: Callable[[Image.Image], Tensor], rng: np.random.Generator
) -> Tensor:
    """Return m * x + (1 - m) * sum_i w_i chain_i(x) of an RGB image x, mixed after normalisation.

    Hendrycks et al., "AugMix", ICLR 2020, algorithm 1, with 3 chains of 1 to 3 operations at severity 1 and no
    operation that changes colour, as test-time prompt tuning uses it: m ~ Beta(1, 1), w ~ Dirichlet(1, 1, 1).

    Args:
        image: x.
        preprocess: Returns (3, H, W) normalised pixels.
        rng: Of all draws.

    Returns:
        (3, H, W).
    """
    plain = preprocess(image)
    weights = rng.dirichlet([1.0] * _CHAINS)
    share = rng.beta(1.0, 1.0)

    mixed = torch.zeros_like(plain)
    for weight in weights:
        chained = image
        for _ in range(rng.integers(1, 4)):
            operation = _OPERATIONS[rng.integers(len(_OPERATIONS))]
            level = rng.uniform(0.1, 1.0)
            chained = operation(chained, level, rng)
        mixed += float(weight) * preprocess(chained)
    return share * plain + (1 - share) * mixed


def _rotate(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return tvf.rotate(image, _signed(int(3 * level), rng), InterpolationMode.BILINEAR)


def _shear(axis: int) -> Callable[[Image.Image, float, np.random.Generator], Image.Image]:
    def shear(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
        angles = [0.0, 0.0]
        angles[axis] = math.degrees(math.atan(_signed(0.03 * level, rng)))
        return tvf.affine(image, 0.0, [0, 0], 1.0, angles, InterpolationMode.BILINEAR, center=[0.0, 0.0])

    return shear


def _translate(axis: int) -> Callable[[Image.Image, float, np.random.Generator], Image.Image]:
    def translate(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
        shift = [0, 0]
        shift[axis] = int(_signed(int(level * image.size[axis] / 30), rng))
        return tvf.affine(image, 0.0, shift, 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)

    return translate


def _signed(value: float, rng: np.random.Generator) -> float:
    """Return the value with a random sign."""
    return -value if rng.random() > 0.5 else value


# At severity 1 the authors' posterize keeps 4 bits whatever the level: int(0.4 * level) is 0.
_OPERATIONS: tuple[Callable[[Image.Image, float, np.random.Generator], Image.Image], ...] = (
    lambda image, level, rng: tvf.autocontrast(image),
    lambda image, level, rng: tvf.equalize(image),
    lambda image, level, rng: tvf.posterize(image, 4),
    lambda image, level, rng: tvf.solarize(image, 256 - int(25.6 * level)),
    _rotate,
    _shear(0),
    _shear(1),
    _translate(0),
    _translate(1),
)


def _open(image: Image.Image | str | Path | Tensor, backbone: Backbone) -> list[OpenedImage]:
    if isinstance(image, Tensor):
        return _from_tensor(image, backbone)

    if isinstance(image, Image.Image):
        rgb = open_image(image)
    elif isinstance(image, (str, Path)):
        rgb = read_image(image)
    else:
        raise DataError(f"an image is a PIL image, a path or a tensor; got {type(image).__name__}.")

    return [OpenedImage(pixel_key(rgb), rgb)]


def _from_tensor(images: Tensor, backbone: Backbone) -> list[OpenedImage]:
    """Return the images of a tensor in any of the forms of :func:`open_images`."""
    size = tuple(backbone.image_size)
    shape = tuple(images.shape)
    if images.dim() == 3:
        images = images[None]
    if images.dim() not in (4, 5) or images.shape[-3] != 3:
        raise DataError(f"a tensor of images is (B, 3, H, W), of views (B, V, 3, H, W); got {shape}.")
    if not len(images) or (images.dim() == 5 and not images.shape[1]):
        raise DataError(f"no images to adapt to: the batch is empty, {shape}.")

    if images.dtype == torch.uint8 and images.dim() == 4:
        opened = [tvf.to_pil_image(image.cpu()) for image in images]
        return [OpenedImage(pixel_key(image), image) for image in opened]

    if not images.is_floating_point() or tuple(images.shape[-2:]) != size:
        raise DataError(
            f"a float tensor holds pixels preprocessed for the backbone, {size[0]} x {size[1]}, an uint8 tensor "
            f"(B, 3, h, w) RGB values; got {str(images.dtype).removeprefix('torch.')} {shape}."
        )
    images = images.detach().cpu().float()
    if images.dim() == 5:
        return [OpenedImage(_tensor_key(views), None, ready=views) for views in images]

    # Crops are cut from an image, so the normalisation is undone.
    preprocessing = backbone.fingerprint["preprocess"]
    mean = torch.tensor(preprocessing["mean"])[:, None, None]
    std = torch.tensor(preprocessing["std"])[:, None, None]
    restored = []
    for pixels in images:
        # Rounded: a cast would cut off what float32 lost of a whole number.
        rgb = (255 * (pixels * std + mean)).round().clamp(0, 255).to(torch.uint8)
        image = tvf.to_pil_image(rgb)
        restored.append(OpenedImage(_tensor_key(pixels), image, first=pixels))
    return restored


def _tensor_key(pixels: Tensor) -> str:
    """Return 32 hex digits of the shape and all values."""
    content = f"{tuple(pixels.shape)}".encode() + pixels.contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:32]
