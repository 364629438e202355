"""CRIS: checkpoints of the published layout, the published code's numbers, towers it can and can't stand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.weights import filled
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import BackboneError, ConfigError
from vlprompt.core.files import write_tensors
from vlprompt.segmentation import Segmenter, create_segmenter

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tunevlseg_cris_small.json").read_text())


def _weight(name: str, shape: list[int]) -> Tensor:
    last = name.rpartition(".")[2]
    if last == "logit_scale":
        return torch.tensor(2.6592)
    if last == "num_batches_tracked":
        return torch.tensor(1)
    if last.startswith("running"):
        return filled(name, shape, 0.1, 1.0 if last == "running_var" else 0.0)
    if "embedding" in name:
        return filled(name, shape, 0.3)
    if len(shape) == 1:
        return filled(name, shape, 0.1, 1.0 if last == "weight" else 0.0)
    fan_in = shape[0] if last == "text_projection" else torch.Size(shape[1:]).numel()
    return filled(name, shape, 1.3 * fan_in**-0.5)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: _weight(name, shape) for name, shape in GOLDEN["shapes"].items()}


@pytest.fixture(scope="module")
def checkpoint(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is published: a torch file, names with the prefix of training on several devices."""
    path = tmp_path_factory.mktemp("cris") / "best_model.pth"
    torch.save({"epoch": 7, "state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    return path


@pytest.fixture(scope="module")
def towers(checkpoint: Path) -> Backbone:
    return create_backbone("cris", str(checkpoint))


def _with_rows(
    towers: Backbone, case: str, rows: list[int], strategy: str = "coop", **options: Any
) -> Segmenter:
    """A segmenter whose layers' prompts are these rows of the published learner's."""
    built = create_segmenter("cris", towers, strategy, depth=len(rows), init="", **options)
    with torch.no_grad():
        for name, parameter in built.strategy.named_parameters():
            norm = name.endswith("weight") and parameter.dim() == 1
            std, mean = (0.3, 0.0) if name == "context" else (0.1, 1.0) if norm else (0.2, 0.0)
            shape = list(parameter.shape)
            if name == "context":
                shape[0] = max(rows) + 1
            values = filled(f"{case}/{name}", shape, std, mean)
            parameter.copy_(values[rows] if name == "context" else values)
    return built


def _check(case: str, segmenter: Segmenter) -> None:
    known = GOLDEN["cases"][case]
    with torch.no_grad():
        logits = segmenter(filled("images", (3, 3, 64, 64), 1.0), GOLDEN["texts"])
    torch.testing.assert_close(logits.flatten()[::97], torch.tensor(known["logits"]), rtol=1e-4, atol=1e-4)
    assert float(logits.norm()) == pytest.approx(known["norm"], rel=1e-4)


def test_a_checkpoint_gives_the_published_logits(towers: Backbone) -> None:
    segmenter = create_segmenter("cris", towers)
    assert segmenter.sizes == {"width": 64, "layers": 2, "hidden": 48, "fine": False}  # type: ignore[attr-defined]
    _check("zero_shot", segmenter)


def test_the_published_depth_is_one_less_than_it_says(towers: Backbone) -> None:
    """Its loop writes row 0 again after the first block: depth J is our J + 1 with the first row twice."""
    _check("coop1", _with_rows(towers, "coop1", [0, 0]))
    _check("coop2", _with_rows(towers, "coop2", [0, 0, 1], context_length=2))
    with pytest.raises(AssertionError):
        _check("coop1", _with_rows(towers, "coop1", [0]))


def test_context_of_the_image(towers: Backbone) -> None:
    options = {"context_length": 3, "intermediate_dim": 8, "shared": True}
    _check("cocoop1", _with_rows(towers, "cocoop1", [0, 0], "cocoop", **options))


def test_safetensors_without_prefix_are_read_alike(state: dict[str, Tensor], tmp_path: Path) -> None:
    write_tensors(tmp_path / "cris.safetensors", state)
    _check("zero_shot", create_segmenter("cris", create_backbone("cris", str(tmp_path / "cris.safetensors"))))


def test_files_that_are_no_checkpoint(state: dict[str, Tensor], tmp_path: Path, towers: Backbone) -> None:
    with pytest.raises(
        BackboneError, match=r"no CRIS checkpoint at nowhere\.pth\. Its authors published none"
    ):
        create_backbone("cris", "nowhere.pth")
    torch.save({"state_dict": Path("code")}, tmp_path / "code.pth")
    with pytest.raises(BackboneError, match="no safetensors file or torch state dict of plain tensors"):
        create_backbone("cris", str(tmp_path / "code.pth"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(BackboneError, match="holds no towers in CRIS' layout"):
        create_backbone("cris", str(tmp_path / "other.pth"))
    with pytest.raises(BackboneError, match="holds no decoder in CRIS' layout"):
        create_segmenter("cris", towers, weights=str(tmp_path / "other.pth"))
    torch.save({n: t for n, t in state.items() if "ln_final.bias" not in n}, tmp_path / "part.pth")
    with pytest.raises(BackboneError, match=r"'ln_final\.bias' is missing"):
        create_backbone("cris", str(tmp_path / "part.pth"))
    with pytest.raises(ConfigError, match=r"width: got 32, but the decoder of .* has 64"):
        create_segmenter("cris", towers, width=32)


def test_a_plain_clip_starts_as_it_is(towers: Backbone) -> None:
    """The connection beside the attention pool, which CLIP hasn't, says nothing at first."""
    decoder = create_segmenter("cris", towers, weights="random").decoder
    pooled, last = torch.randn(1, 32, 2, 2), torch.randn(1, 256, 2, 2)
    assert torch.equal(decoder.joined(pooled, last), pooled.relu())  # type: ignore[operator]


@pytest.mark.parametrize("strategy", ["vpt", "maple", "shared_attention", "shared_separate"])
def test_visual_prompts_need_tokens(strategy: str, towers: Backbone) -> None:
    with pytest.raises(BackboneError, match=r"visual prompts can't be learned.*ModifiedResNet"):
        create_segmenter("cris", towers, strategy)


@pytest.mark.parametrize("model", ["clipseg", "dense"])
def test_the_others_need_a_vit(model: str, towers: Backbone) -> None:
    with pytest.raises(BackboneError, match=r"token states of an image can't be read.*ModifiedResNet"):
        create_segmenter(model, towers, "decoder")


def test_any_size_on_a_resnet_and_batch_statistics_stay(towers: Backbone) -> None:
    segmenter = create_segmenter("cris", towers, "decoder").train()
    before = {n: b.clone() for n, b in segmenter.named_buffers()}
    logits = segmenter(torch.randn(2, 3, 40, 70), ["dog", "a cat"])
    assert logits.shape == (2, 1, 40, 70)
    logits.sum().backward()
    assert all(p.grad is not None for p in segmenter.parameters() if p.requires_grad)
    assert all(torch.equal(b, before[n]) for n, b in segmenter.named_buffers())


def test_padding_says_nothing(towers: Backbone) -> None:
    """A phrase beside a longer one gets the same mask as alone."""
    segmenter = create_segmenter("cris", towers)
    images = filled("images", (3, 3, 64, 64), 1.0)[:2]
    with torch.no_grad():
        both = segmenter(images, ["dog", "a very long phrase about a dog that stands there"])
        alone = segmenter(images[:1], ["dog"])
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)
