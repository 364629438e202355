"""Parts of Stable Diffusion pipelines of random weights, a few thousand numbers."""

from __future__ import annotations

from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")


def parts() -> dict[str, Any]:
    """Return a UNet, an autoencoder and a scheduler that make 16 x 16 images."""
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
