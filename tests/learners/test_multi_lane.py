"""MULTI-LANE against its literal equations; what a session may touch; what an image's batch may not matter to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.backbones.test_edits import TIMM
from tests.golden.session_learners import check_all_sessions, plain_vit, second_session, session_batch
from tests.golden.text_learners import read_golden
from tests.golden.trajectories import check_start, check_trajectory
from vlprompt import fit, load, load_dataset, save
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.lanes import Lane, block_inputs, class_token, lane_features, run_lanes
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import BackboneError, DataError
from vlprompt.data import ImageDataset
from vlprompt.learners import create_learner
from vlprompt.learners.multi_lane import MultiLane

GOLDEN = read_golden("multi_lane_small")
QUICK = {"epochs": 1, "batch_size": 16, "lr": 0.01, "optimizer": "adam", "callbacks": []}
FIRST, SECOND, THIRD = ("dog", "cat", "bird"), ("red circle", "star"), ("boat", "tulip")


def lanes_of(backbone: Backbone, count: int, prompted: int = 2) -> list[Lane]:
    generator = torch.Generator().manual_seed(count)
    width = backbone.vision.width
    return [
        Lane(
            torch.randn(4, width, generator=generator),
            torch.randn(prompted, 2, 3, width, generator=generator),
        )
        for _ in range(count)
    ]


def literal_pass(backbone: Backbone, images: Tensor, lane: Lane, start: Tensor) -> Tensor:
    """One lane as the paper writes it: whole token sequences, all rows projected, heads one by one."""
    tower = backbone.vision
    stream = tower.stream
    assert stream is not None
    x = stream.norm_before(stream.embed(images)[0])
    width = tower.width
    token = start.expand(len(images), 1, -1)
    selectors = lane.selectors.expand(len(images), -1, -1)

    for number, block in enumerate(tower.blocks):
        own = tower.kind == "vit"
        first, second = (block.ln_1, block.ln_2) if own else (block.norm1, block.norm2)
        weight = block.attn.in_proj_weight if own else block.attn.qkv.weight
        bias = block.attn.in_proj_bias if own else block.attn.qkv.bias
        project = block.attn.out_proj if own else block.attn.proj
        heads = block.attn.num_heads
        size = width // heads

        normed = first(x)
        attention = (first(selectors) @ normed.transpose(1, 2) / width**0.5).softmax(-1)
        tokens = torch.cat([first(token), attention @ normed], dim=1)  # (B, 1 + S, W)
        query, key, value = F.linear(tokens, weight, bias).split(width, -1)
        if number < len(lane.prompts):
            keys, values = (part.expand(len(images), -1, -1) for part in lane.prompts[number])
            key, value = torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)

        outputs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / size**0.5
            outputs.append(scores.softmax(-1) @ value[..., part])
        out = project(torch.cat(outputs, dim=-1))

        token = token + out[:, :1]  # the outputs of the mixtures are dropped
        token = token + block.mlp(second(token))
        selectors = selectors + first(selectors)
        selectors = selectors + block.mlp(second(selectors))
        x = stream.run(number, x, None)

    return token[:, 0]


def timm_backbone(make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(vision=TIMM, custom=True)


@pytest.mark.parametrize("kind", ["open_clip", "timm"])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_shortcuts_are_the_literal_pass(
    kind: str, count: int, make_backbone: Callable[..., Backbone], backbone: Backbone, images: Tensor
) -> None:
    tower = backbone if kind == "open_clip" else timm_backbone(make_backbone)
    lanes = lanes_of(tower, count)
    start = class_token(tower.vision)
    expected = torch.stack([literal_pass(tower, images, lane, start) for lane in lanes], dim=1)
    torch.testing.assert_close(run_lanes(tower.vision, images, lanes, start), expected, rtol=0, atol=1e-5)
    kept = block_inputs(tower.vision, images)
    torch.testing.assert_close(run_lanes(tower.vision, kept, lanes, start), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_lane_ends_in_the_joint_space(make_backbone: Callable[..., Backbone], images: Tensor) -> None:
    """The tower's own class token, as a lane's last state, becomes the tower's own feature."""
    for tower in (make_backbone(), timm_backbone(make_backbone)):
        stream = tower.vision.stream
        assert stream is not None
        x = stream.norm_before(stream.embed(images)[0])
        for number in range(tower.vision.layers):
            x = stream.run(number, x, None)
        features = lane_features(tower.vision, x[:, :1], projected=True)[:, 0]
        torch.testing.assert_close(features, tower.image_embeddings(images), rtol=0, atol=1e-4)


def test_equals_the_authors_code(tokenizer: TextTokenizer) -> None:
    options = {"selectors": 3, "prompts": 2, "depth": 2, "lane_start": "raw"}
    learner = second_session("multi_lane", GOLDEN, plain_vit(GOLDEN, tokenizer), **options)
    batch = session_batch(GOLDEN, learner)
    check_all_sessions(GOLDEN, GOLDEN, learner)
    check_start(GOLDEN, learner, batch)

    # Their mean goes over the columns of all sessions too, which are 0 and count log 2 each.
    target = torch.zeros(3, 4)
    for image, labels in enumerate(GOLDEN["target"]):
        target[image, labels] = 1
    own = learner.train().loss({**batch, "target": target})["binary_cross_entropy"].item()
    assert GOLDEN["all_columns"] == pytest.approx((4 * own + 3 * math.log(2)) / 7, rel=1e-4)
    check_trajectory(GOLDEN["trajectory"], learner, batch, lr=0.01, optimizer="adam", weight_decay=0.0)


@pytest.fixture
def first(backbone: Backbone) -> MultiLane:
    learner = create_learner("multi_lane", backbone, FIRST, selectors=3, prompts=2, depth=2)
    assert isinstance(learner, MultiLane)
    disturb(learner)
    return learner


def disturb(learner: MultiLane) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in learner.learned_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_a_session_starts_from_the_one_before_and_touches_none(first: MultiLane, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in first.trainable_state().items()}
    logits = first.eval()(images).detach()
    second = first.extend(SECOND)
    assert isinstance(second, MultiLane)
    assert second.classnames == SECOND
    assert second.sessions == (FIRST, SECOND)
    assert set(second.learned_parameters()) == {
        *(f"lanes.1.{name}" for name in ("selectors", "prompts")),
        *(f"heads.1.{name}" for name in ("log_scale", "bias")),
    }
    assert torch.equal(second.lane(1).prompts, first.lane(0).prompts)

    optimizer = torch.optim.Adam(second.learned_parameters().values(), lr=0.05)
    frozen = {name: tensor.clone() for name, tensor in second.backbone.state_dict().items()}
    batch = {"image": images, "label": torch.zeros(6, dtype=torch.long)}
    for _ in range(3):
        optimizer.zero_grad()
        sum(second.train().loss(batch).values()).backward()
        optimizer.step()

    assert not torch.equal(second.lane(1).prompts, first.lane(0).prompts)
    assert all(torch.equal(second.trainable_state()[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(second.backbone.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert all(p.grad is None for p in second.lanes[0].parameters())
    both = second.with_classes([*FIRST, *SECOND]).eval()
    rounding = 1e-6 * first.backbone.logit_scale
    torch.testing.assert_close(both(images)[:, :3].detach(), logits, rtol=0, atol=rounding)


def test_lanes_are_asked_by_class_in_any_order(first: MultiLane, images: Tensor) -> None:
    last = first.extend(SECOND).extend(THIRD)
    assert isinstance(last, MultiLane)
    disturb(last)
    everything = last.with_classes([*THIRD, *FIRST, *SECOND]).eval()(images)
    mixed = last.with_classes(["star", "dog", "tulip"]).eval()(images)
    torch.testing.assert_close(mixed, everything[:, [6, 2, 1]], rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="multi_lane has learned 'cat' in an earlier session"):
        last.extend(["cat", "mouse"])


@pytest.mark.parametrize("head", ["text", "linear"])
def test_one_artefact_holds_all_lanes(head: str, backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    learner = create_learner("multi_lane", backbone, FIRST, head=head, selectors=2, prompts=2)
    learner = learner.extend(SECOND).with_classes([*FIRST, *SECOND]).eval()
    save(learner, tmp_path / "prompt")
    again = load(tmp_path / "prompt", backbone).eval()
    assert torch.equal(again(images), learner(images))
    assert (
        again.extend(THIRD).learned_parameters().keys() == learner.extend(THIRD).learned_parameters().keys()
    )


def test_the_bias_starts_where_the_mean_logit_is_zero() -> None:
    data = load_dataset("scenes/several", "train").subset(range(32))
    tiny = create_backbone("tiny")
    learner = create_learner("multi_lane", tiny, data.classnames)
    fit(learner, data, **{**QUICK, "epochs": 0})
    pixels = torch.stack([tiny.preprocess(data[i][0]) for i in range(32)])
    assert isinstance(learner, MultiLane)
    assert abs(float(learner.heads[0].bias.detach())) > 1
    assert float(learner(pixels).detach().mean()) == pytest.approx(0, abs=1e-4)


def test_labels_of_other_sessions_leave_the_loss_alone(backbone: Backbone) -> None:
    """What a session's loss sees of an image depends on its own classes only."""
    whole = load_dataset("scenes/several", "train").subset(range(40))
    session = [3, 8, 11]

    def without_others(data: ImageDataset) -> ImageDataset:
        kept = [tuple(c for c in s.classes if c in session) or s.classes for s in data.samples]
        samples = [type(s)(s.source, labels) for s, labels in zip(data.samples, kept, strict=True)]
        return ImageDataset(
            data.name, data.split, tuple(samples), data.classnames, data.templates, data.reader
        )

    losses = []
    for data in (whole, without_others(whole)):
        part = data.keep_classes(session)
        learner = create_learner("multi_lane", backbone, part.classnames, selectors=2, prompts=2)
        losses.append(fit(learner, part, **QUICK).history[0]["loss"])
    assert losses[0] == losses[1]


def test_towers_that_have_no_lanes_say_why(make_backbone: Callable[..., Backbone]) -> None:
    pooled = make_backbone(
        vision={"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
    )
    with pytest.raises(BackboneError, match=r"lanes can't run beside .* pooled by attention"):
        create_learner("multi_lane", pooled, FIRST)
    convolutions = make_backbone(vision={"layers": [1, 1, 1, 1], "width": 8})
    with pytest.raises(
        BackboneError, match=r"lanes can't run beside .* not a sequence of tokens.*session_probe"
    ):
        create_learner("multi_lane", convolutions, FIRST)
