"""Normalisation layers are tuned as the equations and the authors' code say, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.weights import filled
from vlprompt import create_adapter, create_learner, load_dataset
from vlprompt.adaptation._norm_tuning import NormAdapter, norm_parameters
from vlprompt.adaptation.cliptta import ContrastiveAdaptation
from vlprompt.adaptation.stream import adapt_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import BackboneError, CheckpointError, NonFiniteError
from vlprompt.data import ImageDataset
from vlprompt.data.transforms import affine_of

GOLDEN = read_golden("norm_tuning_small")
TPT = read_golden("tpt_small")
NAMES = ["dog", "red circle", "hummingbird", "American staffordshire terrier", "cat"]
BOTH = ["tent", "cliptta"]
CASES: dict[str, dict[str, Any]] = {
    "tent": {"name": "tent"},
    "tent_sgd": {"name": "tent", "optimizer": "sgd", "lr": 0.02},
    "cliptta": {"name": "cliptta", "slots": 2, "sample": 14},
    "cliptta_alone": {"name": "cliptta", "slots": 0},
}


def build(name: str, start: Any, names: list[str] = NAMES, **options: Any) -> NormAdapter:
    given = {"batch": 4, "steps": 2, "lr": 1e-2, **options}
    adapter = create_adapter(name, start, names, **given)
    assert isinstance(adapter, NormAdapter)
    return adapter


@pytest.fixture(scope="module")
def pixels(backbone: Backbone) -> Tensor:
    """(10, 3, 32, 32) preprocessed images of bytes."""
    return byte_images(backbone, "norm_tuning/test", 10)


def byte_images(backbone: Backbone, name: str, count: int) -> Tensor:
    values = filled(name, (count, 3, *backbone.image_size), 70.0, 127.5)
    affine = affine_of(backbone.preprocess, backbone.image_size)
    assert affine is not None
    return affine(values.round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors_code(case: str, tokenizer: TextTokenizer) -> None:
    backbone = small_clip(TPT, tokenizer)
    options = {"lr": 1e-3, **CASES[case], "batch": 6, "steps": 3, "reset_scope": "never"}
    images = byte_images(backbone, "norm_tuning/images", 12)
    learner = create_learner("zero_shot", backbone, TPT["classnames"])
    features = backbone.encode_image(images[:7])
    learner.get_buffer("weights").copy_(F.normalize(features - features.mean(0), dim=-1))
    adapter = build(options.pop("name"), learner, TPT["classnames"], **options)
    probs = adapter.predict(images).probs
    expected = GOLDEN["results"][case]
    close(probs, expected["probs"])
    close(adapter.norms["ln_post.weight"][::9], expected["ln_post"])
    close(adapter.norms["transformer.resblocks.0.ln_1.bias"][::9], expected["first"])


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("still", [{"lr": 0.0}, {"steps": 0}])
def test_where_nothing_moves_it_is_zero_shot_to_the_bit(
    name: str, still: dict[str, Any], backbone: Backbone, pixels: Tensor
) -> None:
    adapter = build(name, backbone, **still)
    predictions = adapter.predict(pixels)
    assert torch.equal(predictions.probs, predictions.before)
    moved = build(name, backbone).predict(pixels)
    assert float((moved.probs - moved.before).abs().max()) > 1e-3


@pytest.mark.parametrize("name", BOTH)
def test_equals_an_obvious_loop_over_a_copy_of_the_tower(
    name: str, backbone: Backbone, pixels: Tensor
) -> None:
    adapter = build(
        name, backbone, reset_scope="never", **({"slots": 1, "sample": 5} if name == "cliptta" else {})
    )
    got = adapter.predict(pixels[:8])
    weights = create_learner("zero_shot", backbone, NAMES).class_weights()
    tower = deepcopy(backbone.model.visual).train()
    learned = [p for m in tower.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()]
    optimizer = torch.optim.Adam([p.requires_grad_() for p in learned], lr=1e-2, eps=1e-6)
    memory: dict[int, tuple[float, Tensor]] = {}

    def logits_of(images: Tensor) -> Tensor:
        return backbone.logit_scale * F.normalize(tower(images), dim=-1) @ weights.T

    def entropy(row: Tensor) -> Tensor:
        return -(row.softmax(0) * row.log_softmax(0)).sum()

    def contrast(images: Tensor) -> Tensor:
        logits = logits_of(images)
        classes = [int(row.argmax()) for row in logits]
        rows = torch.stack([entropy(torch.stack([row[c] for c in classes])) for row in logits])
        mean = logits.softmax(1).mean(0)
        return rows.mean() + (mean * mean.log()).sum()

    for images, answers in zip(pixels[:8].split(4), got.probs.split(4), strict=True):
        for step in range(2):
            if name == "tent":
                loss = torch.stack([entropy(row) for row in logits_of(images)]).mean()
            else:
                if step == 0:
                    for image, row in zip(images, logits_of(images).detach(), strict=True):
                        confidence = float((row / backbone.logit_scale).softmax(0).max())
                        c = int(row.argmax())
                        if c not in memory or confidence > memory[c][0]:
                            memory[c] = (confidence, image)
                loss = contrast(images) + contrast(torch.stack([image for _, image in memory.values()]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(answers, logits_of(images).softmax(1).detach(), rtol=1e-3, atol=1e-4)


def test_one_image_has_nobody_to_choose_from(backbone: Backbone, pixels: Tensor) -> None:
    adapter = build("cliptta", backbone, diversity=0.0, slots=0)
    assert isinstance(adapter, ContrastiveAdaptation)
    loss = adapter.contrast(adapter.logits(pixels[:1]))
    gradients = torch.autograd.grad(loss, list(adapter.norms.values()), allow_unused=True)
    assert float(loss.detach()) == 0.0
    assert all(gradient is None or not bool(gradient.any()) for gradient in gradients)


def test_equal_predictions_leave_the_choice_open(backbone: Backbone) -> None:
    adapter = build("cliptta", backbone, diversity=0.0)
    assert isinstance(adapter, ContrastiveAdaptation)
    certain = 50 * torch.eye(5)[torch.tensor([0, 0, 0, 2])]
    expected = (3 * math.log(3) + 0) / 4
    assert float(adapter.contrast(certain)) == pytest.approx(expected, abs=1e-5)


def test_the_memory_keeps_the_most_confident_images_of_each_class(backbone: Backbone, pixels: Tensor) -> None:
    adapter = build("cliptta", backbone, slots=2, lr=0.0)
    before = adapter.predict(pixels).before
    cosines = (before.log() - before.log().mean(1, keepdim=True)) / backbone.logit_scale
    confidence = cosines.softmax(1).amax(1)
    state = adapter.state()
    for c in range(5):
        own = confidence[before.argmax(1) == c].sort(descending=True).values[:2]
        kept = state["memory/confidence"][state["memory/labels"] == c].sort(descending=True).values
        torch.testing.assert_close(kept, own, rtol=1e-4, atol=1e-6)
    assert state["memory/pixels"].dtype == torch.uint8


@pytest.mark.parametrize("name", BOTH)
def test_a_method_sees_its_own_batch_and_forgets_when_it_says(
    name: str, backbone: Backbone, pixels: Tensor
) -> None:
    lasting = build(name, backbone, reset_scope="never").predict(pixels).probs
    adapter = build(name, backbone, reset_scope="batch")
    forgetting = adapter.predict(pixels).probs
    assert torch.equal(lasting[:4], forgetting[:4])
    assert not torch.equal(lasting[4:], forgetting[4:])
    assert torch.equal(adapter.predict(pixels[4:8]).probs, forgetting[4:8])
    assert torch.equal(adapter.predict(pixels[8:]).probs, forgetting[8:])  # a short batch


@pytest.mark.parametrize("name", BOTH)
def test_reset_brings_back_the_bits_and_the_learner_is_left_alone(
    name: str, backbone: Backbone, pixels: Tensor
) -> None:
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    adapter = build(name, backbone, reset_scope="never")
    first = adapter.predict(pixels).probs
    moved = adapter.norms["ln_post.weight"].detach().clone()
    assert not torch.equal(moved, before["visual.ln_post.weight"])
    adapter.reset()
    assert torch.equal(adapter.norms["ln_post.weight"], before["visual.ln_post.weight"])
    assert torch.equal(adapter.predict(pixels).probs, first)
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [("tent", {}), ("tent", {"optimizer": "sgd"}), ("cliptta", {"sample": 2, "slots": 3})],
)
def test_what_was_learned_is_saved_and_loaded(
    name: str, options: dict[str, Any], backbone: Backbone, pixels: Tensor
) -> None:
    adapter = build(name, backbone, reset_scope="never", **options)
    empty = adapter.state()
    adapter.predict(pixels[:4])
    state = adapter.state()
    rest = adapter.predict(pixels[4:]).probs
    other = build(name, backbone, reset_scope="never", **options)
    other.load_state(state)
    assert torch.equal(other.predict(pixels[4:]).probs, rest)
    other.load_state(empty)
    assert torch.equal(
        other.predict(pixels[:4]).probs, build(name, backbone, **options).predict(pixels[:4]).probs
    )
    with pytest.raises(CheckpointError, match=f"does not fit {name}: .*norm/ln_post.weight"):
        other.load_state({n: t for n, t in state.items() if n != "norm/ln_post.weight"})
    with pytest.raises(CheckpointError, match="does not fit"):
        other.load_state({**state, "norm/ln_post.bias": torch.zeros(3)})


def test_a_batch_may_be_named_before_it_is_learned_from(backbone: Backbone, pixels: Tensor) -> None:
    late = build("tent", backbone, reset_scope="never", updates_first=False)
    predictions = late.predict(pixels[:8])
    assert torch.equal(predictions.probs[:4], predictions.before[:4])
    assert not torch.equal(predictions.probs[4:], predictions.before[4:])
    first = build("tent", backbone, reset_scope="never")
    first.predict(pixels[:4])
    taught = create_adapter("tent", backbone, NAMES, batch=4, steps=0)
    assert isinstance(taught, NormAdapter)
    taught.norms = first.norms
    assert torch.equal(taught.predict(pixels[4:8]).probs, predictions.probs[4:])


def test_batch_normalisation_may_take_the_statistics_of_the_batch(
    make_backbone: Callable[..., Backbone], backbone: Backbone, pixels: Tensor
) -> None:
    with pytest.raises(BackboneError, match="batch_statistics=true is for batch normalisation"):
        build("tent", backbone, batch_statistics=True)

    resnet = make_backbone(vision={"layers": (1, 1, 1, 1), "width": 16, "head_width": 16})
    images = byte_images(resnet, "norm_tuning/resnet", 6)
    norms = [m for m in resnet.model.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    got = build("tent", resnet, steps=0, batch=6, batch_statistics=True).predict(images).probs
    tower = deepcopy(resnet.model.visual).train()
    weights = create_learner("zero_shot", resnet, NAMES).class_weights()
    expected = (resnet.logit_scale * F.normalize(tower(images), dim=-1) @ weights.T).softmax(1).detach()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    stored = build("tent", resnet, steps=0, batch=6).predict(images)
    assert torch.equal(stored.probs, stored.before)
    assert float((got - stored.probs).abs().max()) > 1e-3
    moved = build("tent", resnet, batch=6, batch_statistics=True).predict(images)
    assert bool(moved.probs.isfinite().all())
    assert not torch.equal(moved.probs, got)
    assert all(torch.equal(m.running_mean, b) and not m.training for m, b in zip(norms, before, strict=True))


def test_a_tower_without_such_layers_is_refused(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(norm_parameters(backbone.model.visual)) == 2 * (2 + 2 * 3)
    monkeypatch.setattr(backbone.vision, "visual", torch.nn.Linear(2, 2))
    with pytest.raises(BackboneError, match="has no normalisation layers"):
        build("tent", backbone)


def test_prompts_of_a_learner_stay_as_they_are(backbone: Backbone, pixels: Tensor) -> None:
    learner = create_learner("maple", backbone, NAMES, depth=2).eval()
    expected = learner(pixels[:4]).softmax(1).detach()
    still = create_adapter("tent", learner, batch=4, lr=0.0).predict(pixels[:4])
    torch.testing.assert_close(still.probs, expected, rtol=1e-4, atol=1e-5)
    before = {name: tensor.clone() for name, tensor in learner.trainable_state().items()}
    moved = create_adapter("tent", learner, batch=4, lr=1e-2).predict(pixels[:4])
    assert not torch.equal(moved.probs, still.probs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.trainable_state().items())


def test_a_gradient_that_is_no_number_stops(backbone: Backbone, pixels: Tensor) -> None:
    adapter = build("tent", backbone)
    adapter.scale = float("inf")
    with pytest.raises(NonFiniteError, match="this batch can't be adapted to"):
        adapter.predict(pixels[:4])


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("scenes/size@sketch", "val").subset(range(0, 60, 6))


@pytest.mark.parametrize("name", BOTH)
def test_what_is_in_memory_changes_no_bit(name: str, data: ImageDataset, backbone: Backbone) -> None:
    adapter = build(name, backbone, list(data.classnames), reset_scope="never")
    results = [adapt_dataset({"a": adapter}, data, batch_size=size)["a"].probs for size in (1, 7, 16)]
    assert all(torch.equal(probs, results[0]) for probs in results)


@pytest.mark.parametrize("name", BOTH)
def test_a_stream_that_was_killed_inside_a_batch_goes_on_to_the_bit(
    name: str, data: ImageDataset, backbone: Backbone, tmp_path: Path
) -> None:
    def fresh() -> dict[str, NormAdapter]:
        return {"a": build(name, backbone, list(data.classnames), reset_scope="never")}

    def stop(done: int, total: int) -> None:
        if done == 6:  # one batch of 4 is done, two images wait
            raise KeyboardInterrupt

    whole = adapt_dataset(fresh(), data, batch_size=3)["a"].probs
    with pytest.raises(KeyboardInterrupt):
        adapt_dataset(fresh(), data, folder=tmp_path, batch_size=3, progress=stop)
    again = adapt_dataset(fresh(), data, folder=tmp_path, batch_size=3)["a"].probs
    assert torch.equal(again, whole)
    assert torch.equal(adapt_dataset(fresh(), data, folder=tmp_path, batch_size=3)["a"].probs, whole)
