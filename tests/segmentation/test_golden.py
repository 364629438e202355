"""Every strategy on CLIPSeg against the published code, on weights that any machine can make again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.weights import filled
from vlprompt.backbones import Backbone
from vlprompt.segmentation import Segmenter, create_segmenter

CASES = ["vpt1", "vpt3", "coop1", "coop3", "cocoop2", "maple2", "maple4", "separate3", "attention_one"]


def _segmenter(golden: dict[str, Any], small: Backbone, case: str, **options: Any) -> Segmenter:
    known = golden["cases"][case]
    built = create_segmenter("clipseg", small, known["strategy"], **known["options"], **options)
    with torch.no_grad():
        for name, parameter in built.strategy.named_parameters():
            norm = name.endswith("weight") and parameter.dim() == 1
            std, mean = (0.3, 0.0) if name == "context" else (0.1, 1.0) if norm else (0.2, 0.0)
            parameter.copy_(filled(f"{case}/{name}", parameter.shape, std, mean))
    return built


def _logits(golden: dict[str, Any], segmenter: Segmenter) -> Tensor:
    return segmenter(filled("images", (3, 3, 64, 64), 1.0), golden["texts"])


def test_zero_shot_logits_are_those_of_transformers(golden: dict[str, Any], small: Backbone) -> None:
    known = golden["cases"]["zero_shot"]
    logits = _logits(golden, create_segmenter("clipseg", small))
    torch.testing.assert_close(logits.flatten()[::97], torch.tensor(known["logits"]), rtol=0, atol=1e-5)
    assert float(logits.norm()) == pytest.approx(known["norm"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_published_code(
    case: str, golden: dict[str, Any], small: Backbone
) -> None:
    known = golden["cases"][case]
    segmenter = _segmenter(golden, small, case, keep_prompts=True)
    logits = _logits(golden, segmenter)
    torch.testing.assert_close(logits.flatten()[::97], torch.tensor(known["logits"]), rtol=0, atol=1e-5)
    loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    assert float(loss.detach()) == pytest.approx(known["loss"], abs=1e-5)
    loss.backward()
    learned = dict(segmenter.strategy.named_parameters())
    assert learned.keys() == known["gradients"].keys()
    for name, kept in known["gradients"].items():
        gradient = learned[name].grad
        assert gradient is not None
        assert list(gradient.shape) == kept["shape"]
        assert float(gradient.norm()) == pytest.approx(kept["norm"], rel=2e-3), name
        values = torch.tensor(kept["values"])
        atol = 2e-3 * float(values.abs().max())
        torch.testing.assert_close(gradient.flatten()[:: kept["every"]], values, rtol=0, atol=atol)


def test_shared_prompts_attend_to_each_other_where_the_published_ones_never_do(
    golden: dict[str, Any], small: Backbone
) -> None:
    """The published layer reads (1, M, W) as M sequences of one token; with its mix-up ours gives its numbers."""
    expected = torch.tensor(golden["cases"]["attention_four"]["logits"])
    segmenter = _segmenter(golden, small, "attention_four", keep_prompts=True)
    assert not torch.allclose(_logits(golden, segmenter).flatten()[::97], expected, atol=1e-2)
    for layer in segmenter.strategy.mixers.networks:  # type: ignore[union-attr]
        layer.self_attn.batch_first = False
        layer.eval()
    with torch.enable_grad():  # with a graph the layer takes no path of its own that ignores the switch
        mixed = _logits(golden, segmenter).flatten()[::97]
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["vpt3", "maple2"])
def test_prompts_leave_before_the_decoder_unless_they_are_kept(
    case: str, golden: dict[str, Any], small: Backbone
) -> None:
    kept = _logits(golden, _segmenter(golden, small, case, keep_prompts=True))
    left = _logits(golden, _segmenter(golden, small, case))
    assert kept.shape == left.shape == (3, 1, 64, 64)
    assert float((kept - left).abs().max()) > 1e-2
