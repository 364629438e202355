"""ProGrad against the authors' code, its projection written out, and what the trainer makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.classification.evaluate import image_embeddings
from vlprompt.core.errors import DataError
from vlprompt.data import ImageDataset
from vlprompt.learners import Learner
from vlprompt.learners.prograd import class_last, project_conflict

GOLDEN = read_golden("prograd_small")
NAMES = ["dog", "red circle", "American staffordshire terrier", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits", "train", shots=4, seed=1)


def own_gradients(learner: Learner, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return each loss's gradient, as the trainer hands them to the learner."""
    losses = learner.loss(batch)
    return {n: list(torch.autograd.grad(v, [learner.context], retain_graph=True)) for n, v in losses.items()}


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    names, options = GOLDEN["classnames"], golden["options"]
    learner = create_learner("prograd", golden_backbone, names, [golden["template"]], **options).train()
    if not options["init"]:
        with torch.no_grad():
            learner.context.copy_(filled(f"context/{case}", learner.context.shape, 0.02))
    embeddings = small_embeddings(GOLDEN, golden_backbone)
    batch = {"embedding": embeddings, "label": torch.tensor(golden["labels"])}
    losses, gradients = learner.loss(batch), own_gradients(learner, batch)
    (combined,) = learner.combine_gradients(gradients)
    close(learner.logits(embeddings), golden["logits"])
    close(losses["cross_entropy"], golden["cross_entropy"])
    close(losses["kl"], golden["kl"])
    cosine = F.cosine_similarity(gradients["cross_entropy"][0].flatten(), gradients["kl"][0].flatten(), dim=0)
    close(cosine, golden["cosine"])
    close(combined.norm(dim=-1), golden["gradient_norms"])
    close(combined.flatten()[::61], golden["gradient_every_61st"])


def test_the_golden_cases_show_agreement_and_conflict() -> None:
    cosines = {name: case["cosine"] for name, case in GOLDEN["cases"].items()}
    assert cosines["agree"] > 0.1
    assert cosines["conflict"] < -0.1
    assert cosines["template"] < -0.1


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.0])
def test_projection_equals_the_written_out_rule(strength: float) -> None:
    generator = torch.Generator().manual_seed(2)
    seen = {True: 0, False: 0}
    for _ in range(40):
        task, general = torch.randn(2, 5, 7, generator=generator)
        conflict = float((task * general).sum()) < 0
        seen[conflict] += 1
        expected = task
        if conflict:
            direction = general / general.square().sum().sqrt()
            expected = task - strength * (task * direction).sum() * direction
        torch.testing.assert_close(project_conflict(task, general, strength), expected)
    assert min(seen.values()) > 5


def test_projection_is_orthogonal_in_conflict_and_the_identity_otherwise() -> None:
    task, general = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    against = general * -(task * general).sum().sign()
    projected = project_conflict(task, against)
    assert abs(float((projected * against).sum())) < 1e-10
    assert not torch.equal(projected, task)
    assert torch.equal(project_conflict(task, -against), task)
    torch.testing.assert_close(project_conflict(task, -task), torch.zeros_like(task))  # nothing is left


def test_a_zero_gradient_changes_nothing_and_divides_by_nothing() -> None:
    """The authors' code divides by the norm and gets NaN."""
    task, zero = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)), torch.zeros(3, 4)
    assert torch.equal(project_conflict(task, zero), task)
    assert torch.equal(project_conflict(zero, task), zero)


def test_losses_equal_their_equations(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("prograd", backbone, NAMES, ["art of the {}."], temperature=2.0, init="")
    labels = torch.arange(6) % 4
    logits = learner(images)
    frozen = create_learner("zero_shot", backbone, NAMES, ["art of the {}."])(images)
    kl = 0.0
    for own, teacher in zip(logits / 2.0, frozen / 2.0, strict=True):
        p, p0 = own.exp() / own.exp().sum(), teacher.exp() / teacher.exp().sum()
        kl -= 2.0**2 * (p0 * p.log()).sum() / 6
    losses = learner.loss({"image": images, "label": labels})
    assert sorted(losses) == ["cross_entropy", "kl"]
    torch.testing.assert_close(losses["kl"], kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["cross_entropy"], F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a photo of a {}.", "a photo of a"),
        ("a photo of a {}, a type of pet.", "a type of pet, a photo of a"),
        ("{} texture.", "texture"),
        ("{}", ""),
    ],
)
def test_class_last(template: str, words: str) -> None:
    assert class_last(template) == words


def test_the_template_stands_before_the_name_and_zeros_before_it(backbone: Backbone) -> None:
    """By tokens: the authors' code counts words, so "pet," loses it the last of nine tokens."""
    learner = create_learner("prograd", backbone, NAMES, ["a photo of a {}, a type of pet."])
    tokens = backbone.text.tokenizer.encode("a type of pet, a photo of a")
    assert len(tokens) == 9
    assert learner.context.shape == (16, backbone.text.width)
    assert not learner.context[:7].any()
    assert torch.equal(learner.context[7:], backbone.text.embed_tokens(tokens))


def test_phrases_longer_than_the_context(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="6 tokens, context_length is 4"):
        create_learner("prograd", backbone, NAMES, context_length=4, init="a sketch of a small hat")
    template = "a photo of a small striped {}."  # the data set's choice, not the user's: its end is kept
    learner = create_learner("prograd", backbone, NAMES, [template], context_length=2)
    assert torch.equal(
        learner.context, backbone.text.embed_tokens(backbone.text.tokenizer.encode("small striped"))
    )
    bare = create_learner("prograd", backbone, NAMES, ["{}."], context_length=3)
    assert bare.context.any(dim=-1).all()


def test_one_step_of_the_trainer_is_the_projected_step(backbone: Backbone, digits: ImageDataset) -> None:
    learner = create_learner("prograd", backbone, digits.classnames, digits.templates)
    start = learner.context.detach().clone()
    labels = torch.tensor(digits.labels)
    batch = {"embedding": image_embeddings(learner, digits), "label": labels}
    gradients = own_gradients(learner.train(), batch)
    assert (gradients["cross_entropy"][0] * gradients["kl"][0]).sum() < 0
    expected = start - 0.5 * learner.combine_gradients(gradients)[0]
    plain = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0.0}
    for accumulation in (1, 3):
        with torch.no_grad():
            learner.context.copy_(start)
        options = {"epochs": 1, "batch_size": 40, "lr": 0.5, "accumulation": accumulation, **plain}
        result = fit(learner, digits, callbacks=[], **options)
        torch.testing.assert_close(learner.context.detach(), expected, rtol=1e-4, atol=1e-5)
        assert {"cross_entropy", "kl"} <= set(result.history[0])
    assert (expected - start).abs().max() > 1e-3


def test_strength_zero_trains_as_coop(backbone: Backbone, digits: ImageDataset) -> None:
    contexts = []
    for name, options in (("coop", {}), ("prograd", {"init": "", "strength": 0.0})):
        learner = create_learner(name, backbone, digits.classnames, digits.templates, **options)
        fit(learner, digits, epochs=3, batch_size=20, callbacks=[])
        contexts.append(learner.context.detach())
    torch.testing.assert_close(*contexts, rtol=1e-5, atol=1e-6)


def test_it_forgets_less_than_coop(backbone: Backbone, digits: ImageDataset) -> None:
    """A random frozen model contradicts the labels: cross entropy alone leaves it behind, ProGrad less so."""
    drift = {}
    for strength in (0.0, 1.0):
        options = {"init": "", "strength": strength}
        learner = create_learner("prograd", backbone, digits.classnames, digits.templates, **options)
        embeddings = image_embeddings(learner, digits)
        batch = {"embedding": embeddings, "label": torch.tensor(digits.labels)}
        before = learner.loss(batch)
        fit(learner, digits, epochs=10, batch_size=40, lr=0.1, callbacks=[])
        after = learner.loss(batch)
        assert after["cross_entropy"] < before["cross_entropy"]
        drift[strength] = float((after["kl"] - before["kl"]).detach())
    assert drift[1.0] < 0.7 * drift[0.0]


def test_the_teacher_may_read_the_authors_order_of_words(backbone: Backbone) -> None:
    """The zero-shot sentences of the authors' code (CUSTOM_TEMPLATES in trainers/prograd.py of Prompt-align)."""
    templates = ["a photo of a {}, a type of pet."]
    learner = create_learner("prograd", backbone, NAMES, templates, teacher="class_last")
    expected = backbone.class_weights(NAMES, ["a type of pet, a photo of a {}."])
    torch.testing.assert_close(learner.zero_shot, expected)

    as_written = create_learner("prograd", backbone, NAMES, templates)
    torch.testing.assert_close(as_written.zero_shot, backbone.class_weights(NAMES, templates))
