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
from vlprompt.data.forensics import VIEWS, examined, statistics_width
from vlprompt.learners import create_learner
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
