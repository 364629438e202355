"""Attacked images, for evaluation alone: projected gradient descent on pixels against the classifier before adaptation.

Papers: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv 1706.06083,
    section 2.1; with adapters: Sheng et al., "R-TPT", CVPR 2025, arXiv 2504.11195, section 5.

Labels go to the attacker, never to an adapter. The attacker does not know that anything adapts (a non-adaptive attack),
so robust accuracies are upper bounds: an attack through the adapter would find more.

Where this differs from R-TPT's code: an image is attacked through the classifier that all images start from, not
through what the image before left behind; bytes are rounded, not cut off, and brought back into the ball; and clean
images have the geometry of the attacked ones, since both are the crop that the backbone sees.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, DataError, NonFiniteError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.options import check_counts, check_options
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import torch_rng
from vlprompt.data import ImageDataset
from vlprompt.data.base import Reader, Sample
from vlprompt.data.images import pixel_key
from vlprompt.data.transforms import Affine, Preprocess, affine_of
from vlprompt.learners import Learner

__all__ = ["PGD", "AttackedData", "Classifier", "attack_dataset", "static_classifier"]

log = logging.getLogger("vlprompt.run")

Classifier = Callable[[Tensor], Tensor]
"""Takes (B, 3, H, W) pixels in [0, 1], before normalisation; returns (B, C) logits with a graph."""
_NAME = "pixels"  # of the tensor in a file
_PROGRESS_EVERY = 100  # images
_SLACK = 1e-4  # of 255 bytes, what float32 loses


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent on the cross entropy in an L-infinity ball around each image, from a random start.

    Attributes:
        eps: Radius of the ball, in [0, 1] of a pixel's range (papers: 1/255 against ResNets, 4/255 against ViTs). A
            step moves every pixel by a quarter of it.
        steps: Steps of every image (papers: 7 and 100).
        seed: Of the random start, which also depends on the image's key.
        pixels: ``"bytes"``: attacked images are rounded to bytes and brought back into the ball, as a file would hold
            them; ``"floats"``: they are left as they are, the stronger attack.

    Raises:
        ConfigError: If ``eps`` is no number in [0, 1], ``steps`` no whole number from 0 on, or ``pixels`` neither.
    """

    eps: float = 4 / 255
    steps: int = 7
    seed: int = 0
    pixels: Literal["bytes", "floats"] = "bytes"

    def __post_init__(self) -> None:
        if isinstance(self.eps, str) or not 0 <= self.eps <= 1:
            problem = f"eps: {self.eps!r} is not in [0, 1], the range of a pixel; papers' 4 of 255 is 4/255."
            raise ConfigError([problem], "attack")
        check_options(_check_attack, {"steps": self.steps, "pixels": self.pixels}, source="attack")

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor, keys: Sequence[str]) -> Tensor:
        """Return attacked images, (B, 3, H, W) float32 in [0, 1], no pixel further than ``eps`` from the given ones.

        Args:
            classifier: Whose cross entropy rises.
            images: (B, 3, H, W) pixels in [0, 1].
            labels: (B,) true classes.
            keys: B keys, from which the random start is drawn.

        Raises:
            NonFiniteError: If a gradient is NaN or infinite; names the keys.
        """
        clean = images.detach().float()
        low, high = _ball(clean, self.eps)
        starts = []
        for key, image in zip(keys, clean, strict=True):
            noise = torch.rand(image.shape, generator=torch_rng(self.seed, "attack", key))
            starts.append(self.eps * (2 * noise - 1))
        attacked = (clean + torch.stack(starts).to(clean.device)).clamp(low, high)

        for _ in range(self.steps):
            with torch.enable_grad():
                leaf = attacked.requires_grad_()
                # A sum, so that no image's gradient depends on how many there are.
                loss = F.cross_entropy(classifier(leaf), labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, leaf)
            if not bool(gradient.isfinite().all()):
                raise NonFiniteError(f"the gradient of an attack on {', '.join(keys)} is NaN or infinite.")
            attacked = (leaf.detach() + self.eps / 4 * gradient.sign()).clamp(low, high)

        if self.pixels == "floats":
            return attacked
        # The nearest byte may lie outside.
        lowest = (255 * low - _SLACK).ceil()
        highest = (255 * high + _SLACK).floor()
        return (255 * attacked).round().clamp(lowest, highest) / 255


def _check_attack(*, steps: Annotated[int, Field(ge=0)], pixels: Literal["bytes", "floats"]) -> None:
    """Say what some numbers of :class:`PGD` may be."""


@dataclass(frozen=True)
class AttackedData:
    """The same images twice.

    Attributes:
        clean: The crops that the backbone sees, as bytes.
        attacked: These crops under attack.
    """

    clean: ImageDataset
    attacked: ImageDataset


def static_classifier(learner: Learner, weights: Tensor | None = None) -> Classifier:
    """Return a learner's classifier on pixels in [0, 1]; its class weights are computed once.

    Args:
        learner: Its image side is used, and its class weights unless others are given.
        weights: (C, d) unit-length class weights.

    Raises:
        DataError: If the learner classifies by more than class weights, or its preprocessing is not the same at every
            pixel.
    """
    if weights is None and type(learner).logits is not Learner.logits:
        raise DataError(
            f"{learner.title()} classifies by more than class weights, so an attack needs weights of its own."
        )

    backbone = learner.backbone
    affine = _affine(backbone)
    scale = 255 * affine.scale.to(backbone.device)
    shift = affine.shift.to(backbone.device)
    with torch.no_grad():
        rows = (learner.class_weights() if weights is None else weights.to(backbone.device)).float()

    def classify(pixels: Tensor) -> Tensor:
        images = scale * pixels + shift
        # A backbone's own embeddings have no graph.
        embeddings = backbone.vision.encode(images) if learner.static_images else learner.embed_images(images)
        return backbone.logit_scale * F.normalize(embeddings.float(), dim=-1) @ rows.T

    return classify


def attack_dataset(
    data: ImageDataset,
    learner: Learner,
    attack: PGD,
    folder: str | Path,
    *,
    weights: Tensor | None = None,
    batch_size: int = 1,
) -> AttackedData:
    """Attack every image of a data set; what the folder holds already is not attacked again.

    A file's name is a hash of the image, its label, the classifier and the attack, so several data sets, classifiers
    and attacks may share a folder.

    Args:
        data: Its class names must be the learner's; of several labels the first is attacked.
        learner: See :func:`static_classifier`; in evaluation mode.
        attack: The attack.
        folder: Where attacked images are kept.
        weights: See :func:`static_classifier`.
        batch_size: Images attacked together; more are faster on an accelerator. It changes the last bits of gradients,
            and so the sign of the smallest.

    Raises:
        DataError: See :func:`static_classifier`; if class names differ, or an image can't be read.
        CheckpointError: If an attacked image can't be written.
    """
    check_counts(batch_size=batch_size)
    if weights is None and data.classnames != learner.classnames:
        raise DataError(f"{data.name} has other class names than the classifier that is attacked.")

    backbone = learner.backbone
    clean = replace(
        data, reader=_CropReader(data.reader, backbone.preprocess, backbone.image_size, _affine(backbone))
    )
    classifier = static_classifier(learner, weights)
    identity = _identity(learner, weights)
    root = user_path(folder)

    samples = []
    waiting: list[_Victim] = []
    for index, sample in enumerate(data.samples):
        image, label = clean[index]
        victim = _Victim.of(image, label, identity, attack)
        samples.append(Sample(_AttackedSource(sample.source, victim.file), sample.label))
        if not (root / victim.file).is_file():
            waiting.append(victim)

        is_last = index == len(data) - 1
        if waiting and (len(waiting) == batch_size or is_last):
            _attack_together(waiting, classifier, attack, root, backbone)
            waiting = []
        if (index + 1) % _PROGRESS_EVERY == 0:
            log.info("attacked %d of %d images of %s", index + 1, len(data), data.name)

    info = {**data.info, "attack": asdict(attack)}
    return AttackedData(clean, replace(data, samples=tuple(samples), reader=_AttackedReader(root), info=info))


@dataclass(frozen=True)
class _Victim:
    """An image that is to be attacked: uint8 (3, H, W) pixels, and the file that the result is kept in."""

    pixels: Tensor
    label: int
    key: str
    file: str

    @classmethod
    def of(cls, image: Image.Image, label: int, identity: str, attack: PGD) -> _Victim:
        key = pixel_key(image)
        text = "\x1f".join([key, str(label), identity, repr(attack)])
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        return cls(tvf.pil_to_tensor(image), label, key, f"{digest[:2]}/{digest}.safetensors")


def _attack_together(
    victims: Sequence[_Victim], classifier: Classifier, attack: PGD, root: Path, backbone: Backbone
) -> None:
    """Attack images and write them."""
    pixels = torch.stack([victim.pixels for victim in victims]).to(backbone.device).float() / 255
    labels = torch.tensor([victim.label for victim in victims], device=backbone.device)
    attacked = attack.perturb(classifier, pixels, labels, [victim.key for victim in victims])

    for victim, image in zip(victims, attacked.cpu(), strict=True):
        kept = image if attack.pixels == "floats" else _bytes(image)
        write_tensors(root / victim.file, {_NAME: kept})


@dataclass(frozen=True)
class _CropReader(Reader):
    """Reads the crops that a backbone sees, as bytes."""

    inner: Reader
    preprocess: Preprocess
    size: tuple[int, int]
    affine: Affine

    def read(self, source: Any) -> Image.Image:
        prepared = self.preprocess(self.inner.read(source)).float()
        return tvf.to_pil_image(self.affine.undo(prepared))

    def key(self, source: Any) -> str:
        return f"crop {self.size[0]}x{self.size[1]}:{self.inner.key(source)}"

    def stamp(self, source: Any) -> str:
        return f"crop {self.size[0]}x{self.size[1]}:{self.inner.stamp(source)}"


@dataclass(frozen=True)
class _AttackedSource:
    """An attacked image: what it was made of, for people, and its file."""

    original: Any
    file: str

    def __str__(self) -> str:
        return f"{self.original} (attacked)"


@dataclass(frozen=True)
class _AttackedReader(Reader):
    """Reads attacked images from the folder that they were written to."""

    root: Path

    def read(self, source: _AttackedSource) -> Image.Image:
        pixels = self._tensor(source)
        return _image(pixels) if pixels.is_floating_point() else tvf.to_pil_image(pixels)

    def exact(self, source: _AttackedSource) -> Tensor | None:
        pixels = self._tensor(source)
        return pixels if pixels.is_floating_point() else None

    def key(self, source: _AttackedSource) -> str:
        return f"attacked:{source.file}"

    def _tensor(self, source: _AttackedSource) -> Tensor:
        return read_tensors(self.root / source.file)[0][_NAME]


def _ball(clean: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest float32 pixels in [0, 1] that are no further than eps from these.

    The sum clean + eps rounds, perhaps to a number outside; its neighbour is inside then.
    """
    center = clean.double()
    low = (center - eps).clamp(min=0)
    high = (center + eps).clamp(max=1)
    lowest = low.float()
    lowest = torch.where(lowest < low, lowest.nextafter(torch.full_like(lowest, math.inf)), lowest)
    highest = high.float()
    highest = torch.where(highest > high, highest.nextafter(torch.full_like(highest, -math.inf)), highest)
    return lowest, highest


def _affine(backbone: Backbone) -> Affine:
    affine = affine_of(backbone.preprocess, backbone.image_size)
    if affine is None:
        raise DataError(
            f"{backbone.name}: its preprocessing does more to pixels than scale and shift them, so attacked pixels "
            "would not arrive as they are."
        )
    return affine


def _identity(learner: Learner, weights: Tensor | None) -> str:
    """Return a hash of all that the static classifier computes with."""
    with torch.no_grad():
        rows = learner.class_weights() if weights is None else weights
    digest = hashlib.sha256(learner.backbone.features_id.encode())
    digest.update(rows.float().cpu().numpy().tobytes())
    if not learner.static_images:
        for name, tensor in sorted(learner.trainable_state().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _bytes(pixels: Tensor) -> Tensor:
    """Return uint8 of pixels in [0, 1]; they are rounded, where a cast would cut them off."""
    return (255 * pixels).round().clamp(0, 255).to(torch.uint8)


def _image(pixels: Tensor) -> Image.Image:
    return tvf.to_pil_image(_bytes(pixels))
