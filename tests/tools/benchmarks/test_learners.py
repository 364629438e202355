"""The benchmark of learners compares like with like: both ways take the same step, and everything is put back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks._naive import naive_towers
from vlprompt.backbones import Backbone
from vlprompt.learners import create_learner, list_learners

NAMES = ["dog", "red circle", "hummingbird"]


@pytest.fixture
def bench(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The benchmark on the small backbone of the tests."""
    monkeypatch.setattr("benchmarks.learners.create_backbone", lambda name: backbone)
    return partial(BENCHMARKS.get("learners").target, isolated=False)


@pytest.mark.slow
def test_both_ways_take_the_same_step(backbone: Backbone, bench: Callable[..., dict[str, Any]]) -> None:
    rows = bench(classes=5, batch=3, repeats=1)["learners"]
    learners = {name: create_learner(name, backbone, NAMES) for name in list_learners()}
    stepping = {
        name for name, learner in learners.items() if learner.learned_parameters() and not learner.solves
    }
    assert {"coop", "maple", "multi_lane"} <= stepping
    assert stepping.isdisjoint({"zero_shot", "linear_probe", "session_probe", "text_search"})
    assert {name.split(" (")[0] for name in rows} == stepping

    for name, row in rows.items():
        assert row["fast_s"] > 0, name
        assert row["speedup"] == pytest.approx(row["naive_s"] / row["fast_s"]), name
        if name in ("clip_lora", "dbom", "lasp"):  # draw dropout or noise
            assert row["update_rel_diff"] is None
        else:
            assert row["update_rel_diff"] < 1e-4, name


def test_sentences_that_do_not_fit_into_memory_are_run_in_chunks_to_the_same_step(
    backbone: Backbone, images: Tensor
) -> None:
    batch = {"image": images, "label": torch.arange(len(images)) % len(NAMES)}
    for name in ("coop", "cocoop", "maple", "clip_lora"):
        learner = create_learner(name, backbone, NAMES, **({"dropout": 0.0} if name == "clip_lora" else {}))
        gradients, asides = [], []
        for memory in (1 << 40, 1):
            with naive_towers(learner, memory=memory) as aside:
                sum(learner.loss(batch).values()).backward()
            gradients.append([p.grad.clone() for p in learner.learned_parameters().values()])
            learner.zero_grad()
            asides.append(aside.seconds)
        assert asides[0] == 0 < asides[1]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_learner_has_a_process_of_its_own_and_one_that_needs_too_much_a_row_that_says_so() -> None:
    target = BENCHMARKS.get("learners").target
    rows = target(backbone="tiny", classes=4, batch=2, repeats=1, only="coop")["learners"]
    assert rows["coop"]["update_rel_diff"] < 1e-4
    rows = target(backbone="tiny", classes=4, batch=20_000_000, repeats=1, only="coop")["learners"]
    assert "half of this machine's memory" in rows["coop"]["refused"]


def test_what_can_t_work_says_why(
    make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = make_backbone(vision={"layers": (1, 1, 1, 1), "width": 16, "head_width": 16})
    monkeypatch.setattr("benchmarks.learners.create_backbone", lambda name: conv)
    rows = BENCHMARKS.get("learners").target(
        isolated=False, classes=4, batch=2, repeats=1, only="*op*", naive=False
    )["learners"]
    assert "fast_s" in rows["coop"]
    assert "naive_s" not in rows["coop"]
    rows = BENCHMARKS.get("learners").target(isolated=False, classes=4, batch=2, only="maple", naive=False)[
        "learners"
    ]
    assert "image tower" in rows["maple"]["refused"]


def test_the_obvious_way_computes_the_same_with_a_graph_from_the_inputs(
    backbone: Backbone, images: Tensor
) -> None:
    learner = create_learner("clip_adapter", backbone, NAMES).train()
    seen: list[Tensor] = []
    hook = backbone.text.blocks[0].register_forward_hook(lambda *a: seen.append(a[2]))
    expected = learner(images)
    assert not seen  # constant class weights need no text pass
    with naive_towers(learner, constant_text=True):
        embeddings = backbone.image_embeddings(images)
        got = learner(images)
    hook.remove()
    torch.testing.assert_close(got, expected)
    assert embeddings.requires_grad
    assert [tuple(x.shape) for x in seen] == [(3, backbone.text.context_length, backbone.text.width)]
    assert seen[0].requires_grad
    assert not backbone.image_embeddings(images).requires_grad
    assert "encode" not in vars(backbone.text)
    assert "class_weights" not in vars(learner)
