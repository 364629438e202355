"""The embedded segmenters: in the package, small, good on what they learned, worse where something is to be gained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlprompt.backbones import create_backbone
from vlprompt.data.scenes import masks
from vlprompt.segmentation import Segmenter, create_segmenter
from vlprompt.segmentation._weights import EMBEDDED

MODELS = sorted(p.name.removesuffix("_tiny.safetensors") for p in EMBEDDED.glob("*_tiny.safetensors"))


def _dice(segmenter: Segmenter, style: str, count: int = 60) -> float:
    items = [masks(count, 3, split="test", style=style)[i] for i in range(count)]
    with torch.no_grad():
        logits = segmenter(
            torch.stack([segmenter.preprocess(x.image) for x in items]), [x.phrase for x in items]
        )
    found, truth = logits[:, 0].numpy() > 0, np.stack([x.mask for x in items])
    return float(np.mean(2 * (found & truth).sum((1, 2)) / (found.sum((1, 2)) + truth.sum((1, 2)))))


def test_both_are_there() -> None:
    assert MODELS == ["clipseg", "cris"]
    assert all((EMBEDDED / f"{m}_tiny.safetensors").stat().st_size < 6_000_000 for m in MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_good_on_what_it_learned_and_worse_on_styles_it_never_saw(model: str) -> None:
    segmenter = create_segmenter(model, create_backbone("tiny"))
    plain = _dice(segmenter, "plain")
    assert plain > 0.6
    assert all(_dice(segmenter, style) < plain - 0.2 for style in ("sketch", "inverted"))


@pytest.mark.parametrize("model", MODELS)
def test_the_phrase_says_which_object(model: str) -> None:
    """Asked for what isn't there it marks less than asked for what is."""
    segmenter = create_segmenter(model, create_backbone("tiny"))
    items = [masks(40, 5, split="test")[i] for i in range(40)]
    images = torch.stack([segmenter.preprocess(x.image) for x in items])
    texts = [x.phrase for x in items]
    others = [*texts[1:], texts[0]]
    different = np.array([a != b for a, b in zip(texts, others, strict=True)])
    truth = torch.from_numpy(np.stack([x.mask for x in items]))
    with torch.no_grad():
        named = (segmenter(images, texts)[:, 0] > 0) & truth
        absent = (segmenter(images, others)[:, 0] > 0) & truth
    assert int(absent[different].sum()) < 0.5 * int(named[different].sum())


def test_random_weights_are_said_to_be_random(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="vlprompt.segmentation"):
        create_segmenter("clipseg", create_backbone("tiny"))
        assert not caplog.records
        create_segmenter("clipseg", create_backbone("tiny", "random"))
    assert "its decoder is random" in caplog.text
