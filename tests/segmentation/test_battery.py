"""What holds for every segmentation model with every strategy, whoever wrote it: one battery over both registries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlprompt
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import (
    BackboneError,
    CheckpointError,
    ConfigError,
    DataError,
    UnknownNameError,
    VLPromptError,
)
from vlprompt.data import load_segmentation
from vlprompt.segmentation import SEGMENTERS, STRATEGIES, Segmenter, create_segmenter

SIZES: dict[str, dict[str, Any]] = {
    "clipseg": {"reduce": 16, "hidden": 16},
    "cris": {"width": 16, "layers": 1, "heads": 2, "hidden": 16},
    "dense": {"channels": 32},
}
REFUSED = {("dense", "zero_shot")}
ALL = [(m, s) for m in SEGMENTERS.names() for s in STRATEGIES.names() if (m, s) not in REFUSED]
PROMPTS = [s.name for s in STRATEGIES if s.target.tunes == "prompts"]
TEXTS = ["a red circle.", "dog", "a red circle.", "the left ventricular cavity"]
Build = Callable[..., Segmenter]

every = pytest.mark.parametrize(("model", "strategy"), ALL, ids=lambda name: name)


@pytest.fixture
def build(backbone: Backbone) -> Build:
    def make(model: str, strategy: str, **options: Any) -> Segmenter:
        depth = {"depth": 2} if strategy in PROMPTS else {}
        return create_segmenter(model, backbone, strategy, **{**SIZES.get(model, {}), **depth, **options})

    return make


def learnable(segmenter: Segmenter) -> dict[str, Tensor]:
    return {name: p for name, p in segmenter.named_parameters() if p.requires_grad}


def disturb(segmenter: Segmenter, scale: float = 0.05) -> Segmenter:
    """Move everything learned away from its start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learnable(segmenter).values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return segmenter.eval()


def loss_of(segmenter: Segmenter, images: Tensor, texts: list[str] = TEXTS) -> Tensor:
    logits = segmenter(images, texts)
    masks = torch.zeros_like(logits)
    masks[..., : logits.shape[-1] // 3] = 1
    return F.binary_cross_entropy_with_logits(logits, masks)


@pytest.mark.parametrize("entry", [*SEGMENTERS, *STRATEGIES], ids=lambda entry: entry.name)
def test_says_what_it_is(entry: Any) -> None:
    assert 10 <= len(entry.summary) <= 90
    assert entry.target.__doc__
    assert entry.paper or entry.name in {"dense", "zero_shot", "decoder", "end_to_end"}


@every
def test_one_logit_per_pixel_whatever_the_order_and_the_company(
    model: str, strategy: str, build: Build, images: Tensor
) -> None:
    segmenter = disturb(build(model, strategy))
    batch = images[:4]
    with torch.no_grad():
        logits = segmenter(batch, TEXTS)
        assert logits.shape == (4, 1, 32, 32)
        assert logits.dtype == torch.float32
        assert bool(logits.isfinite().all())
        order = [2, 0, 3, 1]
        mixed = segmenter(batch[order], [TEXTS[i] for i in order])
        torch.testing.assert_close(mixed, logits[order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(segmenter(batch[1:2], TEXTS[1:2]), logits[1:2], rtol=1e-4, atol=1e-4)
    # With a graph the condition is computed again, not looked up.
    torch.testing.assert_close(segmenter(batch, TEXTS).detach(), logits, rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("size", [(40, 24), (29, 37)])
def test_images_of_any_size(model: str, strategy: str, size: tuple[int, int], build: Build) -> None:
    segmenter = build(model, strategy)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = segmenter(images, TEXTS[:2])
    assert logits.shape == (2, 1, *size)
    assert bool(logits.isfinite().all())


@every
def test_gradient_stays_inside_what_learns(
    model: str, strategy: str, build: Build, backbone: Backbone, images: Tensor
) -> None:
    segmenter = build(model, strategy).train()
    before = {n: t.clone() for n, t in segmenter.state_dict().items()}
    own = learnable(segmenter)
    assert segmenter.num_trainable() == sum(p.numel() for p in own.values())
    assert (not own) == (strategy == "zero_shot")
    if own:
        loss_of(segmenter, images[:4]).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in own.values()), own.keys()
        assert any(float(p.grad.abs().max()) > 0 for p in own.values())  # type: ignore[union-attr]
        torch.optim.SGD(own.values(), lr=1e-2).step()
    for name, tensor in segmenter.state_dict().items():
        assert name in own or torch.equal(tensor, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in segmenter.backbone.modules())
    if strategy != "end_to_end":
        assert segmenter.backbone is backbone


@every
def test_a_step_lowers_the_loss(model: str, strategy: str, build: Build, images: Tensor) -> None:
    if strategy == "zero_shot":
        pytest.skip("nothing is learned")
    segmenter = build(model, strategy).eval()  # dropout would make two losses differ by themselves
    own = learnable(segmenter)
    before = loss_of(segmenter, images[:4])
    gradients = torch.autograd.grad(before, list(own.values()))
    squared = sum(float(g.square().sum()) for g in gradients)
    step = 2e-3 / squared  # the loss should fall by about 0.002
    with torch.no_grad():
        for parameter, gradient in zip(own.values(), gradients, strict=True):
            parameter -= step * gradient
    segmenter.eval()
    assert float(loss_of(segmenter, images[:4])) < float(before)


@every
def test_decoding_what_was_kept_is_the_forward_pass(
    model: str, strategy: str, build: Build, images: Tensor
) -> None:
    segmenter = disturb(build(model, strategy))
    whole = segmenter(images[:4], TEXTS)
    kept = segmenter.frozen(images[:4])
    assert not any(t.requires_grad for t in kept.values())
    assert {len(t) for t in kept.values()} == {4}
    one_by_one = [segmenter.frozen(images[i : i + 1]) for i in range(4)]
    joined = {name: torch.cat([k[name] for k in one_by_one]) for name in kept}
    torch.testing.assert_close(segmenter.decode(joined, TEXTS, (32, 32)), whole, rtol=1e-4, atol=1e-4)
    # Nothing that is kept depends on what learns.
    disturb(segmenter, 0.3)
    again = segmenter.frozen(images[:4])
    assert all(torch.equal(again[name], kept[name]) for name in kept)


@every
def test_what_was_saved_comes_back(
    model: str, strategy: str, build: Build, backbone: Backbone, images: Tensor, tmp_path: Path
) -> None:
    segmenter = disturb(build(model, strategy))
    folder = vlprompt.save(segmenter, tmp_path / "prompt", {"dice": 0.5})
    again = vlprompt.load(folder, backbone)
    assert isinstance(again, Segmenter)
    assert (again.method, again.options) == (model, segmenter.options)
    with torch.no_grad():
        assert torch.equal(again(images[:4], TEXTS), segmenter(images[:4], TEXTS))
    assert json.loads((folder / "prompt.json").read_text())["kind"] == "segmenter"
    with pytest.raises(CheckpointError, match=rf"holds a segmenter \({model}\), not a learner; use it with"):
        vlprompt.load(folder, backbone, kind="learner")


@pytest.fixture(scope="module")
def tinies() -> tuple[Backbone, Backbone]:
    return create_backbone("tiny"), create_backbone("tiny", precision="bf16")


@every
def test_half_precision_learns_nearly_the_same(
    model: str, strategy: str, tinies: tuple[Backbone, Backbone]
) -> None:
    if STRATEGIES.get(strategy).target.tunes == "all":
        with pytest.raises(
            BackboneError, match="trains the whole backbone, which needs precision fp32; it is in bf16"
        ):
            create_segmenter(model, tinies[1], strategy)
        return

    # Random decoders: gradients of clipseg's trained one turn as far where float32 weights are moved by 2^-10.
    data = load_segmentation("scenes/masks", "train", images=4, seed=1)
    pixels = torch.stack([tinies[0].preprocess(data[i].image) for i in range(4)])
    found = []
    for backbone in tinies:
        depth = {"depth": 2} if strategy in PROMPTS else {}
        weights = {} if model == "dense" else {"weights": "random"}
        segmenter = create_segmenter(model, backbone, strategy, **SIZES[model], **depth, **weights)
        own = learnable(segmenter)
        gradients = [torch.ones(1)]
        logits = segmenter(pixels, TEXTS)
        if own:
            loss_of(segmenter, pixels).backward()
            gradients = [p.grad.flatten() for p in own.values() if p.grad is not None]
        assert logits.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in own.values())
        assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)
        found.append((logits.detach(), torch.cat(gradients)))

    (logits, gradient), (rough_logits, rough_gradient) = found
    assert float((rough_logits - logits).abs().mean()) < 0.1 * float(logits.std())
    assert float(F.cosine_similarity(rough_gradient.double(), gradient.double(), dim=0)) > 0.95


@pytest.mark.parametrize("model", SEGMENTERS.names())
def test_only_what_learns_can_be_put_back(model: str, build: Build) -> None:
    segmenter = build(model, "coop")
    state = segmenter.trainable_state()
    name = "strategy.context"
    for changed, reason in (
        ({n: t for n, t in state.items() if n != name}, "strategy.context is missing"),
        ({**state, "other": torch.zeros(1)}, "other is unknown"),
        ({**state, name: torch.zeros(1)}, r"strategy\.context has shape \(1,\), expected \(2, 4, 64\)"),
        ({**state, name: state[name] * float("nan")}, "strategy.context is not finite"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            segmenter.load_trainable_state(changed)


@pytest.mark.parametrize("model", SEGMENTERS.names())
def test_loaded_values_are_used_at_once(model: str, build: Build, images: Tensor) -> None:
    """What evaluation remembers of phrases is forgotten when prompts change."""
    segmenter = build(model, "coop")
    with torch.no_grad():
        before = segmenter(images[:4], TEXTS)
        state = {n: t + 0.5 for n, t in segmenter.trainable_state().items() if n.startswith("strategy")}
        segmenter.load_trainable_state({**segmenter.trainable_state(), **state})
        after = segmenter(images[:4], TEXTS)
        segmenter.train().eval()
        assert torch.equal(segmenter(images[:4], TEXTS), after)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_features_in_place_of_phrases(
    strategy: str, build: Build, backbone: Backbone, images: Tensor
) -> None:
    segmenter = build("clipseg", strategy)
    features = backbone.text.encode_strings(TEXTS)
    logits = segmenter(images[:4], features)
    if not STRATEGIES.get(strategy).target.prompts_text:
        torch.testing.assert_close(logits, segmenter(images[:4], TEXTS), rtol=1e-4, atol=1e-4)
    features = features.requires_grad_()
    segmenter(images[:4], features).sum().backward()
    assert features.grad is not None
    assert float(features.grad.abs().max()) > 0


def test_cris_needs_words(build: Build, images: Tensor) -> None:
    with pytest.raises(DataError, match="cris reads every word"):
        build("cris", "zero_shot")(images[:2], torch.zeros(2, 48))


@pytest.mark.parametrize("model", SEGMENTERS.names())
def test_phrases_that_can_not_be_used(model: str, build: Build, images: Tensor) -> None:
    segmenter = build(model, "coop")
    with pytest.raises(DataError, match="one phrase per image: got 1 phrases for 2 images"):
        segmenter(images[:2], ["cat"])
    with pytest.raises(DataError, match="one phrase per image: got 'ab' for 2 images"):
        segmenter(images[:2], "ab")
    with pytest.raises(DataError, match="phrase number 1 is empty"):
        segmenter(images[:2], ["cat", "  "])
    with pytest.raises(VLPromptError, match=r"'cat cat .* has 126 tokens, the text tower reads 77"):
        segmenter(images[:2], ["dog", "cat " * 120])
    longest = "cat " * 71  # 71 words, 4 of context, start and end
    assert segmenter(images[:2], ["dog", longest]).shape == (2, 1, 32, 32)
    if model == "clipseg":
        with pytest.raises(DataError, match=r"shape \(2, 5\), expected \(B, 48\)"):
            segmenter(images[:2], torch.zeros(2, 5))


@pytest.mark.parametrize("strategy", PROMPTS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_row_of_prompts_learns_at_any_depth(
    strategy: str, depth: int, build: Build, images: Tensor
) -> None:
    segmenter = build("cris", strategy, depth=depth)
    loss_of(segmenter, images[:4]).backward()
    gradient = segmenter.strategy.context.grad  # type: ignore[union-attr]
    assert gradient.shape[0] == depth  # type: ignore[union-attr]
    assert all(float(row.abs().max()) > 0 for row in gradient)  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", PROMPTS)
def test_depths_that_do_not_exist_are_refused(strategy: str, backbone: Backbone) -> None:
    with pytest.raises(VLPromptError, match=r"depth=4: the prompted towers have 3.* layers; allowed: 1 to 3"):
        create_segmenter("clipseg", backbone, strategy, depth=4)
    with pytest.raises(ConfigError, match="depth: input should be greater than or equal to 1, got 0"):
        create_segmenter("clipseg", backbone, strategy, depth=0)


def test_names_and_options_that_do_not_exist(backbone: Backbone) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown segmenter 'clipsg'. Did you mean 'clipseg'"):
        create_segmenter("clipsg", backbone)
    with pytest.raises(UnknownNameError, match=r"unknown strategy 'cop'. Did you mean 'coop'"):
        create_segmenter("clipseg", backbone, "cop")
    with pytest.raises(ConfigError, match=r"dept: unknown key; did you mean 'depth'.*refined"):
        create_segmenter("clipseg", backbone, "vpt", dept=2)
    with pytest.raises(VLPromptError, match="dense has no pretrained decoder"):
        create_segmenter("dense", backbone)
    assert vlprompt.list_segmenters() == SEGMENTERS.names()
