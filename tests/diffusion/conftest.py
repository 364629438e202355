"""Diffusion pipelines of a few thousand random weights, built from configurations and saved as local folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.diffusion.parts import parts

diffusers = pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")


@pytest.fixture(scope="session")
def variation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionImageVariationPipeline that makes 16 x 16 images."""
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
    """A StableDiffusionImg2ImgPipeline that makes 16 x 16 images."""
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
