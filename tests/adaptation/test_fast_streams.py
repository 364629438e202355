"""Methods that follow a stream by small steps give what obvious loops in float64 give, which compute all anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.adaptation.test_online_golden import encoded, with_texts
from vlprompt import create_adapter
from vlprompt.adaptation._features import FeatureAdapter
from vlprompt.adaptation.oga import OnlineGaussian
from vlprompt.backbones import Backbone

CLASSES = 9
WIDTH = 32
SEEN = CLASSES - 1  # the last class is never seen


def class_weights(classes: int = CLASSES, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return F.normalize(torch.randn(classes, width, generator=generator), dim=1)


def stream(count: int, noise: float, decay: float = 0, views: int = 1, repeats: bool = True) -> Tensor:
    """Return (N, V, d) features around class weights; noise falls off over dimensions, and images may come twice."""
    generator = torch.Generator().manual_seed(12)
    labels = torch.randint(0, SEEN, (count,), generator=generator)
    # Rare classes, too: their number falls off.
    labels = torch.minimum(labels, torch.randint(0, SEEN, (count,), generator=generator))
    spread = torch.arange(1.0, WIDTH + 1) ** -decay
    features = noise * spread * torch.randn(count, views, WIDTH, generator=generator)
    features = F.normalize(class_weights()[labels][:, None] + features, dim=-1)
    if repeats:
        # Every seventh image is the one before it.
        repeated = torch.arange(7, count, 7)
        features[repeated] = features[repeated - 1]
    return features


def build(name: str, backbone: Backbone, scale: float = 30.0, **options: Any) -> FeatureAdapter:
    names = [f"class {number}" for number in range(CLASSES)]
    return with_texts(create_adapter(name, backbone, names, **options), class_weights(), scale)


def slow_oga(features: Tensor, slots: int, mean: str, scale: float, tau: float) -> Tensor:
    """Return (N, C) probabilities by section 3 of the paper: after each image the covariance is inverted."""
    weights = class_weights().double()
    cache: list[list[tuple[float, Tensor]]] = [[] for _ in weights]
    answers = []
    for image in features[:, 0].double():
        logits = scale * weights @ image
        probs = logits.softmax(0)
        uncertainty = -float((probs * probs.log()).sum())
        own = cache[int(logits.argmax())]
        if uncertainty < math.log(len(weights)):
            if len(own) < slots:
                own.append((uncertainty, image))
            else:
                worst = max(range(slots), key=lambda number: own[number][0])
                if uncertainty < own[worst][0]:
                    own[worst] = (uncertainty, image)

        means = weights.clone()
        for label, kept in enumerate(cache):
            if len(kept) >= 2:
                total = torch.stack([key for _, key in kept]).sum(0)
                means[label] = total / (len(kept) if mean == "counts" else slots)
        precision = WIDTH * torch.eye(WIDTH).double()
        if max(map(len, cache)) >= 3:
            residuals = torch.stack([key - means[c] for c, kept in enumerate(cache) for _, key in kept])
            count = len(residuals)
            residuals = residuals - residuals.mean(0)
            scatter = residuals.T @ residuals
            if count > 4 * WIDTH:
                precision = torch.linalg.pinv(scatter / (count - 1))
            else:
                shrunk = scatter + scatter.trace() / (count - 1) * torch.eye(WIDTH)
                precision = WIDTH * torch.linalg.pinv(shrunk)
        differences = image - means
        likelihoods = -0.5 * ((differences @ precision) * differences).sum(1)
        answers.append((probs.log() + tau * likelihoods).softmax(0))
    return torch.stack(answers)


@pytest.mark.parametrize("mean", ["counts", "slots"])
@pytest.mark.parametrize(
    ("slots", "noise", "decay"), [(1, 0.2, 0), (4, 0.2, 0), (8, 0.15, 0.5), (40, 0.3, 0), (40, 0.3, 1)]
)
def test_oga_inverts_nothing_anew_and_gives_the_same(
    slots: int, noise: float, decay: float, mean: str, backbone: Backbone
) -> None:
    features = stream(400, noise, decay)
    adapter = build("oga", backbone, views=1, slots=slots, mean=mean)
    got = torch.cat([adapter.adapt(encoded(part)).probs for part in features.split(16)])
    expected = slow_oga(features, slots, mean, 30.0, 0.05)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_oga_computes_the_inverse_from_its_cache_now_and_then(
    backbone: Backbone,
) -> None:
    adapter = build("oga", backbone, views=1, slots=12)
    assert isinstance(adapter, OnlineGaussian)
    ages = []
    for part in stream(400, 0.2).split(1):
        adapter.adapt(encoded(part))
        ages.append(int(adapter.memory["age"]))
    anew = sum(age == 0 for age, before in zip(ages[1:], ages, strict=False) if before)
    assert max(ages) > 16  # most images are followed
    assert anew > 2


def slow_ecalp(features: Tensor, neighbours: int, power: float, twin: bool, window: int | None) -> Tensor:
    """Return (N, C) labels by section 3 of the paper: for each image the whole graph is built, as a dense matrix."""
    weights = class_weights().double()
    classes = len(weights)
    emphasis = F.normalize(weights.var(0), dim=0)
    images = features[:, 0].double()
    cosines = F.normalize(images * emphasis, dim=1) @ images.T
    cosines = cosines.triu() + cosines.triu(1).T  # the weights are on the older of two images
    label = {}
    value = {}
    answers = []
    for newest in range(len(images)):
        oldest = 0 if window is None else max(0, newest + 1 - window)
        members = list(range(oldest, newest + 1))
        nodes = [*members, newest] if twin else members
        edges = torch.zeros(classes + len(nodes), classes + len(nodes)).double()
        for row, i in enumerate(nodes):
            for text in (weights @ images[i]).topk(3).indices.tolist():
                edges[classes + row, text] = max(float(weights[text] @ images[i]), 0) ** power
            # Of equally near images the later is the neighbour.
            row_cosines = cosines[i, nodes].tolist()
            near = sorted(range(len(nodes)), key=lambda column: (row_cosines[column], column))
            for column in near[-neighbours:]:
                cosine = row_cosines[column]
                edges[classes + row, classes + column] = cosine**power if cosine > 0 else 0

        edges = edges + edges.T
        scale = 1 / (edges.sum(1).sqrt() + 1e-6)
        normalised = scale[:, None] * edges * scale
        labels = torch.zeros(len(nodes), classes).double()
        for row, i in enumerate(members):
            if i in label:
                labels[row, label[i]] = value[i]
        for _ in range(3):
            labels = normalised[classes:] @ torch.cat([torch.eye(classes).double(), labels])
        for row, i in enumerate(members):
            label[i] = int(labels[row].argmax())
            value[i] = float(labels[row].max()) / 5
        answers.append(labels[-1] / labels[-1].sum())
    return torch.stack(answers)


@pytest.mark.parametrize(
    ("neighbours", "power", "twin", "window"),
    [
        pytest.param(8, 10.0, True, None, marks=pytest.mark.slow),
        (8, 10.0, True, 100),
        (6, 10.0, False, None),
        (3, 4.0, True, 30),
        (8, 10.0, True, 1),
        (5, 0.0, False, 12),
    ],
)
def test_ecalp_moves_a_few_edges_and_gives_the_same(
    neighbours: int, power: float, twin: bool, window: int | None, backbone: Backbone
) -> None:
    # Only rounding decides between two equal images that compete for one place.
    repeats = neighbours == 8 and window is None
    features = stream(220 if twin else 140, 0.2, repeats=repeats)
    options = {"neighbours": neighbours, "power": power, "twin": twin, "window": window}
    adapter = build("ecalp", backbone, views=1, **options)
    got = torch.cat([adapter.adapt(encoded(part)).probs for part in features.split(16)])
    expected = slow_ecalp(features, neighbours, power, twin, window)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def slow_dpe(features: Tensor, scale: float) -> Tensor:
    """Return (N, C) probabilities by section 3 of the paper, with autograd and AdamW."""
    weights = class_weights().double()
    cache: list[list[tuple[float, Tensor]]] = [[] for _ in weights]
    accepted = 0
    answers = []
    for image in features[:, 0].double():
        probs = (scale * F.normalize(weights, dim=1) @ image).softmax(0)
        uncertainty = float(torch.special.entr(probs).sum())
        own = cache[int(probs.argmax())]
        own.append((uncertainty, image))
        own.sort(key=lambda entry: entry[0])
        del own[3:]
        present = [c for c, kept in enumerate(cache) if kept]
        prototypes = torch.stack([torch.stack([key for _, key in cache[c]]).mean(0) for c in present])

        shifts = [torch.zeros_like(part).requires_grad_() for part in (weights, prototypes)]
        optimizer = torch.optim.AdamW(shifts, lr=5e-4, eps=1e-3, weight_decay=0.1)
        for step in range(2):
            text = F.normalize(weights + shifts[0], dim=1)
            moved = F.normalize(prototypes + shifts[1], dim=1)
            votes = 6 * (-5 * (1 - moved @ image)).exp()
            logits = (scale * text @ image).index_add(0, torch.tensor(present), votes)
            if step == 0:
                contrast = F.cross_entropy(moved @ text[present].T / 0.01, torch.arange(len(present)))
                (torch.special.entr(logits.softmax(0)).sum() + 0.5 * contrast).backward()
                optimizer.step()
        answer = logits.detach().softmax(0)
        if float(torch.special.entr(answer).sum()) / math.log2(len(weights)) < 0.1:
            accepted += 1
            weights = (accepted * weights + text.detach()) / (accepted + 1)
        answers.append(answer)
    return torch.stack(answers)


def test_dpe_writes_its_gradient_out_and_gives_the_same(backbone: Backbone) -> None:
    features = stream(300, 0.2, repeats=False)
    adapter = build("dpe", backbone, views=1)
    got = torch.cat([adapter.adapt(encoded(part)).probs for part in features.split(16)])
    assert int(adapter.state()["accepted"]) > 50
    torch.testing.assert_close(got.double(), slow_dpe(features, 30.0), rtol=1e-3, atol=1e-5)
