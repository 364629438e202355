"""DPC against the authors' code, which classes a batch gets, and who judges which classes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.trajectories import check_trajectory, golden_images
from tests.golden.visual_learners import check_gradients
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.learners.plugins.dpc import DPC, contrast

GOLDEN = read_golden("plugin_dpc_small")
NAMES = ("dog", "red circle", "hummingbird", "tulip", "blue square")


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


def build(backbone: Backbone, names: tuple[str, ...] = NAMES, inner: str = "coop", **options: object) -> DPC:
    context = {"context_length": 4} if inner == "coop" else {}
    learner = create_learner(inner, backbone, names, plugins=[{"name": "dpc", **options}], **context)
    assert isinstance(learner, DPC)
    return learner


def golden_learner(backbone: Backbone, **options: object) -> DPC:
    learner = build(backbone, tuple(GOLDEN["classnames"]), **options)
    start = filled("inner.context", (4, 128), 0.02)
    learner.load_trainable_state({"inner.context": start, "tuned.context": start})
    learner.enter_phase(1, is_new=False)
    return learner.train()


def golden_batch(learner: DPC, labels: list[int]) -> dict[str, Tensor]:
    close(filled("images", (4,), 1.0), GOLDEN["first_image_values"])
    return {
        "embedding": learner.backbone.image_embeddings(golden_images(learner)),
        "label": torch.tensor(labels),
    }


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_the_contrast_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    learner = golden_learner(golden_backbone, duplicates="negatives")
    loss = learner.loss(golden_batch(learner, golden["labels"]))["dpc_contrast"]
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-4)
    check_gradients(golden["gradients"], learner)


def test_twenty_steps_equal_the_authors_code(golden_backbone: Backbone) -> None:
    """They train a mixture of weight 1/2 in the memory of the first prompts: the copy moves twice as fast."""
    learner = golden_learner(golden_backbone, share=0.0, rate=2.0)
    batch = golden_batch(learner, GOLDEN["cases"]["apart"]["labels"])
    first = learner.inner.trainable_state()["context"].clone()
    check_trajectory(GOLDEN["trajectory"], learner, batch, lr=0.002, weight_decay=0.0)
    assert torch.equal(learner.inner.trainable_state()["context"], first)


def test_pairs_of_one_class_leave_each_other_out() -> None:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    labels = [2, 0, 2, 1]
    total = 0.0
    for scores in (logits, logits.T):
        for i in range(4):
            rivals = [j for j in range(4) if labels[j] != labels[i] or j == i]
            total -= math.log(math.exp(scores[i, i]) / sum(math.exp(scores[i, j]) for j in rivals)) / 8
    assert contrast(logits, torch.tensor(labels)).item() == pytest.approx(total)
    plain = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    assert contrast(logits, torch.tensor(labels), apart=False).item() == pytest.approx(plain.item())


def test_a_batch_gets_the_likeliest_wrong_classes_each_once(backbone: Backbone, images: Tensor) -> None:
    data = load_dataset("digits", "train", shots=2, seed=1)
    learner = build(backbone, data.classnames, choices=3)
    fit(learner, data, epochs=2, lr=0.01, batch_size=4, callbacks=())
    embeddings = backbone.image_embeddings(images[:2])
    batch = {"embedding": embeddings, "label": torch.tensor([4, 7])}
    chosen = learner.confusable(batch).tolist()

    scores = learner.inner.logits(embeddings)
    taken = {4, 7}
    expected = []
    for row in scores:
        free = [label for label in row.argsort(descending=True).tolist() if label not in taken]
        expected += free[:2]
        taken |= set(free[:2])
    assert chosen == expected
    assert len({*chosen, 4, 7}) == 6

    everything = learner.confusable(
        {"embedding": images.new_zeros(6, backbone.dim), "label": torch.arange(6)}
    )
    assert sorted(everything.tolist()) == [6, 7, 8, 9]  # the classes run out


def test_one_choice_is_a_plain_contrast_of_the_batch(backbone: Backbone, images: Tensor) -> None:
    learner = build(backbone, choices=1)
    learner.enter_phase(1, is_new=True)
    batch = {"embedding": backbone.image_embeddings(images[:5]), "label": torch.arange(5)}
    weights = learner.tuned.class_weights()
    logits = backbone.logit_scale * F.normalize(batch["embedding"], dim=-1) @ weights.T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(learner.loss(batch)["dpc_contrast"], expected)


def test_the_first_phase_is_the_learner_s_own_training(backbone: Backbone) -> None:
    """With half the steps of twice the epochs; new classes are then judged as without the plug-in, bit for bit."""
    data = load_dataset("digits", "train", shots=2, seed=1)
    options = {"lr": 0.02, "batch_size": 8, "callbacks": (), "momentum": 0.9}
    for inner in ("coop", "promptsrc"):
        alone = create_learner(
            inner, backbone, data.classnames, **({"context_length": 4} if inner == "coop" else {})
        )
        fit(alone, data, epochs=2, **options)  # type: ignore[arg-type]
        both = build(backbone, data.classnames, inner)
        fit(both, data, epochs=4, **options)  # type: ignore[arg-type]
        state = both.inner.trainable_state()
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.trainable_state().items())
        assert not torch.equal(both.tuned.trainable_state()["context"], state["context"])
        images = torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
        names = ("tulip", "dog")
        with torch.no_grad():
            assert torch.equal(both.with_classes(names)(images), alone.with_classes(names)(images))


@pytest.mark.parametrize(("mix", "weight", "new_weight"), [("copy", 1.0, 0.0), ("mixture", 0.3, 0.25)])
def test_who_judges(mix: str, weight: float, new_weight: float, backbone: Backbone, images: Tensor) -> None:
    learner = build(backbone, mix=mix, base_weight=0.3, new_weight=new_weight)
    state = {name: tensor.clone() for name, tensor in learner.trainable_state().items()}
    state["tuned.context"] += 0.05
    learner.load_trainable_state(state)
    learner.eval()
    for names, share in ((NAMES, weight), (("rose", "dog"), new_weight)):
        plain = create_learner("coop", backbone, names, context_length=4).eval()
        mixed = share * state["tuned.context"] + (1 - share) * state["inner.context"]
        plain.load_trainable_state({"context": mixed})
        with torch.no_grad():
            torch.testing.assert_close(learner.with_classes(names)(images), plain(images), rtol=0, atol=1e-4)
