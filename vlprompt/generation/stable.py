"""Stable Diffusion 1.x and 2.x as hosts, by name on the Hugging Face Hub or from a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlprompt.core.errors import BackboneError, DataError
from vlprompt.core.seeding import derive_seed
from vlprompt.diffusion.base import import_diffusers
from vlprompt.diffusion.pipelines import load_pipeline
from vlprompt.generation.hosts import Host, split_template

__all__ = ["StableHost"]


class StableHost(Host):
    """A ``StableDiffusionPipeline``; its weights are frozen.

    Args:
        pipeline: The pipeline, or its name on the Hub or local folder.
        revision: Branch, tag or commit on the Hub.
        steps: Denoising steps of images.
        guidance: Weight of the condition; 1 switches guidance off.
        device: Where to run; None: a GPU if there is one.

    Raises:
        BackboneError: If the pipeline can't be had, or has no text encoder of CLIP's kind; says what to do.
    """

    def __init__(
        self,
        pipeline: Any,
        revision: str | None = None,
        steps: int = 30,
        guidance: float = 7.5,
        device: str | None = None,
    ) -> None:
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        title = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
        if isinstance(pipeline, str):
            pipeline = load_pipeline("StableDiffusionPipeline", pipeline, revision).to(target)
        if not hasattr(getattr(pipeline, "text_encoder", None), "get_input_embeddings"):
            raise BackboneError(f"{title} has no text encoder; concepts need Stable Diffusion 1.x or 2.x.")
        pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval()

        self.pipe = pipeline
        self.network = pipeline.unet
        self.steps = steps
        self.guidance = guidance
        self.width = int(pipeline.unet.config.cross_attention_dim)
        scheduler = import_diffusers().DDPMScheduler.from_config(pipeline.scheduler.config)
        self.noise = scheduler
        self.levels = int(scheduler.config.num_train_timesteps)

        # Names differ between copies of the same weights; what a concept needs is this space.
        encoder = pipeline.text_encoder.config
        self.identity = {
            "kind": "stable-diffusion",
            "width": self.width,
            "layers": int(encoder.num_hidden_layers),
            "prediction": str(scheduler.config.prediction_type),
        }

    @torch.no_grad()
    def latents(self, images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`Host.latents`; means of the autoencoder's posterior."""
        size = int(self.pipe.unet.config.sample_size) * int(self.pipe.vae_scale_factor)
        square = [image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for image in images]
        pixels = self.pipe.image_processor.preprocess(square).to(self._device, self._dtype)
        means = [self.pipe.vae.encode(one).latent_dist.mode() for one in pixels.split(1)]
        return (torch.cat(means) * self.pipe.vae.config.scaling_factor).float()

    def loss(self, latents: Tensor, noise: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """See :meth:`Host.loss`; the target is the noise or v, as the pipeline was trained."""
        kind = self.noise.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise DataError(f"a pipeline that predicts {kind!r} is not supported: epsilon or v_prediction.")

        target = noise if kind == "epsilon" else self.noise.get_velocity(latents, noise, time)
        noisy = self.noise.add_noise(latents, noise, time).to(self._dtype)
        predicted = self.network(noisy, time, context.to(self._dtype), return_dict=False)[0]
        return F.mse_loss(predicted.float(), target.float())

    @torch.no_grad()
    def read(self, text: str) -> Tensor:
        """See :meth:`Host.read`; from the start token to the first end token."""
        ids = self._ids(text)
        return self._encode(ids)[: len(ids)]

    @torch.no_grad()
    def slots(self, template: str, word: str, length: int) -> tuple[Tensor, int]:
        """See :meth:`Host.slots`; of all tokens, padding included, as the pipeline reads a prompt."""
        ids, first = self._with_concept(template, self._tokens(word), length)
        return self._encode(ids), first

    def word(self, text: str, length: int) -> Tensor:
        """See :meth:`Host.word`."""
        tokens = self._tokens(text)
        ids = torch.tensor([tokens[i % len(tokens)] for i in range(length)], device=self._device)
        return self.pipe.text_encoder.get_input_embeddings()(ids).detach().float()

    def read_with(self, template: str, vectors: Tensor) -> Tensor:
        """See :meth:`Host.read_with`."""
        ids, first = self._with_concept(template, [self._end], len(vectors))
        with self._replaced(first, vectors):
            return self._encode(ids)

    @torch.no_grad()
    def draw(self, context: Tensor, count: int, seed: int) -> list[Image.Image]:
        """See :meth:`Host.draw`."""
        device = "cpu"  # noise of a CPU is the same on every machine
        generators = [
            torch.Generator(device).manual_seed(derive_seed(seed, "personalised", k)) for k in range(count)
        ]
        return list(
            self.pipe(
                prompt_embeds=context.detach().to(self._device, self._dtype)[None],
                num_images_per_prompt=count,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=generators,
            ).images
        )

    @property
    def _device(self) -> torch.device:
        return self.pipe.unet.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype

    @property
    def _end(self) -> int:
        return int(self.pipe.tokenizer.eos_token_id)

    def _tokens(self, text: str) -> list[int]:
        ids = list(self.pipe.tokenizer(text, add_special_tokens=False).input_ids) if text.strip() else []
        return ids or [self._end]

    def _ids(self, text: str) -> list[int]:
        tokens = self._tokens(text) if text.strip() else []
        return [int(self.pipe.tokenizer.bos_token_id), *tokens, self._end]

    def _with_concept(self, template: str, tokens: list[int], length: int) -> tuple[list[int], int]:
        """Return a template's token ids, with ``length`` tokens for the concept, and the position of the first."""
        before, after = split_template(template)
        head = self._ids(before)[:-1]
        tail = self._tokens(after) if after.strip() else []
        concept = [tokens[i % len(tokens)] for i in range(length)]
        ids = [*head, *concept, *tail, self._end]

        most = int(self.pipe.tokenizer.model_max_length)
        if len(ids) > most:
            raise DataError(f"the template has {len(ids)} tokens with the concept; allowed: {most}.")
        return ids, len(head)

    def _encode(self, ids: list[int]) -> Tensor:
        tokenizer = self.pipe.tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._end
        row = [*ids, *[padding] * (int(tokenizer.model_max_length) - len(ids))]
        return self.pipe.text_encoder(torch.tensor([row], device=self._device))[0][0].float()

    @contextmanager
    def _replaced(self, first: int, vectors: Tensor) -> Iterator[None]:
        """Replace token embeddings from the position ``first`` on while the text encoder runs."""

        def put(module: Any, inputs: Any, output: Tensor) -> Tensor:
            last = first + len(vectors)
            return torch.cat([output[:, :first], vectors.to(output.dtype)[None], output[:, last:]], 1)

        handle = self.pipe.text_encoder.get_input_embeddings().register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()
