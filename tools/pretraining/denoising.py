"""What tiny-diffusion learns from: noisy scenes, the embeddings of what they show, and `tiny`'s own eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms.v2 import functional as tvf

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import numpy_rng
from vlprompt.core.trainable import Trainable
from vlprompt.diffusion.denoiser import Denoiser, from_patches, to_patches
from vlprompt.training.batches import Batch, epoch_plan

__all__ = ["ConditionedBatches", "DenoisingModule", "SketchBatches", "SketchModule"]

_GRAIN = 0.03  # standard deviation of the noise that `tiny` looks through; pixels are in [0, 1]
_LEAST, _MOST = 1.0, 5.0  # bounds of the weight; the upper one is min-SNR's gamma


class ConditionedBatches:
    """Batches of images, what they are conditioned on, and the noise they are hidden in.

    A condition has two places: the image's embedding twice, two of its captions, one of each, or zeros (the share
    ``drop``); repeating a vector says no more than saying it once.

    Args:
        images: (N, 64, 64, 3) uint8.
        seen: (N, d) embeddings of the images.
        told: (N, K, d) embeddings of K captions each, K >= 2.
        batch_size: Images per global batch.
        seed: The run's seed.
        drop: Share of the batch without condition, for classifier-free guidance.
        worded: Share of the conditioned ones that are conditioned on captions alone; a third as many on both.
        focus: Times are ``1000 * (1 - u ** focus)`` of uniform u: the larger, the more often there is hardly anything
            but noise, which is where variations are drawn from; 1 is uniform.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        batch_size: int,
        seed: int,
        drop: float = 0.1,
        worded: float = 0.2,
        focus: float = 1.0,
    ) -> None:
        self.images = images
        self.image_embeddings = image_embeddings
        self.text_embeddings = text_embeddings
        self.batch_size = batch_size
        self.seed = seed
        self.drop = drop
        self.worded = worded
        self.focus = focus

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        return epoch_plan(len(self.images), self.batch_size, self.seed, epoch)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`; the batch is what the module's loss reads."""
        rng = numpy_rng(self.seed, "noise and conditions", epoch, int(indices[0]))
        count = len(indices)
        rows = torch.from_numpy(indices)
        condition = self._conditions(indices, rng)
        return {
            "image": self._images(indices),
            "condition": condition,
            "told": self.text_embeddings[rows],
            "view": _view(rng),
            "time": torch.from_numpy((1000 * (1 - rng.random(count) ** self.focus)).astype(np.int64)),
            "noise": torch.from_numpy(rng.standard_normal((count, 48, 16, 16), np.float32)),
        }

    def _images(self, indices: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.stack([self.images[i] for i in indices])).permute(0, 3, 1, 2)

    def _conditions(self, indices: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        count = len(indices)
        rows = torch.from_numpy(indices)
        turn = rng.random(count)
        has_condition = rng.random(count) >= self.drop
        said = np.stack([rng.permutation(self.text_embeddings.shape[1])[:2] for _ in indices])
        text_embeddings = self.text_embeddings[rows[:, None], torch.from_numpy(said)]
        image_embeddings = self.image_embeddings[rows, None].expand(-1, 2, -1)
        both = torch.stack([image_embeddings[:, 0], text_embeddings[:, 0]], 1)
        by_text = torch.from_numpy(turn < self.worded)[:, None, None]
        by_both = torch.from_numpy(turn < self.worded * 4 / 3)[:, None, None]
        condition = torch.where(by_text, text_embeddings, torch.where(by_both, both, image_embeddings))

        return condition * torch.from_numpy(has_condition)[:, None, None]


class SketchBatches(ConditionedBatches):
    """Batches of images of 32 x 32 pixels and what they are conditioned on; drawn from the same arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parts = [np.arange(i, min(i + 256, len(self.images))) for i in range(0, len(self.images), 256)]
        self.small = torch.cat(
            [F.avg_pool2d(self._images(part).float(), 2).to(torch.uint8) for part in parts]
        )

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """Return ``small`` (B, 3, 32, 32) uint8 and ``condition`` (B, 2, d)."""
        rng = numpy_rng(self.seed, "sketches", epoch, int(indices[0]))
        return {"small": self.small[torch.from_numpy(indices)], "condition": self._conditions(indices, rng)}


class SketchModule(nn.Module, Trainable):
    """Trains a denoiser's canvas to hold the sketch, by the squared error: minutes instead of the network's hours.

    Args:
        denoiser: Its canvas learns.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.canvas = denoiser.canvas
        self._whole = [denoiser]  # in a list: the rest of it is no part of this module

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the squared error of sketches in [-1, 1]; the batch is :class:`SketchBatches`'."""
        sketch = self._whole[0].sketch(batch["condition"]).float()
        return {"sketch": F.mse_loss(sketch, batch["small"].float() / 127.5 - 1)}

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the canvas' tensors by name."""
        return {n: t.detach() for n, t in self.canvas.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put tensors back, strictly."""
        self.canvas.load_state_dict(dict(state), strict=True)


def _view(rng: np.random.Generator) -> Tensor:
    """Return left, top and side of a square crop, and the width of a blur, in pixels."""
    side = int(rng.integers(44, 65))
    left, top = rng.integers(0, 65 - side, 2)
    return torch.tensor([left, top, side, rng.uniform(0.3, 1.2)])


class DenoisingModule(nn.Module, Trainable):
    """Trains a :class:`Denoiser` and keeps the running average of its weights that is shipped.

    Beside the squared error of the clean image, weighted by the signal-to-noise ratio within bounds (Hang et al.,
    "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023, with Salimans & Ho's lower bound of one),
    `tiny` itself compares: the embedding of the denoised image with that of the true one, how well the batch's
    captions fit the one and the other, and how each of several questions is answered, since a place or a pattern moves
    the embedding less than a colour and is as much a part of what is seen. Pixels alone would teach the same, much
    later. `tiny` looks at both through the same crop, blur and grain, or the network would learn patterns that deceive
    it and show nothing.

    Args:
        backbone: `tiny`; stays frozen.
        seed: Of the initial weights.
        perception: Weight of the comparison of embeddings.
        naming: Weight of the comparison of fitting captions.
        watched: Share of each batch that they are compared on.
        decay: Of the running average.
        asking: Weight of the comparison of answers.
        questions: The answers to each, (C, d) unit vectors: "top left", "centre", ...
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        seed: int,
        perception: float = 1.0,
        watched: float = 0.5,
        decay: float = 0.998,
        naming: float = 0.0,
        asking: float = 0.0,
        questions: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.denoiser = Denoiser(seed)
        self.perception = perception
        self.naming = naming
        self.watched = watched
        self.decay = decay
        self.asking = asking
        self.questions = questions
        self._eyes = [backbone]  # in a list: no part of this module's parameters
        facts = backbone.fingerprint["preprocess"]

        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(facts[name]).view(1, 3, 1, 1), persistent=False)
        self.restart_average()

    def restart_average(self) -> None:
        """Forget all weights but the present ones."""
        self.steps = 0
        self.average = {n: t.clone() for n, t in self.trainable_state().items()}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted squared error and, of what `tiny` sees, the distance and the divergences.

        Args:
            batch: ``image`` (B, 3, 64, 64) uint8, ``condition`` (B, S, d), ``told`` (B, K, d) embeddings of captions,
                ``view`` (4,) left, top and side of a crop and the width of a blur, ``time`` (B,), ``noise``
                (B, 48, 16, 16).
        """
        clean = to_patches(batch["image"].float() / 255)
        time = batch["time"]
        condition = batch["condition"]
        guess = self.denoiser(self.denoiser.noised(clean, batch["noise"], time), time, condition)
        level = self.denoiser.alphas[time]
        weight = (level / (1 - level)).clamp(_LEAST, _MOST)
        losses = {"pixels": (weight * (guess - clean).square().mean((1, 2, 3))).mean()}

        count = int(self.watched * len(clean))
        if count and (self.perception or self.naming or self.asking):
            losses |= self._perceived(guess[:count], condition[:count], batch)
        return losses

    def _perceived(self, guess: Tensor, condition: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return what `tiny` finds wrong in a batch's first images; those without condition may show anything."""
        images = batch["image"][: len(guess)].float() / 255
        grain = from_patches(batch["noise"][-len(guess) :]) * 2 - 1  # standard normal, of other images

        with torch.no_grad():
            image_embeddings = self._look(images, grain, batch["view"])

        guess_embeddings = self._look(from_patches(guess).clamp(0, 1), grain, batch["view"])
        conditioned = condition.abs().sum((1, 2)) > 0
        share = conditioned / conditioned.sum().clamp(min=1)
        losses = {
            "embeddings": self.perception
            * ((1 - (guess_embeddings * image_embeddings).sum(-1)) * share).sum(),
            "names": self.naming
            * (self._apart(guess_embeddings, image_embeddings, batch["told"].flatten(0, 1)) * share).sum(),
        }

        if self.asking and self.questions:
            apart = torch.stack(
                [self._apart(guess_embeddings, image_embeddings, answers) for answers in self.questions]
            )
            losses["answers"] = self.asking * (apart.mean(0) * share).sum()

        return losses

    def _apart(self, guess_embeddings: Tensor, image_embeddings: Tensor, texts: Tensor) -> Tensor:
        """Return (B,) divergences of how (B, d) embeddings fit (C, d) texts from how others do."""
        actual, expected = (
            (self._eyes[0].logit_scale * e @ texts.T).log_softmax(-1)
            for e in (guess_embeddings, image_embeddings)
        )
        return F.kl_div(actual, expected, reduction="none", log_target=True).sum(-1)

    def _look(self, images: Tensor, grain: Tensor, view: Tensor) -> Tensor:
        """Return `tiny`'s embeddings of a crop, blurred and grained: a pattern that only deceives does not survive."""
        left, top, side, sigma = view.tolist()
        crop = tvf.resized_crop(images, int(top), int(left), int(side), int(side), [64, 64])
        blurred = tvf.gaussian_blur(crop, [5, 5], [sigma, sigma])
        pixels = (blurred + _GRAIN * grain - self.mean) / self.std
        with sdpa_kernel(SDPBackend.MATH):
            return F.normalize(self._eyes[0].vision.encode(pixels).float(), dim=-1)

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the running average; faster at first, or the initial weights would stay in it for long."""
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in self.denoiser.state_dict().items():
            self.average[name].lerp_(tensor, 1 - keep)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the network's tensors by name."""
        return {n: t.detach() for n, t in self.denoiser.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put tensors back, strictly."""
        self.denoiser.load_state_dict(dict(state), strict=True)

    def running_state(self) -> dict[str, Tensor]:
        """Return the running average and its age."""
        return {**self.average, "steps": torch.tensor(self.steps)}

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`running_state` returned."""
        merged = dict(state)
        self.steps = int(merged.pop("steps"))
        self.average = {n: t.clone() for n, t in merged.items()}
