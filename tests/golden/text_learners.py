"""What the golden tests of the text-side learners share: the recipe's small CLIP and its images' embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from tests.golden.weights import clip_state, filled
from vlprompt.backbones import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tokenizer import TextTokenizer

__all__ = ["close", "read_golden", "small_clip", "small_embeddings"]


def read_golden(name: str) -> dict[str, Any]:
    """Return a golden file of this folder."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def small_clip(golden: dict[str, Any], tokenizer: TextTokenizer) -> Backbone:
    """Build the CLIP of a golden file's ``sizes`` with the recipe's weights."""
    dim, size, layers, width, patch, length, words, text_width, heads, text_layers = golden["sizes"]
    vision = {"image_size": size, "layers": layers, "width": width, "head_width": 64, "patch_size": patch}
    text = {"context_length": length, "vocab_size": words, "width": text_width, "heads": heads}
    with torch.random.fork_rng():
        model = CLIP(dim, vision, {**text, "layers": text_layers}, quick_gelu=True)
    model.load_state_dict(clip_state({name: t.shape for name, t in model.state_dict().items()}))
    return wrap_open_clip(model, {"size": size}, tokenizer, {"architecture": "golden", "pretrained": None})


def small_embeddings(golden: dict[str, Any], backbone: Backbone) -> Tensor:
    """Return (3, d) embeddings of the recipe's images."""
    close(filled("images", (4,), 1.0), golden["first_image_values"])
    return backbone.image_embeddings(filled("images", (3, 3, *backbone.image_size), 1.0))


def close(got: Tensor, expected: Any) -> None:
    """Check that values agree within 1e-4."""
    torch.testing.assert_close(got.detach(), torch.tensor(expected), rtol=0, atol=1e-4)
