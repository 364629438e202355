"""DBOM on pixels at their own size: what it reads, how views are told apart, and what it finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vlprompt
from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data import load_dataset
from vlprompt.data.backgrounds import background_images
from vlprompt.data.forensics import VIEWS, examined, statistics_width
from vlprompt.learners import create_learner
from vlprompt.learners._evidence import Background
from vlprompt.learners.dbom import DBOM
from vlprompt.metrics.backdoor import verdict_metrics


def build(backbone: Backbone, **options: object) -> DBOM:
    learner = create_learner(
        "dbom", backbone, ["one", "two"], evidence="native", triggers=["clean", "badnets", "sig"], **options
    )
    assert isinstance(learner, DBOM)
    return learner.eval()


def photograph(width: int, height: int) -> Image.Image:
    pixels = numpy_rng(0, "native", width, height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def test_rows_are_the_embedding_and_the_views_of_the_image_at_its_own_size(backbone: Backbone) -> None:
    learner = build(backbone)
    images = [photograph(150, 90), photograph(30, 40)]
    rows = learner.embed_images(torch.stack([learner.preprocess(image) for image in images]))
    d = backbone.dim
    assert rows.shape == (2, d + VIEWS * (1 + statistics_width()))
    expected = backbone.image_embeddings(torch.stack([backbone.preprocess(image) for image in images]))
    assert torch.equal(rows[:, :d], expected)
    for row, image in zip(rows, images, strict=True):
        assert torch.equal(row[d:], torch.from_numpy(examined(image)).flatten())


def test_images_that_were_prepared_for_the_tower_alone_are_refused(
    backbone: Backbone, images: Tensor
) -> None:
    with pytest.raises(DataError, match=r"prepare them with learner\.preprocess"):
        build(backbone)(images)


def test_the_score_is_that_of_the_most_suspicious_view(backbone: Backbone) -> None:
    learner = build(backbone)
    image = learner.preprocess(photograph(150, 90))[None]
    rows = learner.embed_images(image)
    whole = learner.judge(rows)

    d = backbone.dim
    single = []
    for number in range(VIEWS):
        views = torch.zeros(VIEWS, 1 + statistics_width())
        views[0] = rows[0, d:].unflatten(0, (VIEWS, -1))[number]
        single.append(learner.judge(torch.cat([rows[:, :d], views.flatten()[None]], dim=1)))

    scores = torch.cat([verdicts.score for verdicts in single])
    assert len(scores.unique()) == VIEWS
    assert whole.score[0] == pytest.approx(float(scores.max()), abs=1e-6)
    assert whole.trigger is not None
    likeliest = single[int(scores.argmax())].trigger
    assert likeliest is not None
    assert torch.allclose(whole.trigger, likeliest, atol=1e-6)


def test_verdicts_do_not_depend_on_what_else_is_in_the_batch(backbone: Backbone) -> None:
    learner = build(backbone)
    images = [photograph(150, 90), photograph(30, 40), photograph(64, 64)]
    rows = learner.embed_images(torch.stack([learner.preprocess(image) for image in images]))
    together = learner.judge(rows).score
    alone = torch.cat([learner.judge(row[None]).score for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.slow
def test_it_finds_triggers_of_a_few_pixels_that_enlarging_hides(tmp_path: Path) -> None:
    """Drawn scenes of many sizes, BadNets and WaNet at their own size; the baseline looks after enlarging."""
    backbone = vlprompt.create_backbone("tiny")
    scenes = load_dataset("scenes/shape", "train", shots=12, seed=1)
    rng = numpy_rng(0, "sizes of scenes")
    for split, images in (("train", range(0, 60)), ("val", range(60, 75)), ("test", range(75, 100))):
        for number in images:
            image, label = scenes[number % len(scenes)]
            side = int(rng.integers(28, 64))
            folder = tmp_path / split / scenes.classnames[label % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")

    options = {"native_size": "own", "triggers": ["clean", "badnets", "wanet"], "unseen": 0.0, "copies": 2}
    parts = {
        split: load_dataset(f"triggered:folder:{tmp_path}", split, **options)
        for split in ("train", "val", "test")
    }
    figures = {}
    for evidence in ("native", "shallow"):
        learner = create_learner(
            "dbom", backbone, parts["train"].classnames, triggers=options["triggers"], evidence=evidence
        )
        assert isinstance(learner, DBOM)
        vlprompt.fit(
            learner, parts["train"], parts["val"], epochs=12, batch_size=32, optimizer="adamw", lr=3e-3
        )
        rows = learner.embed_images(
            torch.stack([learner.preprocess(parts["test"][i][0]) for i in range(len(parts["test"]))])
        )
        figures[evidence] = verdict_metrics(learner.judge(rows), parts["test"], learner.threshold)

    assert learner.native_size is None
    assert figures["native"]["auroc"] > 0.85
    assert figures["native"]["auroc"] > figures["shallow"]["auroc"] + 0.05


def test_backgrounds_are_the_same_clean_images_of_many_sizes() -> None:
    images = background_images(30)
    again = background_images(12)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(images, again, strict=False))
    sides = [max(image.size) for image in images]
    assert min(sides) < 40
    assert max(sides) > 250
    assert {image.mode for image in images} == {"RGB"}


def test_a_background_comes_clean_and_with_triggers_and_keeps_some_from_learning(backbone: Backbone) -> None:
    learner = build(backbone)
    background = Background.of(learner, 10, 1)
    assert background.triggers.tolist()[::3] == [0] * 10
    assert sorted(background.triggers.tolist()) == [0] * 10 + [1] * 10 + [2] * 10
    expected = learner.embed_images(torch.stack([learner.preprocess(i) for i in background_images(10)]))
    assert torch.equal(background.rows[::3], expected)

    assert background.kept == 6
    assert torch.equal(background.clean, expected[:2])
    torch.manual_seed(0)
    rows, triggers = background.sample(200)
    learned = {row.numpy().tobytes() for row in background.rows[6:]}
    assert {row.numpy().tobytes() for row in rows} == learned
    assert (triggers == 0).float().mean() == pytest.approx(1 / 3, abs=0.12)


def test_the_threshold_also_lets_few_of_the_background_be_suspected() -> None:
    backbone = vlprompt.create_backbone("tiny")
    options = {"triggers": ["clean", "badnets", "sig"], "unseen": 0.0}
    train = load_dataset("triggered:digits", "train", **options).subset(range(24))
    val = load_dataset("triggered:digits", "val", **options).subset(range(24))
    learner = create_learner(
        "dbom", backbone, train.classnames, triggers=options["triggers"], evidence="native", background=40
    )
    assert isinstance(learner, DBOM)
    vlprompt.fit(learner, train, val, epochs=2, batch_size=24, optimizer="adamw", lr=3e-3)

    assert learner._background is not None
    clean = torch.tensor(val.trigger_labels) == 0
    embedded = learner.embed_images(torch.stack([learner.preprocess(val[i][0]) for i in range(len(val))]))
    for rows in (learner._background.clean, embedded[clean]):
        reached = learner.judge(rows).score >= learner.threshold
        assert float(reached.float().mean()) <= 0.05
