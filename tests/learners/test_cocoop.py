"""CoCoOp against the authors' code, a loop over images, and CoOp where both must agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from vlprompt import create_learner, evaluate, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import VLPromptError
from vlprompt.data import ImageDataset
from vlprompt.learners import Learner

GOLDEN = read_golden("cocoop_small")
NAMES = ["dog", "red circle", "American staffordshire terrier", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.fixture
def learner(backbone: Backbone) -> Learner:
    built = create_learner("cocoop", backbone, NAMES)
    with torch.no_grad():  # a shift that counts beside the context
        built.meta_net.linear2.weight.mul_(20)
    return built


@pytest.fixture(scope="module")
def embeddings(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone.image_embeddings(images)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    learner = create_learner("cocoop", golden_backbone, GOLDEN["classnames"], **golden["options"]).train()
    with torch.no_grad():
        if not golden["options"]["init"]:
            learner.context.copy_(filled(f"context/{case}", learner.context.shape, 0.02))
        for name, parameter in learner.meta_net.named_parameters():
            parameter.copy_(filled(f"meta_net.{name}", parameter.shape, 0.1))
    logits = learner.logits(small_embeddings(GOLDEN, golden_backbone))
    loss = F.cross_entropy(logits, torch.tensor(GOLDEN["labels"]))
    loss.backward()
    close(logits, golden["logits"])
    close(loss, golden["loss"])
    gradients = {n: p.grad for n, p in learner.named_parameters() if p.requires_grad}
    assert list(gradients) == list(golden["gradient_norms"])
    for name, gradient in gradients.items():
        close(gradient.norm(), golden["gradient_norms"][name])
        close(gradient.flatten()[::61], golden["gradients_every_61st"][name])


def test_all_images_at_once_equal_a_loop_of_full_passes(learner: Learner, embeddings: Tensor) -> None:
    text, net = learner.backbone.text, learner.meta_net
    rows = []
    for embedding in embeddings:
        feature = embedding / embedding.norm()
        hidden = (net.linear1.weight @ feature + net.linear1.bias).clamp(min=0)
        shift = net.linear2.weight @ hidden + net.linear2.bias
        weights = text.encode_plain(learner.layout, learner.context + shift, length=77)
        weights = weights / weights.norm(dim=-1, keepdim=True)
        rows.append(learner.backbone.logit_scale * weights @ feature)
    torch.testing.assert_close(learner.logits(embeddings), torch.stack(rows), rtol=1e-5, atol=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 1e-3


def test_images_have_weights_of_their_own_and_length_does_not_matter(
    learner: Learner, embeddings: Tensor
) -> None:
    weights = learner.weights_for(embeddings)
    assert weights.shape == (6, 4, learner.backbone.dim)
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    torch.testing.assert_close(learner.logits(7 * embeddings), learner.logits(embeddings))
    with pytest.raises(VLPromptError, match="weights_for"):
        learner.class_weights()


def test_without_a_shift_it_is_coop(backbone: Backbone, embeddings: Tensor) -> None:
    learner = create_learner("cocoop", backbone, NAMES)
    with torch.no_grad():
        learner.meta_net.linear2.weight.zero_()
        learner.meta_net.linear2.bias.zero_()
    coop = create_learner("coop", backbone, NAMES, init="a photo of a")
    torch.testing.assert_close(learner.logits(embeddings), coop.logits(embeddings), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_evaluation_in_pieces_changes_nothing(causal: bool, make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(text={"no_causal_mask": not causal}, custom=True)
    learner = create_learner("cocoop", backbone, [f"{a} {b}" for a in "abcd" for b in "efgh"])
    many = torch.randn(70, backbone.dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        pieces = learner.eval().logits(many)
    torch.testing.assert_close(pieces, learner.logits(many).detach(), rtol=1e-5, atol=1e-5)


def test_gradient_reaches_context_and_network_alone(learner: Learner, embeddings: Tensor) -> None:
    learner.train()
    learner.loss({"embedding": embeddings, "label": torch.arange(6) % 4})["cross_entropy"].backward()
    touched = {n for n, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"context", *(f"meta_net.linear{i}.{p}" for i in (1, 2) for p in ("weight", "bias"))}


def test_memory_limit_changes_no_gradient(
    learner: Learner, embeddings: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {"embedding": embeddings, "label": torch.arange(6) % 4}
    parameters = [p for p in learner.parameters() if p.requires_grad]
    whole = torch.autograd.grad(learner.loss(batch)["cross_entropy"], parameters)
    monkeypatch.setattr(learner.backbone.text, "memory", 1)
    pieces = torch.autograd.grad(learner.loss(batch)["cross_entropy"], parameters)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_start_values_come_from_the_seed(backbone: Backbone) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (create_learner("cocoop", backbone, NAMES, seed=s, init="") for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in one.trainable_state().items():
        assert torch.equal(tensor, same.trainable_state()[name])
        assert not torch.equal(tensor, other.trainable_state()[name])


@torch.no_grad()
def centred(backbone: Backbone, data: ImageDataset) -> Backbone:
    """Move the embeddings' mean to zero: those of a random tower all point the same way."""
    visual = backbone.model.visual
    mean = backbone.image_embeddings(torch.stack([backbone.preprocess(image) for image, _ in data])).mean(0)
    visual.ln_post.bias -= torch.linalg.pinv(visual.proj).T @ mean
    return backbone


def test_learns_digits(make_backbone: Callable[..., Backbone]) -> None:
    train = load_dataset("digits", "train", shots=4, seed=1)
    learner = create_learner("cocoop", centred(make_backbone(), train), train.classnames)
    history = fit(learner, train, epochs=15, batch_size=8, lr=0.5, callbacks=[]).history
    assert history[0]["loss"] > 2.0  # ln 10 is guessing
    assert history[-1]["loss"] < 1.75
    assert evaluate(learner, train)["accuracy"] > 0.35
