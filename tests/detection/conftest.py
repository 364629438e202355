"""Detectors of a few thousand random weights, built from transformers' configurations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlprompt.detection import create_detector
from vlprompt.detection.data import DetectionData, ImageObjects

OWL: dict[str, Any] = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 49408,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "projection_dim": 32,
}


def dino_config() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="the extra 'detection' is not installed")
    return {
        "backbone_config": transformers.SwinConfig(
            image_size=64,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_features=["stage2", "stage3", "stage4"],
            out_indices=[2, 3, 4],
        ),
        "text_config": {
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 30522,
        },
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_layers": 2,
        "decoder_ffn_dim": 32,
        "decoder_attention_heads": 4,
        "num_queries": 10,
        "max_text_len": 24,
        "encoder_n_points": 2,
        "decoder_n_points": 2,
    }


def build(name: str, **options: Any) -> Any:
    if name == "grounding-dino":
        return create_detector(name, config=dino_config(), size=128, device="cpu", **options)
    if name == "owl-tiny":
        return create_detector(name, weights="random", **options)
    pytest.importorskip("transformers", reason="the extra 'detection' is not installed")
    return create_detector(name, config=OWL, device="cpu", **options)


@pytest.fixture(scope="session")
def detectors() -> dict[str, Any]:
    """One of each kind; nothing may change them."""
    return {name: build(name) for name in ("owl-tiny", "owlvit", "owlv2", "grounding-dino")}


@pytest.fixture(scope="session")
def data() -> DetectionData:
    """Four images of noise; the second has no object, the last one a crowd too."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)) for _ in range(4)]

    def entry(boxes: list[Any], labels: list[int], crowd: list[bool]) -> ImageObjects:
        return ImageObjects(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(labels, np.int64),
            np.array(crowd, bool),
            (60, 40),
        )

    objects = (
        entry([[5, 5, 25, 30], [30, 10, 50, 35]], [0, 2], [False, False]),
        entry([], [], []),
        entry([[0, 0, 60, 40]], [1], [False]),
        entry([[10, 10, 20, 20], [0, 0, 60, 20]], [2, 0], [False, True]),
    )
    return DetectionData("noise", ("dog", "red circle", "cat"), objects, lambda i: images[i])


@pytest.fixture(scope="session")
def images(detectors: dict[str, Any], data: DetectionData) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack([d.preprocess(data.image(i)) for i in range(4)]) for name, d in detectors.items()
    }
