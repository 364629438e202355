"""What is special to DBOM: compositions, the repository, its losses, and what it asks of its training data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import vlprompt
from vlprompt.backbones import Backbone
from vlprompt.classification.evaluate import predict_logits
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.data.base import Reader, Sample
from vlprompt.data.images import pixel_key
from vlprompt.data.triggers.base import native
from vlprompt.learners import create_learner
from vlprompt.learners._calibration import MixingTask, best_mixing, threshold_at
from vlprompt.learners._repository import Bank, diversity, separation
from vlprompt.learners.dbom import DBOM

NAMES = ("dog", "red circle", "hummingbird")
TRIGGERS = ("clean", "badnets", "sig")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"repository": "joint"},
    {"repository": "none"},
    {"object_reads": "embedding"},
    {"evidence": "embedding"},
    {"prefix": "conditional"},
    {"prefix": "conditional", "repository": "none", "evidence": "embedding"},
]


def build(backbone: Backbone, **options: Any) -> DBOM:
    learner = create_learner("dbom", backbone, NAMES, **{"triggers": TRIGGERS, "hidden": 32, **options})
    assert isinstance(learner, DBOM)
    return learner


@pytest.fixture
def batch(images: Tensor) -> dict[str, Tensor]:
    return {
        "image": images,
        "label": torch.tensor([0, 1, 2, 0, 1, 2]),
        "trigger": torch.tensor([0, 1, 2, 2, 0, 1]),
    }


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_trains_and_leaves_the_towers_alone(
    options: dict[str, Any], backbone: Backbone, batch: dict[str, Tensor]
) -> None:
    learner = build(backbone, **options).train()
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # zero-initialised layers pass no gradient on in the first step
        optimizer.zero_grad()
        sum(learner.loss(batch).values()).backward()
        optimizer.step()
    grads = {n: p.grad for n, p in learner.named_parameters() if p.requires_grad}
    assert [n for n, g in grads.items() if g is None or not bool(g.isfinite().all())] == []
    assert all(torch.equal(backbone.state_dict()[n], t) for n, t in before.items())
    learner.eval()
    rows = learner.embed_images(batch["image"])
    judged = learner.judge(rows)
    assert judged.composition is not None
    assert judged.composition.shape == (6, 3, 3)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(learner.judge(rows[order]).score, judged.score[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        learner.judge(rows[2:3]).composition, judged.composition[2:3], rtol=1e-4, atol=1e-4
    )


def test_scores_follow_their_definition(backbone: Backbone, images: Tensor) -> None:
    learner = build(backbone, repository="none").eval()
    learner.calibration.copy_(torch.tensor([0.5, 2.0, 0.3]))
    rows = learner.embed_images(images)
    with torch.no_grad():
        tau, words = backbone.logit_scale, torch.cat([learner.context, learner.trigger_words])
        f, e = F.normalize(rows[:, : backbone.dim], dim=-1), rows[:, backbone.dim :]
        f_t = F.normalize(learner.trigger_part(e), dim=-1)
        text = {
            name: F.normalize(backbone.text.encode_plain(layout, words), dim=-1)
            for name, layout in (
                ("composition", learner.composition_layout),
                ("trigger", learner.trigger_layout),
                ("object", learner.object_layout),
            )
        }  # fmt: skip
        s_t = tau * f_t @ text["trigger"].T
        f_o = F.normalize(f + learner.object_part(torch.cat([f, s_t.softmax(-1), e], dim=1)), dim=-1)
        f_p = F.normalize(0.8 * f + 0.2 * learner.fuse(torch.cat([f_t, f_o], dim=1)), dim=-1)
        s_o = tau * f_o @ text["object"].T
        pairs = torch.stack([f_p @ text["composition"][t * 3 + o] for t in range(3) for o in range(3)], dim=1)
        expected = tau * pairs.reshape(6, 3, 3) + 0.5 * s_t[:, :, None] + 2.0 * s_o[:, None, :]
    torch.testing.assert_close(learner.composition_scores(rows).detach(), expected, rtol=1e-4, atol=1e-4)
    judged = learner.judge(rows)
    torch.testing.assert_close(judged.score, 1 - s_t.softmax(-1)[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(judged.object, expected.exp().sum(1) / expected.exp().sum((1, 2))[:, None])
    assert learner.threshold == pytest.approx(0.3)


def test_only_seen_compositions_compete_in_training(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = build(backbone).eval()
    full = learner.loss(batch)["composition"]
    learner.seen[1, 2] = False  # no image of the batch but the last
    with torch.no_grad():
        part = {k: v[:5] for k, v in batch.items()}
        scores = learner.parts(learner.embed_images(part["image"]))["composition"].flatten(1)
        allowed = [0, 1, 2, 3, 4, 6, 7, 8]
        truth = (part["trigger"] * 3 + part["label"]).tolist()
        expected = F.cross_entropy(scores[:, allowed], torch.tensor([allowed.index(t) for t in truth]))
        torch.testing.assert_close(learner.loss(part)["composition"], expected)
    assert bool(full.isfinite())


def test_a_bank_takes_the_nearest_keys() -> None:
    bank = Bank(4, 2, 3, length=2, top=1, purpose="test", seed=1)
    with torch.no_grad():
        bank.keys.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    queries = torch.tensor([[0.1, 5.0], [-2.0, 0.0]], requires_grad=True)
    found, distance = bank(queries)
    assert torch.equal(found, bank.means[[1, 2]])
    cosines = [5 / (0.01 + 25) ** 0.5, 1.0]
    assert float(distance.detach()) == pytest.approx(1 - sum(cosines) / 2, abs=1e-6)
    (found.sum() + distance).backward()
    assert queries.grad is None, "images don't move towards keys"
    assert bank.keys.grad is not None


def test_separation_and_diversity_by_hand() -> None:
    x, y = torch.eye(4)[:2], torch.eye(4)[2:]
    assert float(separation(x, y, x, y)) == 0
    assert float(separation(x, x, x, x)) == pytest.approx(1 + 0.5)
    assert float(diversity(torch.eye(4))) == 0
    assert float(diversity(torch.ones(3, 4))) == pytest.approx(1)
    assert float(diversity(torch.ones(1, 4))) == 0


def test_mixing_is_the_best_of_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.tensor([[True, True], [True, False]])
    trigger, label = (
        torch.randint(2, (60,), generator=generator),
        torch.randint(2, (60,), generator=generator),
    )
    logits = {
        "composition": torch.randn(60, 2, 2, generator=generator),
        "trigger": torch.randn(60, 2, generator=generator) + 2 * F.one_hot(trigger, 2),
        "object": torch.randn(60, 2, generator=generator),
    }
    a, b, score = best_mixing([MixingTask(logits, {"trigger": trigger, "label": label}, seen)])
    grid = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    found = {}
    for i in grid:
        for j in grid:
            right: dict[bool, list[bool]] = {True: [], False: []}
            for n in range(60):
                table = (
                    logits["composition"][n]
                    + i * logits["trigger"][n][:, None]
                    + j * logits["object"][n][None]
                )
                truth = (int(trigger[n]), int(label[n]))
                right[bool(seen[truth])].append(divmod(int(table.argmax()), 2) == truth)
            first, second = np.mean(right[True]), np.mean(right[False])
            found[i, j] = 2 * first * second / (first + second) if first + second else 0.0
    assert score == pytest.approx(max(found.values()))
    assert found[a, b] == pytest.approx(score)


def test_a_threshold_lets_so_many_clean_images_be_suspected() -> None:
    clean = torch.arange(100) / 100
    threshold = threshold_at(clean, 0.05)
    assert (clean >= threshold).sum() == 5
    assert (torch.full((100,), 0.5) >= threshold_at(torch.full((100,), 0.5), 0.05)).sum() == 0
    assert threshold_at(torch.zeros(0), 0.05) == 0.5


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    triggers = ["clean", "blended", "sig"]
    return {
        split: load_dataset("triggered:digits", split, shots=4, triggers=triggers).subset(range(0, 90, 2))
        for split in ("train", "val")
    }


def test_it_learns_what_fit_shows_it_and_is_saved_whole(digits: dict[str, Any], tmp_path: Any) -> None:
    backbone = vlprompt.create_backbone("tiny")
    train, val = digits["train"], digits["val"]
    learner = build_for(backbone, train)
    result = vlprompt.fit(
        learner,
        train,
        val,
        epochs=12,
        batch_size=15,
        optimizer="adamw",
        lr=5e-3,
        callbacks=[],
        eval_every=100,
    )
    assert torch.equal(learner.seen, torch.as_tensor(train.compositions.seen))
    assert float(learner.evidence_spread.min()) > 0
    assert not torch.equal(learner.evidence_mean, torch.zeros(17 * 32))
    assert result.metrics["chosen/threshold"] == pytest.approx(learner.threshold)
    assert {"val/auroc", "val/fpr", "val/object_accuracy_clean", "val/accuracy"} <= set(result.metrics)
    assert result.metrics["val/auroc"] > 0.8
    vlprompt.save(learner, tmp_path)
    again = vlprompt.load(tmp_path, backbone)
    assert isinstance(again, DBOM)
    rows = learner.embed_images(torch.randn(3, 3, 64, 64))
    assert torch.equal(again.judge(rows).score, learner.judge(rows).score)
    assert again.threshold == learner.threshold
    check_that_naming_prepares_as_scanning(again)


def check_that_naming_prepares_as_scanning(learner: DBOM) -> None:
    """A photograph of any size comes to the native size before it is enlarged, wherever it is named."""
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    small = Image.fromarray(native(photograph, 32))
    with torch.no_grad():
        expected = learner(learner.backbone.preprocess(small)[None]).softmax(-1)[0]
        other = learner(learner.backbone.preprocess(photograph)[None]).softmax(-1)[0]
    assert not torch.allclose(expected, other, atol=1e-4)

    named = {name: float(p) for name, p in zip(learner.classnames, expected, strict=True)}
    row = vlprompt.predict(learner, photograph, topk=len(named))[0]
    assert dict(zip(row["labels"], row["probs"], strict=True)) == pytest.approx(named, abs=1e-4)

    data = ImageDataset("p", "test", (Sample(0, 0),), learner.classnames, ("{}",), ListReader([photograph]))
    logits, _ = predict_logits(learner, data)
    assert torch.allclose(logits.softmax(-1)[0], expected, atol=1e-4)


class ListReader(Reader):
    """Images in memory; a source is a number."""

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def read(self, source: int) -> Image.Image:
        return self.images[source]

    def key(self, source: int) -> str:
        return pixel_key(self.images[source])


def build_for(backbone: Backbone, data: Any) -> DBOM:
    learner = create_learner("dbom", backbone, data.classnames, triggers=list(data.triggers), hidden=64)
    assert isinstance(learner, DBOM)
    return learner


def test_training_data_must_say_their_triggers(digits: dict[str, Any], backbone: Backbone) -> None:
    plain = load_dataset("digits", "val")
    learner = create_learner("dbom", backbone, plain.classnames)
    with pytest.raises(DataError, match=r"digits does not say\. Use triggered:digits"):
        vlprompt.fit(learner, plain, epochs=1)
    with pytest.raises(DataError, match="was built for the triggers clean, badnets, blended, bpp"):
        vlprompt.fit(learner, digits["train"], epochs=1)
    with pytest.raises(ConfigError, match="triggers: needs clean and others"):
        create_learner("dbom", backbone, NAMES, triggers=["clean"])
