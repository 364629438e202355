"""What holds for every learner, whoever wrote it: one battery over the registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import CheckpointError, ConfigError, DataError, VLPromptError
from vlprompt.core.precision import Precision
from vlprompt.learners import LEARNERS, Learner, create_learner
from vlprompt.learners.hooks import overridden_hooks

ALL = LEARNERS.names()
NAMES = ("dog", "red circle", "hummingbird", "boeing 737-800")
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
Build = Callable[..., Learner]


@pytest.fixture
def build(backbone: Backbone, images: Tensor) -> Build:
    """Builder of learners that are ready: what starts from training images has seen the six."""

    def make(name: str, **options: Any) -> Learner:
        learner = create_learner(name, backbone, NAMES, **options)
        if learner.prepares:
            learner.prepare(backbone.image_embeddings(images)[None], LABELS)
        return learner

    return make


@pytest.fixture
def batch(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": LABELS, "index": torch.arange(len(LABELS))}


def learnable(learner: Learner) -> dict[str, Tensor]:
    return {name: p for name, p in learner.named_parameters() if p.requires_grad}


def disturb(learner: Learner, scale: float = 0.05) -> Learner:
    """Move everything learned away from its start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learnable(learner).values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return learner.eval()


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("entry", list(LEARNERS), ids=lambda entry: entry.name)
def test_says_what_it_is(entry: Any) -> None:
    assert 10 <= len(entry.summary) <= 80
    assert entry.paper
    assert entry.target.__doc__


@pytest.mark.parametrize("name", ALL)
def test_logits_do_not_depend_on_order_or_company(name: str, build: Build, images: Tensor) -> None:
    learner = disturb(build(name))
    with torch.no_grad():
        logits = learner(images)
        assert logits.shape == (6, 4)
        assert logits.dtype == torch.float32
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        torch.testing.assert_close(learner(images[order]), logits[order], rtol=0, atol=1e-4)
        torch.testing.assert_close(learner(images[2:3]), logits[2:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(learner(images).detach(), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_cached_embeddings_give_the_same_logits(name: str, build: Build, batch: dict[str, Tensor]) -> None:
    learner = disturb(build(name))
    embeddings = learner.embed_images(batch["image"])
    torch.testing.assert_close(learner.logits(embeddings), learner(batch["image"]), rtol=0, atol=1e-5)
    assert not (learner.static_images and embeddings.requires_grad)
    if learner.static_images:
        assert learner.reads or embeddings.shape[1] == learner.backbone.dim
        assert torch.equal(
            embeddings[:, : learner.backbone.dim], learner.backbone.image_embeddings(batch["image"])
        )
        cached = {"embedding": embeddings, "label": LABELS}
        assert torch.equal(learner.batch_logits(cached), learner.batch_logits(batch))


@pytest.mark.parametrize("name", ALL)
def test_class_weights_are_class_embeddings_of_unit_length(name: str, build: Build) -> None:
    learner = disturb(build(name))
    refusal = ""
    try:
        embeddings = learner.class_embeddings()
    except VLPromptError as error:
        refusal = str(error)
    if refusal:
        assert f"{name} has no class embeddings" in refusal
        return
    assert embeddings.shape == (len(NAMES), learner.backbone.dim)
    torch.testing.assert_close(learner.class_weights(), torch.nn.functional.normalize(embeddings, dim=-1))


@pytest.mark.parametrize("name", ALL)
def test_gradient_stays_inside_the_learner(name: str, build: Build, batch: dict[str, Tensor]) -> None:
    learner = build(name).train()
    before = state_of(learner.backbone)
    losses = learner.loss(batch)
    assert all(loss.dim() == 0 and bool(loss.isfinite()) for loss in losses.values())
    own = learnable(learner)
    if own:
        optimizer = torch.optim.SGD(own.values(), lr=1e-3)
        sum(losses.values()).backward()
        optimizer.step()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in own.values())
        assert any(float(p.grad.abs().max()) > 0 for p in own.values())
        assert all(p.dtype == torch.float32 for p in own.values())
    assert all(p.grad is None and not p.requires_grad for p in learner.backbone.parameters())
    assert not any(m.training for m in learner.backbone.modules())
    after = learner.backbone.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", ALL)
def test_a_step_lowers_the_loss_as_much_as_its_gradient_says(
    name: str, build: Build, batch: dict[str, Tensor]
) -> None:
    learner = build(name).eval()  # dropout would make two losses differ by themselves
    own = learnable(learner)
    if not own:
        pytest.skip("nothing is learned by gradient")
    if not learner.smooth:
        pytest.skip("small steps change no output")
    if learner.combines_gradients:
        measure = lambda: learner.loss(batch)["cross_entropy"]  # noqa: E731 - the update follows no one loss
        direction = learner.combine_gradients(
            {
                key: list(torch.autograd.grad(loss, list(own.values()), retain_graph=True))
                for key, loss in learner.loss(batch).items()
            }
        )
    else:
        measure = lambda: sum(learner.loss(batch).values())  # noqa: E731
        direction = torch.autograd.grad(measure(), list(own.values()))
    before = measure()
    slope = sum(
        float((g * d).sum())
        for g, d in zip(torch.autograd.grad(before, list(own.values())), direction, strict=True)
    )
    expected = 0.003 * float(before.detach())
    with torch.no_grad():
        for parameter, step in zip(own.values(), direction, strict=True):
            parameter -= step * expected / slope
    learner.eval()
    fall = float((before - measure()).detach())
    assert 0.5 * expected < fall < 1.5 * expected


@pytest.mark.parametrize("name", [n for n in ALL if LEARNERS.get(n).target.solves])
def test_a_solver_fits_what_it_saw(name: str, build: Build, images: Tensor) -> None:
    learner = build(name)
    if not learnable(learner):
        pytest.skip("what it finds is text, which can't fit images at will")
    generator = torch.Generator().manual_seed(0)
    labels = LABELS.repeat(5)
    views = images.repeat(5, 1, 1, 1) + 0.1 * torch.randn(30, *images.shape[1:], generator=generator)
    embeddings = learner.embed_images(views)
    learner.solve((embeddings[:24], labels[:24]), (embeddings[24:], labels[24:]))
    with torch.no_grad():
        assert float((learner.eval()(views).argmax(-1) == labels).float().mean()) > 0.9


@pytest.mark.parametrize("name", ALL)
def test_state_put_into_a_new_learner_gives_the_same_logits(name: str, build: Build, images: Tensor) -> None:
    learner = disturb(build(name))
    state = {key: tensor.clone() for key, tensor in learner.trainable_state().items()}
    assert set(learnable(learner)) <= set(state)
    assert not [key for key in state if key.startswith("backbone")]
    with torch.no_grad():
        expected = learner(images)
        other = build(name).eval()
        other(images)  # class weights may be cached from here on
        other.load_trainable_state(state)
        assert torch.equal(other(images), expected)
    assert all(torch.equal(other.trainable_state()[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", ALL)
def test_states_that_do_not_fit_are_refused_by_name(name: str, build: Build) -> None:
    learner = build(name)
    state = dict(learner.trainable_state())
    with pytest.raises(CheckpointError, match=f"fit {name}: .*foreign is unknown"):
        learner.load_trainable_state({**state, "foreign": torch.zeros(1)})
    for key, tensor in state.items():
        others = {k: t for k, t in state.items() if k != key}
        with pytest.raises(CheckpointError, match=f"{key} is missing"):
            learner.load_trainable_state(others)
        with pytest.raises(CheckpointError, match=rf"{key} has shape .*expected"):
            learner.load_trainable_state({**others, key: torch.zeros(*tensor.shape, 2)})
        if tensor.is_floating_point():
            with pytest.raises(CheckpointError, match=f"{key} is not finite"):
                learner.load_trainable_state({**others, key: torch.full_like(tensor, torch.nan)})


@pytest.mark.parametrize("name", ALL)
def test_other_classes(name: str, build: Build, images: Tensor) -> None:
    learner = disturb(build(name))
    with torch.no_grad():
        same = learner.with_classes([n.replace(" ", "_") for n in NAMES])
        assert torch.equal(same(images), learner(images))
        new = ("tulip", "blue square", *NAMES[:1])
        if learner.class_bound:
            with pytest.raises(DataError, match=f"{name} learned one set of parameters per class"):
                learner.with_classes(new)
            return
        other = learner.with_classes(new)
        assert (other.classnames, other.method, other.options) == (new, name, learner.options)
        logits = other(images)
        assert logits.shape == (6, 3)
        # A head that names classes only where it knows all of them is left out on both sides.
        needs_all = learner.head_classes and learner.head_rule == "all"
        asked = learner.with_classes((NAMES[0], new[0])) if needs_all else learner
        torch.testing.assert_close(logits[:, 2], asked(images)[:, 0], rtol=0, atol=1e-4)
        assert all(torch.equal(other.trainable_state()[k], t) for k, t in learner.trainable_state().items())


@pytest.fixture(scope="module")
def tinies() -> dict[Precision, Backbone]:
    """Real weights: features of random ones lie where rounding counts for more than what was learned."""
    return {precision: create_backbone("tiny", precision=precision) for precision in ("fp32", "bf16", "fp16")}


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_learns_nearly_the_same(
    name: str, precision: Precision, tinies: dict[Precision, Backbone]
) -> None:
    found = []
    for chosen in ("fp32", precision):
        backbone = tinies[chosen]
        pixels = torch.randn(6, 3, *backbone.image_size, generator=torch.Generator().manual_seed(3))
        learner = create_learner(name, backbone, NAMES)
        if learner.prepares:
            learner.prepare(tinies["fp32"].image_embeddings(pixels)[None], LABELS)
        disturb(learner, 0.02).train()
        torch.manual_seed(0)  # dropout

        own = learnable(learner)
        gradients = [torch.ones(1)]
        losses = learner.loss({"image": pixels, "label": LABELS, "index": torch.arange(6)})
        if own:
            sum(losses.values()).backward()
            gradients = [p.grad.flatten() for p in own.values() if p.grad is not None]
        assert all(p.dtype == torch.float32 for p in own.values())
        assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)

        with torch.no_grad():
            embeddings = learner.eval().embed_images(pixels)
            logits = learner(pixels)
        assert embeddings.dtype == logits.dtype == torch.float32
        found.append((embeddings[:, : backbone.dim], logits, torch.cat(gradients)))

    (embeddings, logits, gradient), (rough_embeddings, rough_logits, rough_gradient) = found
    assert float(cosine_similarity(rough_embeddings, embeddings).min()) > 0.999
    assert float((rough_logits - logits).abs().max()) < 0.1 * float(logits.std())
    # Batch norm over six images of noise divides by small spreads, which makes rounding larger.
    least = 0.9 if name == "promptkd" else 0.98
    assert float(cosine_similarity(rough_gradient.double(), gradient.double(), dim=0)) > least


@pytest.mark.parametrize("name", ALL)
def test_the_same_options_build_the_same_learner(name: str, build: Build, images: Tensor) -> None:
    first, second = build(name), build(name)
    assert first.trainable_state().keys() == second.trainable_state().keys()
    assert all(torch.equal(t, second.trainable_state()[k]) for k, t in first.trainable_state().items())
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    build(name)
    assert torch.equal(torch.rand(1), expected), "building draws from the global generator"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "at least two classes, got 0"),
        (["dog"], "at least two classes, got 1: dog"),
        (["dog", " "], r"the class from ' ' \(number 1\) has an empty name"),
        (
            ["red_circle", "dog", "red  circle"],
            "two classes are called 'red circle': 'red_circle' and 'red  circle'",
        ),
    ],
)
def test_class_lists_that_name_nothing(name: str, names: list[str], reason: str, backbone: Backbone) -> None:
    with pytest.raises(DataError, match=reason):
        create_learner(name, backbone, names)


@pytest.mark.parametrize("name", ALL)
def test_a_class_name_longer_than_the_tower_reads(name: str, backbone: Backbone, images: Tensor) -> None:
    names = ["dog", "very " * 80 + "long"]
    try:
        learner = create_learner(name, backbone, names)
    except VLPromptError as error:
        refusal = str(error)
    else:  # hand-written sentences are cut, as CLIP does it; learned ones never are
        assert "text" not in LEARNERS.get(name).needs
        assert learner.eval()(images).shape == (6, 2)
        return
    assert re.search(r"class 'very very .* long' has \d+ tokens, the text tower reads 77", refusal)
    assert len(refusal) < 250


@pytest.mark.parametrize("name", ALL)
def test_options_it_does_not_have(name: str, backbone: Backbone) -> None:
    wrong: Mapping[str, Any] = {"contxt_length": 4, "no_such_thing": True}
    with pytest.raises(ConfigError, match=rf"learner '{name}': 2 problems") as caught:
        create_learner(name, backbone, NAMES, **wrong)
    assert all(f"{key}: unknown key" in str(caught.value) for key in wrong)


@pytest.mark.parametrize("name", ALL)
def test_hooks_that_steer_training_are_declared(name: str, build: Build) -> None:
    """Three hooks are only called where a learner says that it has them."""
    learner = build(name)
    hooks = overridden_hooks(type(learner))
    assert learner.combines_gradients == ("combine_gradients" in hooks)
    assert learner.solves == ("solve" in hooks)
    assert learner.prepares == ("prepare" in hooks)
