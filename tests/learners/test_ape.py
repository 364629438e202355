"""APE and APE-T: the authors' numbers, Tip-Adapter as a special case, and a search that equals the obvious one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load, load_dataset, save
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError
from vlprompt.learners import Learner
from vlprompt.learners._cache import best_blend, search_grid
from vlprompt.learners.ape import interclass_similarity

GOLDEN = read_golden("ape_small")
NAMES = ["dog", "red circle", "hummingbird", "tree"]
LABELS = torch.arange(4).repeat_interleave(3)
CENTRE = filled("ape/centre", (4, 48), 1.0)
BOTH = ("ape", "ape_t")


@dataclass(frozen=True)
class Validation:
    """Validation samples as a learner's calibrate sees them."""

    embeddings: Tensor
    labels: Tensor

    def validation_data(self) -> tuple[Tensor, Tensor]:
        return self.embeddings, self.labels


def around(name: str, labels: Tensor) -> Tensor:
    return F.normalize(CENTRE[labels] + filled(f"ape/{name}", (len(labels), 48), 2.0), dim=-1)


VAL = Validation(around("val", torch.arange(20) % 4), torch.arange(20) % 4)
TEST = around("test", torch.arange(4))


class Hundred:
    """A backbone whose tau is the golden's 100; all else is another one's."""

    def __init__(self, backbone: Backbone) -> None:
        self.inner = backbone
        self.logit_scale = 100.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def build(name: str, backbone: Backbone, **options: Any) -> Learner:
    """Return a learner with the recipe's texts and keys."""
    learner = create_learner(name, backbone, NAMES, **options)
    object.__setattr__(learner, "backbone", Hundred(backbone))
    learner.get_buffer("zero_shot").copy_(around("text", torch.arange(4)))
    learner.prepare(around("images", LABELS)[None], LABELS)
    return learner


@pytest.mark.parametrize("case", ["half", "most"])
def test_ape_equals_the_authors_code(case: str, backbone: Backbone) -> None:
    golden = GOLDEN["cases"][f"ape {case}"]
    a, b = golden["weights"]
    search = {"beta_steps": 15, "alpha_steps": 12, "gamma_steps": 6, "alpha_max": golden["alpha_max"]}
    learner = build(
        "ape", backbone, share=len(golden["channels"]) / 48, similarity_weight=a, variance_weight=b, **search
    )
    assert learner.channels.tolist() == golden["channels"]
    close(learner.surprise(), golden["surprise"])

    chosen = learner.calibrate([VAL])
    assert chosen == pytest.approx(
        {name: golden[name] for name in ("alpha", "beta", "gamma", "val_accuracy")}
    )
    close(learner.logits(TEST).flatten(), golden["logits"])


def test_ape_t_equals_the_authors_code(backbone: Backbone) -> None:
    golden = GOLDEN["cases"]["ape_t"]
    learner = build("ape_t", backbone, share=30 / 48, alpha=1.3, beta=2.0)
    assert learner.channels.tolist() == golden["channels"]

    parameters = [learner.residual, learner.factors]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, weight_decay=0.1)
    losses = []
    for step in range(20):
        loss = sum(learner.loss({"embedding": around("train", LABELS), "label": LABELS}).values())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            close(learner.residual.grad.flatten()[::7], golden["residual_gradient"])
            close(learner.factors.grad, golden["vote_gradient"])
        optimizer.step()
        losses.append(loss.detach())

    close(torch.stack(losses), golden["losses"])
    close(learner.residual.flatten()[::7], golden["residual"])
    close(learner.factors, golden["votes"])
    torch.testing.assert_close(
        learner.logits(TEST).flatten().detach(), torch.tensor(golden["logits"]), rtol=1e-4, atol=1e-3
    )


def test_similarity_between_classes_is_the_mean_over_all_pairs() -> None:
    members = filled("ape/members", (4 * 3, 6), 1.0)
    labels = torch.arange(4).repeat(3)
    keep = [row for row in range(12) if row not in (3, 7)]  # classes of different sizes
    products = [members[i] * members[j] for i, j in itertools.product(keep, keep) if labels[i] != labels[j]]
    expected = torch.stack(products).mean(0)
    torch.testing.assert_close(interclass_similarity(members[keep], labels[keep], 4), expected)


@pytest.mark.parametrize("alpha", [0.4, 3.0])
def test_with_all_channels_and_no_surprise_ape_is_tip_adapter(alpha: float, backbone: Backbone) -> None:
    ape = build("ape", backbone, share=1.0, gamma=0.0, alpha=alpha, beta=2.5)
    tip = build("tip_adapter", backbone, alpha=alpha, beta=2.5)
    torch.testing.assert_close(ape.logits(TEST), tip.logits(TEST), rtol=1e-5, atol=1e-5)


def test_untrained_ape_t_is_tip_adapter(backbone: Backbone) -> None:
    ape_t = build("ape_t", backbone, alpha=2.0, beta=2.5)
    tip = build("tip_adapter", backbone, alpha=2.0, beta=2.5)
    torch.testing.assert_close(ape_t.logits(TEST), tip.logits(TEST), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_equals_the_obvious_one(seed: int) -> None:
    """Unbalanced classes, one of them empty, and factors of both signs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, 3, 3, 1, 0, 0, 3])
    zero_shot = 2 * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    similarities = torch.rand(60, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (60,), generator=generator)
    weights = torch.randn(7, 3, generator=generator, dtype=torch.float64) + 0.5
    alphas = search_grid(3.0, 9)
    betas = search_grid(7.0, 5)

    best = (-1.0, (0, 0, 0))
    for b, a, g in itertools.product(range(5), range(9), range(3)):
        affinities = (-betas[b] * (1 - similarities)).exp() * weights[:, g]
        logits = zero_shot + alphas[a] * affinities @ F.one_hot(values, 4).double()
        accuracy = float((logits.argmax(-1) == labels).double().mean())
        if accuracy > best[0]:
            best = (accuracy, (b, a, g))
    assert best_blend(zero_shot, similarities, labels, values, weights, alphas, betas) == (best[1], best[0])


@pytest.mark.parametrize("name", BOTH)
def test_an_empty_cache_is_zero_shot(name: str, backbone: Backbone, images: Tensor) -> None:
    learner = create_learner(name, backbone, NAMES).eval()
    expected = create_learner("zero_shot", backbone, NAMES).eval()(images)
    torch.testing.assert_close(learner(images), expected)


@pytest.mark.parametrize("name", BOTH)
def test_trains_chooses_saves_and_loads(
    name: str, backbone: Backbone, tmp_path: Path, images: Tensor
) -> None:
    train, val = (load_dataset("digits", split, shots=2, seed=1) for split in ("train", "val"))
    learner = create_learner(name, backbone, train.classnames, beta_steps=9)
    recipe = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "schedule": "cosine", "drop_last": False}
    result = fit(learner, train, val, epochs=6, callbacks=[], **recipe)
    assert result.metrics["val/accuracy"] == pytest.approx(result.metrics["chosen/val_accuracy"])
    if name == "ape_t":
        assert result.history[-1]["cross_entropy"] < result.history[0]["cross_entropy"]
        assert [n for n, p in learner.named_parameters() if p.requires_grad] == ["residual", "factors"]

    loaded = load(save(learner, tmp_path), backbone)
    assert torch.equal(loaded(images), learner(images))

    state = dict(learner.trainable_state())
    wrong = {**state, "channels": state["channels"] + backbone.dim}
    with pytest.raises(CheckpointError, match=r"channels name channels outside 0 \.\. 47"):
        create_learner(name, backbone, train.classnames).load_trainable_state(wrong)


@pytest.mark.parametrize("name", BOTH)
def test_classes_of_different_sizes_and_one_without_samples(name: str, backbone: Backbone) -> None:
    learner = create_learner(name, backbone, NAMES, beta_steps=5)
    keep = torch.tensor([0, 1, 2, 3, 9, 10])
    learner.prepare(around("images", LABELS)[keep][None], LABELS[keep])
    assert 0 < learner.calibrate([VAL])["val_accuracy"] <= 1
    assert bool(learner.logits(TEST).isfinite().all())


@pytest.mark.parametrize("name", [*BOTH, "tip_adapter"])
def test_without_validation_data_it_says_what_stays(
    name: str, backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    train = load_dataset("digits", "train", shots=1, seed=1)
    fit(create_learner(name, backbone, train.classnames), train, epochs=0)
    assert f"{name} chooses alpha and beta" in caplog.text
    assert "on validation data, and there are none" in caplog.text

    caplog.clear()
    fit(create_learner(name, backbone, train.classnames, beta_steps=0), train, epochs=0)
    assert not caplog.text
