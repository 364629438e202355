"""``tiny-diffusion``: variations of images, and images of sentences, by the embedded denoiser; offline.

For other conditions: :meth:`TinyDiffusion.from_condition` takes a sequence of S vectors of length d per image, for
example learned ones; :attr:`TinyDiffusion.denoiser` is differentiable in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from vlprompt.backbones import create_backbone
from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import derive_seed
from vlprompt.core.weights import weights_id
from vlprompt.diffusion import GENERATORS
from vlprompt.diffusion.base import Generator, missing_diffusers
from vlprompt.diffusion.denoiser import Scheduler, load_denoiser

__all__ = ["TinyDiffusion"]


@GENERATORS.register(
    "tiny-diffusion", summary="embedded, offline: drawn scenes that share `tiny`'s embedding, from pure noise"
)
class TinyDiffusion(Generator):
    """Makes 64 x 64 images from the embedding by `tiny` of an image or of a sentence.

    Like Stable Diffusion's image variation, it keeps the content as far as the embedding describes it, and no pixel.

    Args:
        steps: Denoising steps.
        guidance: Weight of the condition; 1 switches guidance off, which halves the time.
        scheduler: See :meth:`vlprompt.diffusion.denoiser.Denoiser.sample`.
        weights: A packed file of one's own (``tools/pretrain.py --cfg pretrain_tiny_diffusion.yaml``); None: the
            package's.
        device: Where to run; None: a GPU if there is one.
        batch: Images per call.

    Attributes:
        denoiser: The network, see :class:`vlprompt.diffusion.denoiser.Denoiser`.
        backbone: `tiny`, whose embeddings are the conditions.

    Raises:
        BackboneError: If diffusers is not installed, or the weights don't fit.
        CheckpointError: If the weights' file is missing or damaged.
    """

    title = "tiny-diffusion"

    def __init__(
        self,
        *,
        steps: Annotated[int, Field(ge=1, le=1000)] = 2,
        guidance: Annotated[float, Field(ge=0)] = 1.0,
        scheduler: Scheduler = "renoise",
        weights: str | None = None,
        device: str | None = None,
        batch: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.denoiser = load_denoiser(user_path(weights) if weights else None).to(target)
        self.backbone = create_backbone("tiny").to(target)
        self.steps = steps
        self.guidance = guidance
        self.scheduler = scheduler
        self.batch = batch
        self.identity = {
            "kind": "tiny-diffusion",
            "weights": weights_id(self.denoiser.state_dict()),
            "condition": self.backbone.fingerprint["id"],
            "steps": steps,
            "guidance": guidance,
            "scheduler": scheduler,
        }

    @classmethod
    def missing(cls, options: Mapping[str, Any]) -> str | None:
        """See :meth:`Generator.missing`."""
        weights = options.get("weights")
        if weights and not user_path(weights).is_file():
            return f"the weights {weights} of tiny-diffusion do not exist."
        return missing_diffusers()

    def draw(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        """See :meth:`Generator.draw`."""
        pixels = torch.stack([self.backbone.preprocess(image) for image in images])
        return self.from_condition(self.backbone.encode_image(pixels)[:, None], seeds)

    def from_text(self, texts: Sequence[str], n: int, seed: int = 0) -> list[list[Image.Image]]:
        """Return n images of each sentence.

        Args:
            texts: B sentences like those that `tiny` was pretrained on: descriptions of images of one or two objects.
            n: Images of each.
            seed: Of all noise; image k of a sentence depends on (seed, sentence, k) alone.
        """
        conditions = self.backbone.encode_text(list(texts)).repeat_interleave(n, 0)[:, None]
        seeds = []
        for text in texts:
            seeds += [derive_seed(seed, "generate", text, number) for number in range(n)]

        images: list[Image.Image] = []
        for start in range(0, len(seeds), self.batch):
            part = slice(start, start + self.batch)
            images += self.from_condition(conditions[part], seeds[part])
        return [images[start : start + n] for start in range(0, len(images), n)]

    def from_condition(self, condition: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        """Return one image per condition and seed.

        Args:
            condition: (B, S, d) vectors of `tiny`'s joint space, of about unit length: embeddings of images or
                sentences, or learned ones. Their order does not matter; zeros stand for no condition.
            seeds: B seeds of the noise.

        Raises:
            DataError: If the shapes don't fit.
        """
        if len(condition) != len(seeds):
            raise DataError(f"{len(condition)} conditions, but {len(seeds)} seeds.")

        # Each image has a random stream of its own, so the other images of the batch do not change its noise.
        count = self.steps if self.scheduler == "renoise" else 1
        noises = []
        for seed in seeds:
            rng = torch.Generator().manual_seed(seed)
            noises.append(torch.randn(count, 48, 16, 16, generator=rng))

        device = next(self.denoiser.parameters()).device
        images = self.denoiser.sample(
            condition.detach().to(device), torch.stack(noises), self.steps, self.guidance, self.scheduler
        )
        return [tvf.to_pil_image(image) for image in images.cpu()]
