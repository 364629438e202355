"""DePT against the authors' code, the learner inside at weight 0, and who is judged by the head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.trajectories import check_start, check_trajectory, golden_images
from tests.golden.weights import filled
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.learners import Learner

GOLDEN = read_golden("plugin_dept_small")
NAMES = ("dog", "red circle", "hummingbird")


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.fixture
def batch(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": torch.arange(6) % 3}


def golden_learner(backbone: Backbone) -> Learner:
    options = {"context_length": 4, "plugins": ["dept"]}
    learner = create_learner("coop", backbone, GOLDEN["classnames"], **options)
    state = learner.trainable_state()
    for name, std in GOLDEN["spread"].items():
        mean = 1.0 if name.endswith("scale.scale") else 0.0
        state[name] = filled(name, state[name].shape, std, mean)
    learner.load_trainable_state(state)
    return learner


def test_equals_the_authors_code(golden_backbone: Backbone) -> None:
    learner = golden_learner(golden_backbone)
    images = golden_images(learner)
    close(filled("images", (4,), 1.0), GOLDEN["first_image_values"])
    batch = {"embedding": golden_backbone.image_embeddings(images), "label": torch.tensor(GOLDEN["labels"])}

    check_start(GOLDEN, learner, batch)
    with torch.no_grad():
        new = learner.with_classes([*GOLDEN["classnames"], "tulip"]).eval()(images)[:, :6]
    torch.testing.assert_close(new, torch.tensor(GOLDEN["similarity"]), rtol=1e-4, atol=1e-3)
    check_trajectory(GOLDEN["trajectory"], learner, batch, lr=0.0035)


def test_weight_0_is_the_learner_inside(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    for name in ("coop", "promptsrc", "mmrl"):
        inside = create_learner(name, backbone, NAMES).train()
        around = create_learner(name, backbone, NAMES, plugins=[{"name": "dept", "weight": 0.0}]).train()
        expected = inside.loss(batch)
        losses = around.loss(batch)
        assert float(losses.pop("dept_cross_entropy").detach()) == 0
        assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}
        assert torch.equal(around.eval()(batch["image"]), inside.eval()(batch["image"]))


def test_losses_are_the_equation_written_out(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    """One row at a time: the raw vector of each label's class, then of each image, through scale, shift and head."""
    learner = create_learner("kgcoop", backbone, NAMES, plugins=[{"name": "dept", "weight": 0.6}]).train()
    inside = create_learner("kgcoop", backbone, NAMES)
    with torch.no_grad():
        for number, parameter in enumerate(learner.new_parameters().values()):  # type: ignore[attr-defined]
            parameter += 0.1 * torch.sin(torch.arange(parameter.numel()) + number).view_as(parameter)
    state = learner.trainable_state()
    texts = inside.class_embeddings().detach()
    features = backbone.image_embeddings(batch["image"])

    total = 0.0
    for side, vectors in (("text", texts[batch["label"]]), ("image", features)):
        for vector, label in zip(vectors, batch["label"], strict=True):
            scaled = state[f"{side}_scale.scale"] * vector + state[f"{side}_scale.bias"]
            scores = state["head.weight"] @ scaled + state["head.bias"]
            total += float(-scores.log_softmax(0)[label]) / 12

    losses = learner.loss({"embedding": features, "label": batch["label"]})
    plain = inside.loss({"embedding": features, "label": batch["label"]})
    assert losses["dept_cross_entropy"].item() == pytest.approx(0.6 * total, rel=1e-5)
    assert losses["cross_entropy"].item() == pytest.approx(0.4 * plain["cross_entropy"].item(), rel=1e-5)
    assert losses["knowledge"].item() == pytest.approx(plain["knowledge"].item(), rel=1e-5)


def test_the_head_judges_where_it_knows_all_classes(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("coop", backbone, NAMES, plugins=["dept"]).eval()
    with torch.no_grad():
        fewer = learner.with_classes(["Red Circle", "dog"])
        torch.testing.assert_close(fewer(images), learner(images)[:, [1, 0]], rtol=0, atol=1e-4)
        mixed = learner.with_classes(["dog", "tulip"])
        similarity = learner.inner(images)[:, :1]  # type: ignore[operator]
        torch.testing.assert_close(mixed(images)[:, :1], similarity, rtol=0, atol=1e-4)
    assert mixed.options["plugins"][0]["head_classes"] == list(NAMES)


def test_scales_start_as_the_identity(backbone: Backbone) -> None:
    learner = create_learner("coop", backbone, NAMES, plugins=["dept"])
    vectors = torch.randn(3, backbone.dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(learner.image_scale(vectors), vectors)  # type: ignore[operator]
    assert torch.equal(learner.text_scale(vectors), vectors)  # type: ignore[operator]
    assert F.mse_loss(learner.head.weight, torch.zeros_like(learner.head.weight)) > 0  # type: ignore[union-attr]
