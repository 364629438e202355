"""Diffusion pipelines of a few thousand random weights, built from configurations and saved as local folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")


def parts() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    )
    return {"unet": unet, "vae": vae, "scheduler": scheduler, "safety_checker": None}


@pytest.fixture(scope="session")
def variation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionImageVariationPipeline that makes 16 x 16 pictures."""
    folder = tmp_path_factory.mktemp("pipelines") / "variation"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CLIPVisionConfig(
            hidden_size=16,
            projection_dim=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        encoder = transformers.CLIPVisionModelWithProjection(config)
        pipe = diffusers.StableDiffusionImageVariationPipeline(
            **parts(),
            image_encoder=encoder,
            feature_extractor=transformers.CLIPImageProcessor(crop_size=16, size=16),
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def img2img_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionImg2ImgPipeline that makes 16 x 16 pictures."""
    folder = tmp_path_factory.mktemp("pipelines") / "img2img"
    words = tmp_path_factory.mktemp("words")
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a</w>", "a"]
    (words / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CLIPTextConfig(
            vocab_size=4,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        pipe = diffusers.StableDiffusionImg2ImgPipeline(
            **parts(),
            text_encoder=transformers.CLIPTextModel(config),
            tokenizer=transformers.CLIPTokenizer(
                str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=8
            ),
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder
