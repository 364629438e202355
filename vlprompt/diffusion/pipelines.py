"""Generators served by diffusers' pipelines, by name on the Hugging Face Hub or by local folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from vlprompt.core.errors import BackboneError, first_line
from vlprompt.core.paths import local_or_name, user_path
from vlprompt.core.weights import weights_id
from vlprompt.diffusion import GENERATORS
from vlprompt.diffusion.base import Generator, import_diffusers, missing_diffusers
from vlprompt.diffusion.custom_code import refuse_custom_code

__all__ = ["ImageToImage", "ImageVariation", "load_pipeline"]

Scheduler = Literal["own", "dpm", "unipc"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
_SCHEDULERS = {"dpm": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class _Pipeline(Generator):
    """Base of both kinds: loading, the scheduler, and an identity that depends on the weights."""

    classname: ClassVar[str]

    def __init__(
        self,
        pipeline: str,
        revision: str | None,
        steps: int,
        guidance: float,
        scheduler: Scheduler,
        precision: Precision,
        device: str | None,
        batch: int,
    ) -> None:
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = _dtype(precision, target)
        self.pipe = load_pipeline(self.classname, pipeline, revision).to(target, dtype)
        self.pipe.set_progress_bar_config(disable=True)

        if scheduler != "own":
            kind = getattr(import_diffusers(), _SCHEDULERS[scheduler])
            self.pipe.scheduler = kind.from_config(self.pipe.scheduler.config)

        self.steps = steps
        self.guidance = guidance
        self.batch = batch
        self.title = pipeline if revision is None else f"{pipeline}@{revision}"
        self.identity = {
            "kind": self.classname,
            "weights": weights_id(_weights(self.pipe)),
            "steps": steps,
            "guidance": guidance,
            "scheduler": type(self.pipe.scheduler).__name__,
            "precision": str(dtype).removeprefix("torch."),
        }

    @classmethod
    def missing(cls, options: Mapping[str, Any]) -> str | None:
        """See :meth:`Generator.missing`: a pipeline is a local folder, or in the cache of the Hugging Face Hub."""
        pipeline = str(options["pipeline"])
        if user_path(pipeline).is_dir():
            return missing_diffusers()

        try:
            path = try_to_load_from_cache(pipeline, "model_index.json", revision=options.get("revision"))
        except ValueError:  # a path, and no name on the Hub
            return f"the diffusion pipeline {pipeline} does not exist."

        if not isinstance(path, str):
            return f"the diffusion pipeline {pipeline!r} is not on this machine; the first run fetches it."
        return missing_diffusers()

    @torch.no_grad()
    def draw(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        """See :meth:`Generator.draw`."""
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return self.run(
            images,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=generators,
            output_type="pil",
        )

    def run(self, images: Sequence[Image.Image], **arguments: Any) -> list[Image.Image]:
        """Call the pipeline with the images in the form that it takes."""
        raise NotImplementedError


@GENERATORS.register(
    "image-variation", summary="Stable Diffusion conditioned on the image's CLIP embedding, from pure noise"
)
class ImageVariation(_Pipeline):
    """diffusers' ``StableDiffusionImageVariationPipeline``: keeps what is shown, not where.

    DiffTPT (ICCV 2023) uses it with ``lambdalabs/sd-image-variations-diffusers``, revision v2.0, 50 steps and
    guidance 3, fp32; ``scheduler="dpm", steps=20`` takes 40 % of that time.

    Args:
        pipeline: A name on the Hugging Face Hub or a local folder.
        revision: Branch, tag or commit on the Hub.
        steps: Denoising steps.
        guidance: Weight of the condition; 1 switches guidance off.
        scheduler: The pipeline's own, DPM-Solver++ or UniPC.
        precision: ``"auto"`` is fp16 on a GPU and fp32 elsewhere.
        device: Where to run; None: a GPU if there is one.
        batch: Variations per call.

    Raises:
        BackboneError: If diffusers is not installed, or the pipeline can't be loaded; says what to do.
    """

    classname = "StableDiffusionImageVariationPipeline"

    def __init__(
        self,
        *,
        pipeline: str,
        revision: str | None = None,
        steps: Annotated[int, Field(ge=1)] = 50,
        guidance: Annotated[float, Field(ge=0)] = 3.0,
        scheduler: Scheduler = "own",
        precision: Precision = "auto",
        device: str | None = None,
        batch: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        super().__init__(pipeline, revision, steps, guidance, scheduler, precision, device, batch)

    def run(self, images: Sequence[Image.Image], **arguments: Any) -> list[Image.Image]:
        """See :meth:`_Pipeline.run`; the image is squashed to CLIP's square input, as in training these weights."""
        size = int(self.pipe.image_encoder.config.image_size)
        pixels = torch.stack([_clip_input(image, size) for image in images])
        return list(self.pipe(image=pixels, **arguments).images)


@GENERATORS.register("img2img", summary="any image-to-image pipeline: the image, noised and denoised again")
class ImageToImage(_Pipeline):
    """diffusers' image-to-image pipelines: the larger ``strength``, the less of the image is left.

    Args:
        pipeline: A name on the Hugging Face Hub or a local folder.
        revision: Branch, tag or commit on the Hub.
        strength: Share of the noising that is undone, in (0, 1].
        prompt: Text condition; it must not name a class that is to be recognised.
        steps: Denoising steps; ``strength`` of them are run.
        guidance: Weight of the text.
        scheduler: The pipeline's own, DPM-Solver++ or UniPC.
        precision: ``"auto"`` is fp16 on a GPU and fp32 elsewhere.
        device: Where to run; None: a GPU if there is one.
        batch: Variations per call.

    Raises:
        BackboneError: If diffusers is not installed, or the pipeline can't be loaded; says what to do.
    """

    classname = "AutoPipelineForImage2Image"

    def __init__(
        self,
        *,
        pipeline: str,
        revision: str | None = None,
        strength: Annotated[float, Field(gt=0, le=1)] = 0.5,
        prompt: str = "",
        steps: Annotated[int, Field(ge=1)] = 50,
        guidance: Annotated[float, Field(ge=0)] = 7.5,
        scheduler: Scheduler = "own",
        precision: Precision = "auto",
        device: str | None = None,
        batch: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        super().__init__(pipeline, revision, steps, guidance, scheduler, precision, device, batch)
        self.strength = strength
        self.prompt = prompt
        self.identity |= {"kind": type(self.pipe).__name__, "strength": strength, "prompt": prompt}

    def run(self, images: Sequence[Image.Image], **arguments: Any) -> list[Image.Image]:
        """See :meth:`_Pipeline.run`; the image is squashed to the pipeline's own square."""
        size = int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)
        square = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
        prompts = [self.prompt] * len(square)
        return list(self.pipe(prompt=prompts, image=square, strength=self.strength, **arguments).images)


def load_pipeline(classname: str, pipeline: str, revision: str | None = None) -> Any:
    """Return a pipeline of diffusers by its class.

    Args:
        classname: Of diffusers.
        pipeline: A name on the Hugging Face Hub or a local folder.
        revision: Branch, tag or commit on the Hub.

    Raises:
        BackboneError: If it can't be had, or brings code of its own; says what to do.
    """
    diffusers = import_diffusers()
    pipeline = local_or_name(pipeline)
    refuse_custom_code(pipeline, revision)
    try:
        kind = getattr(diffusers, classname)
        # Without safety_checker=None, newer releases fetch and run a classifier that blacks images out.
        return kind.from_pretrained(
            pipeline, revision=revision, safety_checker=None, requires_safety_checker=False
        )
    except Exception as error:  # the hub client, diffusers and torch each raise their own kinds
        reason = first_line(error).rstrip(".")
        where = (
            "in that folder"
            if user_path(pipeline).is_dir()
            else "on the Hugging Face Hub, or as a local folder"
        )
        raise BackboneError(
            f"the diffusion pipeline {pipeline!r} can't be loaded: {reason}. It was looked for {where}. Fetch it where "
            "there is a network, and name the folder: pipeline=PATH. What works without one: views from crops (tpt, "
            "mta, zero)."
        ) from error


def _dtype(precision: Precision, device: str) -> torch.dtype:
    if precision == "auto":
        return torch.float16 if device.startswith("cuda") else torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _clip_input(image: Image.Image, size: int) -> Tensor:
    pixels = tvf.to_dtype(tvf.to_image(image), torch.float32, scale=True)
    pixels = tvf.resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=False)
    return tvf.normalize(pixels, list(_CLIP_MEAN), list(_CLIP_STD))


def _weights(pipe: Any) -> dict[str, torch.Tensor]:
    """Return the weights of all parts by name: a folder that is moved keeps its views."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
