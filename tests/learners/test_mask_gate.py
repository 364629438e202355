"""The gate of mask tuning, its losses against the authors' code, and the choice of weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.weights import filled
from tests.learners.masking import (
    LABELS,
    NAMES,
    RECIPE,
    named_scores,
    scatter,
    train,
)
from vlprompt import create_learner, fit
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import ConfigError
from vlprompt.data import ImageDataset
from vlprompt.learners._masks import Importance, agreement, choose, gradient_dropout
from vlprompt.training.batches import epoch_plan

GOLDEN = read_golden("ramt_small")

# --- the gate


def test_agreement_in_closed_form() -> None:
    a = torch.tensor([1.0, -1.0, 3.0, -3.0, 1.0, 0.0, 2.0, 0.0, 1e-20, 1e-30])
    b = torch.tensor([5.0, -0.1, -1.0, 1.0, -10.0, 2.0, 0.0, 0.0, 1e-20, -1e-30])
    expected = torch.tensor([1, 1, 0.75, 0.75, 1 / 11, 1, 1, 1, 1, 0.5])
    torch.testing.assert_close(agreement(a, b), expected)


def test_agreement_is_the_papers_formula() -> None:
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    formula = 0.5 * (1 + a.sign() * (a + b) / (a.abs() + b.abs()))
    torch.testing.assert_close(agreement(a, b), formula)
    for scale in (1e-6, 1e-12):  # the published code's 1e-8 in the denominator would drop agreeing elements
        torch.testing.assert_close(agreement(scale * a, scale * b), formula)


@pytest.mark.parametrize(("factor", "dropped"), [(-10.0, 10 / 11), (-1.0, 0.5), (-0.1, 1 / 11), (2.0, 0.0)])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_share_of_dropped_elements(factor: float, dropped: float, strength: float) -> None:
    a = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    kept = gradient_dropout(a, factor * a, strength, torch.Generator().manual_seed(2))
    changed = kept != a
    assert float(changed.float().mean()) == pytest.approx(dropped, abs=0.01)
    torch.testing.assert_close(kept[changed], (1 - strength) * a[changed])


def test_draws_depend_on_seed_and_update_only(backbone: Backbone) -> None:
    """So two processes, which hold the same averaged gradients, take the same step."""

    def updates(seed: int) -> list[Tensor]:
        learner = create_learner("ramt", backbone, NAMES, seed=seed)
        task = [torch.ones_like(s) for s in learner.scores.values()]
        gradients = {"cross_entropy": task, "kl": [-t for t in task]}
        torch.manual_seed(len(NAMES))
        return [torch.cat([g.flatten() for g in learner.combine_gradients(gradients)]) for _ in range(2)]

    first, second = updates(1)
    assert not torch.equal(first, second)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(updates(1), (first, second), strict=True))
    assert not torch.equal(updates(2)[0], first)
    assert 0.4 < float(first.mean()) < 0.6


# --- losses


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.mark.parametrize(
    ("case", "form", "options"), [("attention", "ramt", {"patch": True}), ("all", "rpmt", {})]
)
def test_equals_the_authors_code(
    case: str, form: str, options: dict[str, Any], golden_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = GOLDEN["cases"][case]
    features = F.normalize(filled("class features", (4, golden_backbone.dim), 1.0), dim=-1)
    monkeypatch.setattr(Backbone, "class_weights", lambda *_: features)
    learner = create_learner(form, golden_backbone, GOLDEN["classnames"], **options).train()
    with torch.no_grad():
        for name, score in named_scores(learner).items():
            layer = name.removesuffix(".in_proj_weight").removesuffix(".weight")
            score.copy_(filled(f"scores/{layer}", score.shape, 0.004, 0.01))
    images = filled("images", (3, 3, *golden_backbone.image_size), 1.0)
    close(images.flatten()[:4], GOLDEN["first_image_values"])
    losses = learner.loss({"image": images, "label": torch.tensor(GOLDEN["labels"])})
    close(learner(images), golden["logits"])
    for name in ("cross_entropy", "norm_penalty", "kl"):
        close(losses[name], golden[name])
    scores = named_scores(learner)
    assert scores.keys() == golden["gradients"].keys()
    task = losses["cross_entropy"] + losses["norm_penalty"]
    first = torch.autograd.grad(task, list(scores.values()), retain_graph=True)
    second = torch.autograd.grad(losses["kl"], list(scores.values()))
    for (name, score), a, b in zip(scores.items(), first, second, strict=True):
        expected = golden["gradients"][name]
        assert int((score <= learner.threshold).sum()) == expected["masked"]
        for got, key in ((a, "task"), (b, "general")):
            want = torch.tensor(expected[key])
            got_some = got.flatten()[:: expected["every"]]
            torch.testing.assert_close(got_some, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
            assert float(got.norm()) == pytest.approx(expected[f"{key}_norm"], rel=1e-4)
        assert float(agreement(a, b).mean()) == pytest.approx(expected["keep_mean"], abs=1e-3)


def test_losses_equal_their_equations(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = scatter(create_learner("ramt", backbone, NAMES, ["art of the {}."], temperature=2.0)).train()
    frozen = create_learner("zero_shot", backbone, NAMES, ["art of the {}."])(batch["image"])
    logits = learner(batch["image"])
    p, p0 = (logits / 2).softmax(-1), (frozen / 2).softmax(-1)
    losses = learner.loss(batch)
    assert sorted(losses) == ["cross_entropy", "kl", "norm_penalty"]
    kl = 2.0**2 * (p0 * (p0.log() - p.log())).sum() / 6
    torch.testing.assert_close(losses["kl"], kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["cross_entropy"], F.cross_entropy(logits, LABELS))
    norm = 1e-4 * sum(s.square().sum().sqrt() for s in learner.scores.values())
    torch.testing.assert_close(losses["norm_penalty"], norm)
    assert sorted(create_learner("amt", backbone, NAMES, norm_weight=0).loss(batch)) == ["cross_entropy"]


def test_while_nothing_is_masked_the_frozen_model_has_nothing_to_say(
    backbone: Backbone, batch: dict[str, Tensor]
) -> None:
    learner = create_learner("ramt", backbone, NAMES).train()
    assert "kl" not in learner.loss(batch)
    next(iter(learner.scores.values())).data[0, 0] = learner.threshold  # at the threshold is off
    assert 0 < float(learner.loss(batch)["kl"].detach()) < 1e-3
    coop = create_learner("ramt", backbone, NAMES, prompts="coop").train()
    assert (
        float(coop.loss(batch)["kl"].detach()) > 1e-3
    )  # its words differ from the hand-written ones from the start


# --- which weights


def test_importance_is_the_mean_gradient_over_batches(tower: Backbone, digits: ImageDataset) -> None:
    learner = create_learner("pmt", tower, digits.classnames, digits.templates, select="top", select_count=2)
    options = {**RECIPE, "batch_size": 10}
    fit(learner, digits, epochs=1, lr=1e-4, **options)
    visual = copy.deepcopy(tower.vision.visual).requires_grad_()
    images = torch.stack([tower.preprocess(digits[i][0]) for i in range(len(digits))])
    weights = tower.class_weights(digits.classnames, digits.templates)
    sums = {name: torch.zeros(2) for name in learner.kinds}
    plan = epoch_plan(len(digits), 10, 1, 0)
    for part in plan:
        features = F.normalize(visual(images[part]), dim=-1)
        loss = F.cross_entropy(tower.logit_scale * features @ weights.T, torch.tensor(digits.labels)[part])
        visual.zero_grad()
        loss.backward()
        for name in sums:
            parameter = visual.get_parameter(name)
            gradient = parameter.grad
            sums[name] += torch.stack(
                [gradient.abs().mean(), (gradient * parameter).abs().mean()]
            ).detach() / len(plan)
    for name, value in learner.importance.items():
        assert value.gradient == pytest.approx(float(sums[name][0]), rel=1e-3)
        assert value.saliency == pytest.approx(float(sums[name][1]), rel=1e-3)
        assert value.count == visual.get_parameter(name).numel()
    best = sorted(sums, key=lambda n: -float(sums[n][0]))[:2]
    assert {n for n in sums if learner.scores[n.replace(".", "/")].requires_grad} == set(best)


def test_choosing_by_kind_layer_and_number() -> None:
    found = {
        "a": Importance(4.0, 0, 1),
        "b": Importance(1.0, 0, 3),
        "c": Importance(2.0, 0, 2),
        "d": Importance(0.5, 0, 2),
    }
    kinds: dict[str, Any] = {"a": "attention.in", "b": "attention.in", "c": "mlp.in", "d": "mlp.in"}
    assert choose(found, kinds, "layer", 0.5, 1) == ["a", "c"]
    assert choose(found, kinds, "top", 0.5, 3) == ["a", "b", "c"]
    assert choose(found, kinds, "type", 0.5, 1) == ["a", "b"]  # (4 + 3) / 4 against (4 + 1) / 4
    assert choose(found, kinds, "all", 0.5, 1) == ["a", "b", "c", "d"]


def test_weights_that_were_not_chosen_stay_on(
    backbone: Backbone, digits: ImageDataset, images: Tensor
) -> None:
    learner = train(backbone, digits, "pmt", select="layer", select_share=0.5).eval()
    chosen = {k.replace("/", ".") for k, s in learner.scores.items() if s.requires_grad}
    assert 0 < len(chosen) < len(learner.kinds)
    assert {n for n, m in learner.masks().items() if not m.all()} <= chosen
    other = learner.with_classes(digits.classnames)
    with torch.no_grad():
        assert torch.equal(other(images), learner(images))


def test_selection_needs_training_data(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = create_learner("amt", backbone, NAMES, select="top").train()
    with pytest.raises(ConfigError, match="looks at the training data, which only fit shows"):
        learner.loss(batch)
