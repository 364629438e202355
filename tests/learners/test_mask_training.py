"""What the trainer makes of mask tuning: plain and gated updates, precision, processes, resuming, figures."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.learners.masking import (
    NAMES,
    RECIPE,
    named_scores,
    obvious,
    scatter,
    scores_of,
    train,
)
from vlprompt import create_learner, fit
from vlprompt.backbones import Backbone
from vlprompt.core.precision import Precision
from vlprompt.data import ImageDataset
from vlprompt.saved.prompts import read
from vlprompt.training.callbacks import Callback


def test_without_regularity_it_is_plain_mask_tuning(backbone: Backbone, digits: ImageDataset) -> None:
    plain = scores_of(train(backbone, digits, "amt"))
    assert torch.equal(scores_of(train(backbone, digits, "ramt", gdr_lambda=0.0)), plain)
    gated = train(backbone, digits, "ramt")
    assert not torch.equal(scores_of(gated), plain)
    assert torch.equal(scores_of(train(backbone, digits, "amt", gdr_lambda=1.0)), scores_of(gated))
    assert float((plain <= 0.005).float().mean()) > 0.05  # the authors' code takes no step here


def test_training_follows_a_loop_written_out_by_hand(backbone: Backbone, digits: ImageDataset) -> None:
    """Adam on masks, from the obvious tower and the formulas."""
    learner = create_learner("amt", backbone, digits.classnames, digits.templates)
    scores = {n: s.detach().clone().requires_grad_() for n, s in named_scores(learner).items()}
    images = torch.stack([backbone.preprocess(digits[i][0]) for i in range(len(digits))])
    labels = torch.tensor(digits.labels)
    weights = backbone.class_weights(digits.classnames, digits.templates)
    optimizer = torch.optim.Adam(scores.values(), lr=3e-3)
    for _ in range(4):
        features = F.normalize(obvious(learner, scores, images), dim=-1)
        loss = F.cross_entropy(backbone.logit_scale * features @ weights.T, labels)
        loss = loss + 1e-4 * sum(s.norm() for s in scores.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fit(learner, digits, epochs=4, lr=3e-3, batch_size=len(digits), **RECIPE)
    same = [(learner.masks()[n] == (s > 0.005)).float().mean() for n, s in scores.items()]
    assert min(same) > 0.999  # Adam's step is a sign where gradients are rounding errors
    assert 0.05 < learner.figures()["masked_share"] < 0.6


def test_accumulation_does_not_change_the_step(backbone: Backbone, digits: ImageDataset) -> None:
    found = []
    for parts in (1, 4):
        learner = scatter(create_learner("ramt", backbone, digits.classnames, digits.templates))
        options = {**RECIPE, "optimizer": "sgd", "momentum": 0.0}
        fit(learner, digits, epochs=1, lr=1.0, batch_size=20, accumulation=parts, **options)
        found.append(scores_of(learner))
    moved = (found[0] - scores_of(scatter(create_learner("ramt", backbone, NAMES)))).abs()
    assert float(moved.max()) > 1e-3
    assert float(((found[0] - found[1]).abs() > 1e-4 * moved.max()).float().mean()) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_nearly_the_same_step(
    precision: Precision, backbone: Backbone, digits: ImageDataset
) -> None:
    half = copy.deepcopy(backbone).set_precision(precision)
    steps = []
    start = scores_of(scatter(create_learner("ramt", backbone, digits.classnames)))
    for tower in (backbone, half):
        learner = scatter(create_learner("ramt", tower, digits.classnames, digits.templates, gdr_lambda=0.0))
        options = {**RECIPE, "optimizer": "sgd", "momentum": 0.0}
        fit(learner, digits, epochs=1, lr=1.0, batch_size=20, **options)
        steps.append(scores_of(learner) - start)
    assert float(F.cosine_similarity(*steps, dim=0)) > 0.98
    gated = train(half, digits)
    assert 0.01 < gated.figures()["masked_share"] < 0.9


@pytest.mark.campaign
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Gradients are averaged before the gate, and all draw the same: the same masks but for sums' last bits."""
    config = """
task: classification
name: test
backbone: {name: tiny, pretrained: random}
learner: {name: ramt, norm_weight: 0}
data: {name: digits, validate_on: none}
train: {epochs: 3, lr: 300, batch_size: 10, optimizer: sgd, momentum: 0, weight_decay: 0, warmup_epochs: 0}
protocol: {shots: [2], seeds: [1]}
"""
    root, found = Path(__file__).parent.parent.parent, []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "run.yaml").write_text(f"{config}output: {folder}\n")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(root / "tools/train.py"), "--cfg", str(folder / "run.yaml")],
                       env=environment, check=True, capture_output=True)  # fmt: skip
        (saved,) = folder.glob("test/*/cells/*/prompt")
        figures = json.loads((saved.parents[2] / "metrics.json").read_text())
        found.append(
            (
                read(saved)[1],
                figures["train/learned/masked_share"],
                figures["train/learned/dropped_gradient_share"],
            )
        )
    (one, off, dropped), (two, other_off, other_dropped) = found
    assert off > 0.01
    assert dropped > 0.01
    assert other_off == pytest.approx(off, rel=0.01)
    assert other_dropped == pytest.approx(dropped, rel=0.01)
    differing = sum(int(np.unpackbits((one[n] ^ two[n]).numpy()).sum()) for n in one)
    assert differing < 0.001 * 8 * sum(bits.numel() for bits in one.values())


class StopAt(Callback):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, trainer: Any, losses: dict[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise InterruptedError


def test_resume_is_bit_identical(backbone: Backbone, digits: ImageDataset, tmp_path: Path) -> None:
    whole = train(backbone, digits, epochs=4)
    options = {k: v for k, v in RECIPE.items() if k != "callbacks"} | {
        "epochs": 4,
        "lr": 3e-3,
        "batch_size": 10,
    }
    learner = create_learner("ramt", backbone, digits.classnames, digits.templates)
    with pytest.raises(InterruptedError):
        fit(learner, digits, folder=tmp_path, checkpoint_seconds=0, callbacks=[StopAt(5)], **options)
    resumed = create_learner("ramt", backbone, digits.classnames, digits.templates)
    fit(resumed, digits, folder=tmp_path, resume=True, callbacks=[], checkpoint_seconds=0, **options)
    assert torch.equal(scores_of(resumed), scores_of(whole))
    assert resumed.figures() == whole.figures()


def test_the_frozen_model_sees_an_image_once(
    backbone: Backbone, digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached over fixed views, so the frozen tower runs before training only; masks come out as without a cache."""
    calls: list[int] = []
    original = Backbone.image_embeddings

    def counted(self: Backbone, images: Tensor, *rest: Any) -> Tensor:
        calls.append(len(images.unique(dim=0)))  # a batch is filled up with images that are in it already
        return original(self, images, *rest)

    monkeypatch.setattr(Backbone, "image_embeddings", counted)
    cached = train(backbone, digits, fit_options={"augmentation": "flip", "views": 2})
    assert sum(calls) == 2 * len(digits)
    calls.clear()
    monkeypatch.setattr("vlprompt.classification.sources.TrainingSource.repeats", False)
    fresh = train(backbone, digits, fit_options={"augmentation": "flip", "views": 2})
    assert len(calls) >= 4
    same = (scores_of(cached) > 0.005) == (scores_of(fresh) > 0.005)
    assert float(same.float().mean()) > 0.999


def test_it_forgets_less(backbone: Backbone, digits: ImageDataset) -> None:
    """A random frozen model contradicts the labels: plain masks leave it behind, gated ones less so."""
    drift = {}
    images = torch.stack([backbone.preprocess(digits[i][0]) for i in range(len(digits))])
    zero = create_learner("zero_shot", backbone, digits.classnames, digits.templates)(images).log_softmax(-1)
    for form in ("amt", "ramt"):
        learner = train(backbone, digits, form, epochs=6, norm_weight=0.0).eval()
        with torch.no_grad():
            logits = learner(images)
        drift[form] = float(F.kl_div(logits.log_softmax(-1), zero, reduction="batchmean", log_target=True))
        loss = F.cross_entropy(logits, torch.tensor(digits.labels))
        assert loss < F.nll_loss(zero, torch.tensor(digits.labels))
    assert drift["ramt"] < 0.7 * drift["amt"]


def test_scores_times_s_learn_at_rate_over_s(backbone: Backbone, digits: ImageDataset) -> None:
    plain = train(backbone, digits, "amt", norm_weight=0.0)
    options = {"init": 0.25, "threshold": 0.125, "norm_weight": 0.0}
    scaled = train(backbone, digits, "amt", lr=25 * 3e-3, **options)
    same = [
        float((a == b).float().mean())
        for a, b in zip(plain.masks().values(), scaled.masks().values(), strict=True)
    ]
    assert min(same) > 0.999


def test_too_few_steps_are_told(
    backbone: Backbone, digits: ImageDataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        learner = train(backbone, digits, epochs=1, lr=1e-3)
    assert (
        "ramt: no weight was switched off. Steps times rate must exceed init - threshold = 0.005"
        in caplog.text
    )
    assert learner.figures()["masked_share"] == 0


def test_figures(backbone: Backbone, digits: ImageDataset) -> None:
    learner = create_learner("ramt", backbone, digits.classnames, digits.templates)
    result = fit(learner, digits, epochs=3, lr=3e-3, batch_size=10, **RECIPE)
    masks = learner.masks()
    off = sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert result.metrics["learned/masked_share"] == pytest.approx(off)
    assert off > 0.01
    assert 0.05 < result.metrics["learned/dropped_gradient_share"] < 0.6
    assert 0 < result.metrics["learned/norm_gradient_share"] < 0.5
    assert {"cross_entropy", "kl", "norm_penalty"} <= set(result.history[-1])
