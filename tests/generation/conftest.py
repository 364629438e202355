"""Hosts with random weights: tiny-diffusion's own architecture, and a Stable Diffusion of a few thousand numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.diffusion.parts import parts
from vlprompt.core.files import write_tensors

diffusers = pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'diffusion' is not installed")


@pytest.fixture(scope="session")
def tiny_host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vlprompt.diffusion.denoiser import Denoiser
    from vlprompt.diffusion.tiny import TinyDiffusion
    from vlprompt.generation.hosts import TinyHost

    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    write_tensors(path, Denoiser(seed=1).state_dict())
    return TinyHost(TinyDiffusion(steps=2, weights=str(path), device="cpu"))


@pytest.fixture(scope="session")
def stable_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline that makes 16 x 16 images and reads sentences of letters a to e."""
    folder = tmp_path_factory.mktemp("pipelines") / "stable"
    words = tmp_path_factory.mktemp("words")
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in "abcde"), *"abcde"]
    (words / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shared = parts()
        shared["scheduler"].register_to_config(steps_offset=1)
        text = transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        pipe = diffusers.StableDiffusionPipeline(
            **shared,
            text_encoder=transformers.CLIPTextModel(text),
            tokenizer=transformers.CLIPTokenizer(
                str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=8
            ),
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable_host(stable_folder: Path) -> Any:
    from vlprompt.generation.stable import StableHost

    return StableHost(str(stable_folder), steps=2, guidance=2.0, device="cpu")


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "orange")]
