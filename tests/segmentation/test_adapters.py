"""Segmentation models that adapt to each image: what they minimise, what they leave alone, where they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.segmentation.runs import BENCHMARK, SKETCH, read, run, write_config
from vlprompt import create_backbone, create_segmenter, evaluate_segmenter, load_segmentation
from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data.segmentation import MaskDataset
from vlprompt.segmentation import STRATEGIES, Segmenter
from vlprompt.segmentation.adapters import AdaptedSegmenter, create_segmentation_adapter
from vlprompt.segmentation.adapters.entropy import pixel_entropy, surest

PROMPTED = [entry.name for entry in STRATEGIES if entry.target.tunes == "prompts"]


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def pairs() -> MaskDataset:
    return load_segmentation("scenes/masks", "val", images=2)


@pytest.fixture(scope="module")
def images(tiny: Backbone, pairs: MaskDataset) -> Tensor:
    """Two images, and :func:`phrases` names something in each."""
    sources = list(pairs.images())
    return torch.stack([tiny.preprocess(pairs.reader.read(source)) for source in sources])


@pytest.fixture(scope="module")
def phrases(pairs: MaskDataset) -> list[str]:
    return [pairs.samples[numbers[0]].phrase for numbers in pairs.images().values()]


def build(segmenter: Segmenter, **options: Any) -> AdaptedSegmenter:
    return create_segmentation_adapter("entropy", segmenter, **options)


def test_entropies_are_those_of_the_mean_probability() -> None:
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).double() * 5
    mean = logits.sigmoid().mean(0)
    expected = torch.distributions.Bernoulli(mean).entropy()
    torch.testing.assert_close(pixel_entropy(logits), expected)
    assert bool(pixel_entropy(torch.tensor([[[500.0, -500.0]]])).isfinite().all())


def test_the_surest_pixels_of_both_sides_are_kept() -> None:
    logits = torch.tensor([[[3.0, 1.0, 2.0, -0.1], [-4.0, -3.0, -2.0, -1.0]]])
    masks = surest(logits, 0.4)
    assert masks is not None
    assert masks.nonzero().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]  # 1 of 3 inside, 2 of 5 outside
    whole = surest(logits, 1.0)
    assert whole is not None
    assert torch.equal(whole[0], logits[0] > 0)
    assert torch.equal(whole[1], logits[0] < 0)
    assert surest(-logits.abs(), 0.5) is None


@pytest.mark.parametrize("strategy", PROMPTED)
def test_without_steps_it_is_the_model_and_with_steps_the_model_is_left_alone(
    strategy: str, tiny: Backbone, images: Tensor, phrases: list[str]
) -> None:
    segmenter = create_segmenter("clipseg", tiny, strategy)
    with torch.no_grad():
        before = segmenter(images, phrases)
        torch.testing.assert_close(build(segmenter, steps=0)(images, phrases), before, rtol=1e-3, atol=1e-4)

    state = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    with torch.no_grad():
        adapted = build(segmenter, steps=2, lr=0.05)(images, phrases)
        again = segmenter(images, phrases)
    assert adapted.shape == before.shape
    assert bool(adapted.isfinite().all())
    assert torch.equal(again, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in segmenter.state_dict().items())


def test_the_surest_pixels_become_surer(tiny: Backbone, images: Tensor, phrases: list[str]) -> None:
    segmenter = create_segmenter("clipseg", tiny, "coop")
    with torch.no_grad():
        before = build(segmenter, steps=0, mirror=False)(images, phrases)
        after = build(segmenter, steps=3, lr=2e-3, mirror=False)(images, phrases)
    for row in range(2):
        sides = surest(before[row], 0.5)
        assert sides is not None
        losses = [
            float(torch.stack([pixel_entropy(logits)[side].mean() for side in sides]).mean())
            for logits in (before[row], after[row])
        ]
        assert losses[1] < losses[0]


def test_images_do_not_depend_on_their_company(tiny: Backbone, images: Tensor, phrases: list[str]) -> None:
    adapter = build(create_segmenter("clipseg", tiny, "maple", depth=2), steps=2)
    together = adapter(images, phrases)
    assert torch.equal(adapter(images[1:], phrases[1:]), together[1:])
    assert torch.equal(adapter(images, phrases), together)


def test_a_mirrored_image_has_the_mirrored_mask(tiny: Backbone, images: Tensor, phrases: list[str]) -> None:
    adapter = build(create_segmenter("clipseg", tiny, "vpt"), steps=2, answer="mean")
    mirrored = adapter(images.flip(-1), phrases).flip(-1)
    torch.testing.assert_close(mirrored, adapter(images, phrases), rtol=1e-2, atol=1e-2)


def test_an_image_that_is_all_on_one_side_is_answered_as_it_is(
    tiny: Backbone, images: Tensor, phrases: list[str]
) -> None:
    segmenter = create_segmenter("clipseg", tiny, "coop")
    blank = torch.zeros_like(images[:1])
    with torch.no_grad():
        logits = segmenter(blank, phrases[:1])
    assert surest(logits[0], 0.5) is None
    got = build(segmenter, steps=3, lr=0.5)(blank, phrases[:1])
    torch.testing.assert_close(got, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["zero_shot", "decoder"])
def test_what_has_no_prompts_is_refused(strategy: str, tiny: Backbone) -> None:
    with pytest.raises(DataError, match=f"{strategy} has no prompts.*coop"):
        build(create_segmenter("clipseg", tiny, strategy))


def test_it_is_evaluated_as_any_model(tiny: Backbone) -> None:
    data = load_segmentation("scenes/masks", "val", images=3)
    segmenter = create_segmenter("clipseg", tiny, "coop")
    plain = evaluate_segmenter(segmenter, data, boundary=False).metrics
    same = evaluate_segmenter(build(segmenter, steps=0), data, boundary=False).metrics
    assert same["dice"] == pytest.approx(plain["dice"], abs=1e-3)
    moved = evaluate_segmenter(build(segmenter, steps=4, lr=0.02), data, boundary=False).metrics
    assert moved["dice"] != pytest.approx(plain["dice"], abs=1e-4)


def test_a_benchmark_adapts_to_test_images(tmp_path: Path) -> None:
    adapted = {"name": "vpt", "train": {"lr": 0.05}, "adapt": {"name": "entropy", "steps": 1, "lr": 0.1}}
    still = {**adapted, "adapt": {"name": "entropy", "steps": 0}}
    methods = {"vpt": {"train": {"lr": 0.05}}, "adapted": adapted, "still": still}
    protocol = {"name": "benchmark", "images": 4, "seeds": [1], "baseline": "vpt"}
    outcome = run(write_config(tmp_path, {**BENCHMARK, "methods": methods, "protocol": protocol}))
    dice = {
        name: outcome.metrics[f"small/{name}/depth1/{SKETCH}/dice"]
        if f"small/{name}/depth1/{SKETCH}/dice" in outcome.metrics
        else outcome.metrics[f"small/{name}/{SKETCH}/dice"]
        for name in methods
    }
    assert dice["still"] == pytest.approx(dice["vpt"], abs=1e-3)
    assert dice["adapted"] != pytest.approx(dice["vpt"], abs=1e-6)


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({"adapt": {"name": "entropi"}}, r"methods\.vpt\.adapt: .*entropi.*entropy"),
        ({"adapt": {"steps": 3}}, r"methods\.vpt\.adapt: it needs a name \(entropy\)"),
        ({"adapt": {"name": "entropy", "share": 2}}, r"methods\.vpt\.adapt\.share"),
        ({"name": "decoder", "adapt": {"name": "entropy"}}, "decoder has no prompts"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, method: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(write_config(tmp_path, {**BENCHMARK, "methods": {"vpt": method}}))
