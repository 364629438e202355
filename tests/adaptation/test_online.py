"""Methods on features equal slow loops written from their equations; where nothing moves they are zero-shot."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.adaptation.test_online_golden import encoded, texts, views, with_texts
from vlprompt import create_adapter, create_backbone, create_learner
from vlprompt.adaptation._features import FeatureAdapter, StreamAdapter
from vlprompt.adaptation._gaussian import neighbour_graph, weighted_squares
from vlprompt.adaptation.dpe import _Rows
from vlprompt.adaptation.otpt import excess
from vlprompt.adaptation.tps import entropy_gradient
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError

FEATURES = ["bca", "dmn", "dpe", "ecalp", "oga", "onzeta", "stata", "tps", "transclip"]


def build(
    name: str, backbone: Backbone, classes: int = 7, scale: float = 30.0, **options: Any
) -> FeatureAdapter:
    names = [f"class {number}" for number in range(classes)]
    return with_texts(create_adapter(name, backbone, names, **options), texts()[:classes], scale)


def zero_shot(features: Tensor, scale: float = 30.0, weights: Tensor | None = None) -> Tensor:
    weights = texts() if weights is None else weights
    return (scale * features @ weights.T).softmax(-1)


def entropy(probs: Tensor) -> float:
    return float(-(probs * probs.log()).sum())


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(("classes", "count", "images"), [(2, 1, 1), (2, 1, 9), (7, 8, 1), (7, 8, 40)])
def test_probabilities_are_finite_and_add_up(
    name: str, classes: int, count: int, images: int, backbone: Backbone
) -> None:
    adapter = build(name, backbone, classes, views=count)
    one = views()[:1, :1].expand(images, count, -1)  # nothing but one image
    for features in (views()[:images, :count], one):
        adapter.reset()
        probs = adapter.adapt(encoded(features)).probs
        assert bool(probs.isfinite().all())
        torch.testing.assert_close(probs.sum(1), torch.ones(images))


@pytest.mark.parametrize(
    ("name", "still"),
    [
        ("bca", {"likelihood_threshold": 1.0, "prior_threshold": 1.0, "views": 1}),
        ("tps", {"lr": 0.0}),
        ("onzeta", {"beta": 0.0, "balance_rate": 0.0, "weight_rate": 0.0, "text_temperature": 1 / 30}),
        ("oga", {"tau": 0.0}),
        ("dmn", {"weight": 0.0}),
        ("dpe", {"lr": 0.0, "alpha": 0.0}),
    ],
)
def test_where_nothing_moves_it_is_zero_shot(name: str, still: dict[str, Any], backbone: Backbone) -> None:
    adapter = build(name, backbone, **{"views": 4, "share": 0.25, **still})
    features = views()[:, : adapter.plan.count]
    got = adapter.adapt(encoded(features))
    # Methods that ask their confident view, and those that ask the image.
    asked = features[:, 0] if name in ("tps", "dmn", "dpe") else features[got.kept]
    torch.testing.assert_close(got.probs, zero_shot(asked), rtol=1e-4, atol=1e-6)


def test_bca_counts(backbone: Backbone) -> None:
    options = {"likelihood_count": 3.0, "prior_count": 2.0, "prior_threshold": 0.3, "views": 1}
    got = build("bca", backbone, **options).adapt(encoded(views()[:, :1])).probs
    means, priors = texts().double(), torch.eye(7).double()
    seen, named = [3.0] * 7, [2.0] * 7
    for x, answer in zip(views()[:, 0].double(), got, strict=True):
        q = torch.zeros(7).double()
        u = (30 * means @ x).softmax(0)
        for k in range(7):
            q = q + u[k] * priors[k]
        torch.testing.assert_close(answer.double(), q, rtol=1e-4, atol=1e-6)
        k = int(q.argmax())
        if float(q[k]) > 0.05:
            means[k] = F.normalize((seen[k] * means[k] + x) / (seen[k] + 1), dim=0)
            seen[k] += 1
        if float(q[k]) > 0.3:
            priors[k] = (named[k] * priors[k] + q) / (named[k] + 1)
            named[k] += 1
    assert max(named) > 3


def test_tps_is_one_step_of_adamw(backbone: Backbone) -> None:
    adapter = build("tps", backbone, views=10, share=0.3, lr=0.01)
    got = adapter.adapt(encoded(views()[:8, :10]))
    for features, kept, answer in zip(views()[:8, :10], got.kept, got.probs, strict=True):
        shift = torch.zeros(7, 64, requires_grad=True)
        optimizer = torch.optim.AdamW([shift], lr=0.01)
        probs = (30 * features[kept] @ F.normalize(texts() + shift, dim=-1).T).softmax(-1).mean(0)
        (-(probs * probs.log()).sum()).backward()
        optimizer.step()
        weights = F.normalize(texts() + shift.detach(), dim=-1)
        torch.testing.assert_close(answer, zero_shot(features[0], weights=weights), rtol=1e-3, atol=1e-4)


def test_the_gradient_of_the_marginal_entropy_is_that_of_autograd() -> None:
    from vlprompt.adaptation.objectives import marginal_entropy

    logits = (10 * views()[:6, :5] @ texts().T).double().requires_grad_()
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 0] = True
    (expected,) = torch.autograd.grad(marginal_entropy(logits, mask).sum(), logits)
    torch.testing.assert_close(entropy_gradient(logits.detach(), mask), expected, rtol=0, atol=1e-8)


def test_orthogonality(backbone: Backbone) -> None:
    assert float(excess(torch.eye(8)[:5])) == pytest.approx(0, abs=1e-6)
    weights = F.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(2)).double(), dim=1)
    cosines = weights @ weights.T
    slow = []
    for c in range(8):  # a Householder matrix for each row, as published
        row, axis = cosines[c], torch.eye(8).double()[c]
        u = F.normalize(row - row.norm() * axis, dim=0)
        reflected = row - 2 * u * (u @ row)
        slow.append((reflected - axis).norm())
    assert float(excess(weights)) == pytest.approx(float(torch.stack(slow).mean()), abs=1e-12)
    off = cosines - torch.eye(8)
    assert float(excess(weights, "frobenius")) == pytest.approx(float((off**2).sum()), abs=1e-9)
    learner = create_learner("coop", backbone, ["a", "b"])
    still = create_adapter("otpt", learner, orthogonality=0.0, augment="crop_flip", views=2)
    tpt = create_adapter("tpt", learner, views=2)
    pixels = torch.randn(2, 2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(still.predict(pixels).probs, tpt.predict(pixels).probs)


def test_dmn_reads_class_by_class(backbone: Backbone) -> None:
    got = build("dmn", backbone, slots=3, views=5, share=0.4).adapt(encoded(views()[:, :5]))
    memory: list[list[tuple[float, Tensor]]] = [[] for _ in range(7)]
    full = False
    for features, kept, answer in zip(views()[:, :5], got.kept, got.probs, strict=True):
        mean = (30 * features[kept] @ texts().T).mean(0).softmax(0)
        own = memory[int(mean.argmax())]
        if len(own) < 3:
            own.append((entropy(mean), features[0]))
        else:
            full = True
            worst = max(range(3), key=lambda j: own[j][0])
            if entropy(mean) < own[worst][0]:
                own[worst] = (entropy(mean), features[0])
        read = []
        for c in range(7):
            keys = [texts()[c], *(key for _, key in memory[c])]
            read.append(
                F.normalize(sum(math.exp(-5.5 * (1 - float(features[0] @ k))) * k for k in keys), dim=0)
            )
        expected = (zero_shot(features[0]) + zero_shot(features[0], weights=torch.stack(read))) / 2
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-6)
    assert full


def test_gaussian_sums_are_those_of_loops() -> None:
    features, z = views()[:9, 0].double(), zero_shot(views()[:9, 0]).double()
    slow = torch.zeros(7, 64).double()
    for i in range(9):
        for c in range(7):
            slow[c] += z[i, c] * (features[i] - texts()[c]) ** 2
    torch.testing.assert_close(weighted_squares(features, z, texts().double()), slow, rtol=0, atol=1e-9)
    graph = neighbour_graph(features).to_dense()
    cosines = features @ features.T
    w = torch.zeros(9, 9).double()
    for i in range(9):
        for j in sorted((j for j in range(9) if j != i), key=lambda j: -float(cosines[i, j]))[:3]:
            w[i, j] = cosines[i, j]
    torch.testing.assert_close(graph, w + w.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["stata", "transclip"])
def test_the_classifier_decides_if_it_is_trusted_enough(name: str, backbone: Backbone) -> None:
    features = views()[:, 0]
    got = build(name, backbone, trust=1000.0, views=1).adapt(encoded(features[:, None])).probs
    assert torch.equal(got.argmax(1), zero_shot(features).argmax(1))


def test_stata_keeps_the_text_of_absent_classes(backbone: Backbone) -> None:
    adapter = build("stata", backbone, views=1, scale=100.0)
    features = F.normalize(3 * texts()[torch.arange(40) % 5] + views()[:, 0], dim=1)
    _, means = adapter.solve(features, 100 * features @ texts().T)  # type: ignore[attr-defined]
    got = adapter.adapt(encoded(features[:, None])).probs.argmax(1).unique()
    absent = [c for c in range(7) if c not in got]
    assert absent
    torch.testing.assert_close(means[absent], texts()[absent], rtol=1e-4, atol=1e-5)


def test_transclip_loses_where_classes_are_missing_and_stata_does_not(backbone: Backbone) -> None:
    labels = torch.arange(40) % 2
    noise = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    features = F.normalize(1.2 * texts()[labels] + 0.125 * noise * 8 / 2, dim=-1)
    accuracy = {}
    for name in ("stata", "transclip"):
        probs = build(name, backbone, views=1, scale=30.0).adapt(encoded(features[:, None])).probs
        accuracy[name] = float((probs.argmax(1) == labels).float().mean())
    assert accuracy["stata"] >= accuracy["transclip"]


def test_oga_means_of_counts_and_of_slots(backbone: Backbone) -> None:
    counts = build("oga", backbone, views=1)
    slots = build("oga", backbone, views=1, mean="slots")
    for adapter in (counts, slots):
        adapter.adapt(encoded(views()[:20, :1]))
    filled = counts.memory["filled"].sum(1)  # type: ignore[attr-defined]
    means = counts.class_means()  # type: ignore[attr-defined]
    half = slots.class_means()  # type: ignore[attr-defined]
    partly = int(((filled >= 2) & (filled < 8)).nonzero()[0])
    torch.testing.assert_close(half[partly], means[partly] * filled[partly] / 8)
    keys = counts.memory["keys"][partly][: int(filled[partly])]  # type: ignore[attr-defined]
    torch.testing.assert_close(means[partly], keys.mean(0), rtol=1e-4, atol=1e-6)


def test_the_first_image_of_ecalp_is_a_vote_of_its_texts(backbone: Backbone) -> None:
    weights, features = texts().abs(), views()[:1, :1].abs()
    weights, features = F.normalize(weights, dim=1), F.normalize(features, dim=-1)
    adapter = with_texts(create_adapter("ecalp", backbone, [f"class {i}" for i in range(7)]), weights)
    got = adapter.adapt(encoded(features)).probs[0]
    nearest = (features[0, 0] @ weights.T).topk(3).indices
    assert set(got.nonzero()[:, 0].tolist()) == set(nearest.tolist())


def test_a_window_of_ecalp_is_a_graph_of_the_latest_images(backbone: Backbone) -> None:
    adapter = build("ecalp", backbone, views=1, window=12, neighbours=3)
    adapter.adapt(encoded(views()[:, :1]))
    memory = adapter.memory  # type: ignore[attr-defined]
    assert {len(tensor) for tensor in memory.values()} == {12}
    latest = views()[-12:, 0]
    torch.testing.assert_close(memory["features"], latest)
    emphasis = F.normalize(texts().var(0), dim=0)
    cosines = F.normalize(latest * emphasis, dim=1) @ latest.T
    # The neighbours of a graph that is built at once; the weights are on the older of two images.
    cosines = cosines.triu() + cosines.triu(1).T
    torch.testing.assert_close(memory["cosines"].sort(1).values, cosines.topk(3).values.sort(1).values)


def test_learners_that_are_more_than_class_weights_are_refused(backbone: Backbone) -> None:
    learner = create_learner("clip_adapter", backbone, ["a", "b"])
    with pytest.raises(DataError, match="clip_adapter classifies by more than class weights"):
        create_adapter("bca", learner)


def test_a_state_of_another_method_is_refused(backbone: Backbone) -> None:
    adapter = build("bca", backbone, views=1)
    assert isinstance(adapter, StreamAdapter)
    with pytest.raises(CheckpointError, match="does not fit bca: keys"):
        adapter.load_state({**adapter.state(), "keys": torch.zeros(1)})


@pytest.mark.parametrize("name", ["bca", "cliptta", "dmn", "dpe", "ecalp", "oga", "onzeta", "tda", "tent"])
def test_a_state_says_who_learned_it(name: str, backbone: Backbone) -> None:
    adapter = create_adapter(name, backbone, ["circle", "square", "star"])
    state = adapter.state()
    for classnames in (["dog", "cat", "bird"], ["square", "circle", "star"], ["circle", "square"]):
        other = create_adapter(name, backbone, classnames)
        with pytest.raises(
            CheckpointError, match=rf"fit {name}: it was learned with another list of classes\.$"
        ):
            other.load_state(state)

    elsewhere = create_adapter(name, create_backbone("tiny", "random", seed=3), adapter.classnames)
    with pytest.raises(CheckpointError, match="it was learned with another backbone or precision"):
        elsewhere.load_state(state)
    with pytest.raises(CheckpointError, match="it does not say who learned it"):
        adapter.load_state({key: tensor for key, tensor in state.items() if key != "owner"})


def test_a_state_with_nan_is_refused(backbone: Backbone) -> None:
    adapter = create_adapter("bca", backbone, ["circle", "square"])
    state = adapter.state()
    with pytest.raises(CheckpointError, match="does not fit bca: means is NaN"):
        adapter.load_state({**state, "means": state["means"] * float("nan")})


def test_boost_asks_the_image_itself(backbone: Backbone) -> None:
    names = [f"class {number}" for number in range(7)]
    features = torch.randn(12, 6, backbone.dim, generator=torch.Generator().manual_seed(4))
    one = create_adapter("tda", backbone, names, views=1).adapt(encoded(features[:, :1]))
    many = create_adapter("tda", backbone, names, views=6, query="image").adapt(encoded(features))
    torch.testing.assert_close(many.probs, one.probs)
    confident = create_adapter("tda", backbone, names, views=6).adapt(encoded(features))
    assert float((confident.probs - one.probs).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["bca", "dmn", "dpe", "ecalp", "oga", "onzeta"])
def test_portions_of_a_stream_are_the_stream(name: str, backbone: Backbone) -> None:
    together, alone = (build(name, backbone, views=3, share=0.4) for _ in range(2))
    features = views()[:, :3]
    whole = together.adapt(encoded(features)).probs
    parts = torch.cat([alone.adapt(encoded(part)).probs for part in features.split([1, 1, 9, 29])])
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    for key, tensor in together.state().items():
        torch.testing.assert_close(alone.state()[key], tensor, rtol=1e-3, atol=1e-4)


def test_what_dmn_and_oga_keep_beside_their_caches_is_what_the_caches_give(backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(6)
    labels = torch.randint(0, 7, (600,), generator=generator)
    noise = torch.randn(600, 64, generator=generator)
    features = encoded(F.normalize(texts()[labels] + noise / 8, dim=1)[:, None])
    dmn = build("dmn", backbone, views=1, slots=3)
    dmn.adapt(features)
    keys = dmn.state()["keys"]
    torch.testing.assert_close(dmn.state()["products"], keys @ keys.transpose(1, 2), rtol=1e-4, atol=1e-5)

    oga = build("oga", backbone, views=1, slots=4)
    oga.adapt(features)
    state = oga.state()
    assert bool(state["filled"].all())
    means = state["keys"].mean(1)
    residuals = (state["keys"] - means[:, None]).flatten(0, 1)
    torch.testing.assert_close(state["means"], means)
    torch.testing.assert_close(state["residual"], residuals.sum(0), rtol=0, atol=1e-5)
    centred = (residuals - residuals.mean(0)).double()
    covariance = centred.T @ centred
    torch.testing.assert_close(state["spread"].double(), covariance.trace(), rtol=1e-5, atol=0)
    shrunk = covariance + covariance.trace() / 27 * torch.eye(64)
    inverse = torch.linalg.inv(shrunk)
    assert float(state["base"] + state["excess"]) == pytest.approx(float(covariance.trace()) / 27, rel=1e-5)
    followed = torch.linalg.inv(covariance + float(state["base"]) * torch.eye(64))
    torch.testing.assert_close(state["inverse"].double(), followed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["once"].double(), means.double() @ followed, rtol=1e-4, atol=1e-4)
    expected = -0.5 * 64 * ((means.double() @ inverse) * means).sum(1)
    torch.testing.assert_close(state["offsets"].double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("alignment", [0.0, 0.5])
def test_the_step_of_dpe_is_that_of_autograd_and_adamw(alignment: float, backbone: Backbone) -> None:
    adapter = build("dpe", backbone, views=1, lr=0.01, alignment=alignment)
    generator = torch.Generator().manual_seed(7)
    classes = torch.tensor([0, 2, 3, 6])
    prototypes = 0.8 * F.normalize(texts()[classes] + torch.randn(4, 64, generator=generator) / 8, dim=1)
    feature = views()[3, 0]
    rows = _Rows(texts(), prototypes, classes)
    moved, lengths = adapter._step(rows, feature)  # type: ignore[attr-defined]
    got = torch.cat([moved[:7], moved[8:]]) / torch.cat([lengths[:7], lengths[8:]])[:, None]

    residuals = [torch.zeros(7, 64, requires_grad=True), torch.zeros(4, 64, requires_grad=True)]
    text, image = F.normalize(texts() + residuals[0], dim=1), F.normalize(prototypes + residuals[1], dim=1)
    votes = 6.0 * (-5.0 * (1 - image @ feature)).exp()
    probs = (30 * text @ feature).index_add(0, classes, votes).softmax(0)
    contrast = F.cross_entropy(image @ text[classes].T / 0.01, torch.arange(4))
    optimizer = torch.optim.AdamW(residuals, lr=0.01, eps=1e-3, weight_decay=0.1)
    (-(probs * probs.log()).sum() + alignment * contrast).backward()
    optimizer.step()
    moved = [texts() + residuals[0].detach(), prototypes + residuals[1].detach()]
    torch.testing.assert_close(got, F.normalize(torch.cat(moved), dim=1), rtol=1e-3, atol=1e-4)
