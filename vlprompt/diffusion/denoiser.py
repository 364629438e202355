"""The network of ``tiny-diffusion``: a small diffusers UNet on 64 x 64 images, conditioned on `tiny`'s embeddings.

An image is cut into 4 x 4 patches (48 channels on a 16 x 16 grid, an orthogonal change of coordinates), which makes
a step cheap enough for a CPU. The condition is a sequence of vectors of the joint space of `tiny`: embeddings of images
or sentences, or learned vectors. Each vector is a token of cross-attention. Their mean is added to the embedding of the
time, and it is unfolded into a canvas of further channels beside the noisy image, because convolutions alone do not
know where "top left" is. Twelve channels of the canvas are a sketch, an image of 32 x 32 pixels, to which the network
adds detail.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.core.errors import BackboneError, DataError
from vlprompt.core.files import read_tensors
from vlprompt.core.seeding import seeded_modules
from vlprompt.diffusion.base import import_diffusers

__all__ = ["WEIGHTS", "Denoiser", "Scheduler", "from_patches", "load_denoiser", "to_patches"]

#: Where the packed weights lie inside the package.
WEIGHTS = Path(str(files("vlprompt.diffusion"))) / "weights" / "tiny_diffusion.safetensors"

Scheduler = Literal["renoise", "ddim", "dpm"]
_PATCH = 4
_LEAST_NOISE = 800  # last time of "renoise"; at lower times the network copies what it drew before
_CANVAS = 16  # channels of the canvas
_HIDDEN = 256  # width of the layer before the canvas
_SKETCH = 12  # channels of the canvas that are the sketch: 3 colours of 2 x 2 pixels


def to_patches(images: Tensor) -> Tensor:
    """Return (B, 48, 16, 16) patches in [-1, 1] of (B, 3, 64, 64) images in [0, 1]."""
    return F.pixel_unshuffle(images * 2 - 1, _PATCH)


def from_patches(patches: Tensor) -> Tensor:
    """Return (B, 3, 64, 64) images, nominally in [0, 1], of (B, 48, 16, 16) patches."""
    return (F.pixel_shuffle(patches, _PATCH) + 1) / 2


class Denoiser(nn.Module):
    """Predicts a clean image from a noisy one and a condition.

    The noise schedule is the cosine one (Nichol & Dhariwal, ICML 2021) in 1,000 steps. The network predicts the clean
    image: a network as small as this that predicts the noise would leave some of it in the image.

    Args:
        seed: Of the random weights.

    Attributes:
        alphas: (1000,) cumulative products: the share of the image in a noisy image's variance.
        dim: d, length of a condition's vectors.

    Raises:
        BackboneError: If diffusers is not installed; says what to do.
    """

    alphas: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        config = json.loads((files("vlprompt.diffusion") / "tiny_unet.json").read_text(encoding="utf-8"))

        with seeded_modules(seed, "tiny-diffusion", "initialisation"):
            self.unet = import_diffusers().UNet2DConditionModel(**config)
            self.dim = int(config["cross_attention_dim"])
            side = int(config["sample_size"])
            self.canvas = nn.Sequential(
                nn.Linear(self.dim, _HIDDEN),
                nn.SiLU(),
                nn.Linear(_HIDDEN, _CANVAS * side**2),
                nn.Unflatten(1, (_CANVAS, side, side)),
            )

        self.register_buffer("alphas", self._scheduler("ddim").alphas_cumprod.clone(), persistent=False)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Return the (B, 48, 16, 16) clean patches that noisy ones most likely come from, on average.

        Args:
            noisy: (B, 48, 16, 16), see :meth:`noised`.
            time: (B,) integers in 0 .. 999.
            condition: (B, S, d) unit vectors of the joint space; zeros mean "anything".

        Raises:
            DataError: If the condition has another shape.
        """
        if condition.dim() != 3 or condition.shape[-1] != self.dim or len(condition) != len(noisy):
            raise DataError(
                f"a condition is (B, S, {self.dim}) with B = {len(noisy)}; got {tuple(condition.shape)}."
            )

        tokens = condition * self.dim**0.5  # entries of about one, like the other inputs of the network
        # For at most 64 positions the plain attention is faster on a CPU than the fused one, and as exact.
        with sdpa_kernel(SDPBackend.MATH):
            mean = tokens.mean(1)
            canvas = self.canvas(mean)
            channels = torch.cat([noisy, canvas], 1)
            detail = self.unet(channels, time, tokens, class_labels=mean, return_dict=False)[0]

        # In float32, so that half precision inside the network does not show in smooth areas of the image.
        sketch = F.interpolate(_sketch(canvas).float(), scale_factor=2, mode="bilinear", align_corners=False)
        return detail.float() + F.pixel_unshuffle(sketch, _PATCH)

    def sketch(self, condition: Tensor) -> Tensor:
        """Return (B, 3, 32, 32) images, nominally in [-1, 1], that conditions (B, S, d) stand for on average."""
        return _sketch(self.canvas(condition.mean(1) * self.dim**0.5))

    def noised(self, patches: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Return patches (B, 48, 16, 16) with as much noise as belongs to a time (B,)."""
        level = self.alphas[time].view(-1, 1, 1, 1)
        return level.sqrt() * patches + (1 - level).sqrt() * noise

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        noise: Tensor,
        steps: int = 2,
        guidance: float = 1.0,
        scheduler: Scheduler = "renoise",
    ) -> Tensor:
        """Return (B, 3, 64, 64) images in [0, 1], which depend on condition and noise alone.

        Args:
            condition: (B, S, d), see :meth:`forward`.
            noise: (B, N, 48, 16, 16) standard normal; N is at least ``steps`` for ``"renoise"``, else 1.
            steps: Passes through the network; twice as many rows under guidance.
            guidance: Weight of the condition against none (Ho & Salimans, 2022); 1 switches guidance off.
            scheduler: ``"renoise"`` hides the image in fresh noise before it is denoised again, as consistency models
                are sampled (Song et al., ICML 2023, algorithm 1). ``"ddim"`` and ``"dpm"`` (DPM-Solver++) solve an
                equation that holds for networks that predict the mean image. This network was also trained to match
                embeddings, so it predicts something else, and the errors of the solvers add up.
        """
        noise = noise.to(condition.device)
        if scheduler == "renoise":
            patches = self._renoise(condition, noise, steps, guidance)
        else:
            patches = self._solve(condition, noise[:, 0], steps, guidance, self._scheduler(scheduler))
        return from_patches(patches).clamp(0, 1)

    def _renoise(self, condition: Tensor, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Denoise fresh noise at each of ``steps`` times, from the largest to ``_LEAST_NOISE``."""
        patches = noise[:, 0]
        times = torch.linspace(len(self.alphas) - 1, _LEAST_NOISE, steps).long().tolist()
        for step, time in enumerate(times):
            batch_time = torch.full((len(patches),), time, device=patches.device)
            if step:
                patches = self.noised(patches, noise[:, step], batch_time)
            patches = self._guided(patches, batch_time, condition, guidance)

        return patches

    def _solve(self, condition: Tensor, start: Tensor, steps: int, guidance: float, solver: Any) -> Tensor:
        """Follow a scheduler of diffusers from pure noise."""
        solver.set_timesteps(steps)
        patches = start

        for time in solver.timesteps:
            batch_time = torch.full((len(start),), int(time), device=start.device)
            clean = self._guided(patches, batch_time, condition, guidance)
            patches = solver.step(clean, time, patches, return_dict=False)[0]

        return patches

    def _guided(self, noisy: Tensor, time: Tensor, condition: Tensor, guidance: float) -> Tensor:
        """Return clean patches, moved away from those without a condition (Ho & Salimans, 2022)."""
        clean = self(noisy, time, condition)
        if guidance == 1:
            return clean

        free = self(noisy, time, torch.zeros_like(condition))
        return free + guidance * (clean - free)

    @staticmethod
    def _scheduler(name: str) -> Any:
        # The same noise schedule for both; the network predicts the clean image, which diffusers calls the sample.
        facts = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
        if name == "dpm":
            kind = import_diffusers().DPMSolverMultistepScheduler
            return kind(**facts, timestep_spacing="trailing", final_sigmas_type="zero")
        kind = import_diffusers().DDIMScheduler
        return kind(**facts, clip_sample=True, set_alpha_to_one=True, timestep_spacing="trailing")


def _sketch(canvas: Tensor) -> Tensor:
    """Return the (B, 3, 32, 32) sketch of a (B, 16, 16, 16) canvas."""
    return F.pixel_shuffle(canvas[:, :_SKETCH], 2)


def load_denoiser(path: Path | None = None) -> Denoiser:
    """Return the denoiser with packed weights, frozen.

    Args:
        path: Another packed file; default: the shipped one.

    Raises:
        BackboneError: If the file does not fit, or diffusers is not installed.
        CheckpointError: If the file is missing or damaged.
    """
    packed, _ = read_tensors(path or WEIGHTS)  # in half precision, to keep the package small
    model = Denoiser()

    try:
        model.load_state_dict({n: t.float() for n, t in packed.items()}, strict=True)
    except RuntimeError as error:
        raise BackboneError(f"{path or WEIGHTS} does not fit tiny-diffusion: {error}") from error
    return model.requires_grad_(False).eval()
