"""PromptKD: its loss written out, what it never reads, what its file can name, and a teacher on another backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.trajectories import check_trajectory, golden_images
from tests.golden.visual_learners import check_gradients
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load, load_dataset, save
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.classification.distil import without_labels
from vlprompt.core.errors import DataError
from vlprompt.data import ImageDataset, Sample
from vlprompt.learners import Learner

NAMES = ("dog", "red circle", "hummingbird")


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits", "train", shots=2, seed=1)


GOLDEN = read_golden("promptkd_small")


class GoldenTeacher(Learner):
    """A teacher that answers as the recipe's: 40 times cosines, of embeddings that batches bring."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone, GOLDEN["classnames"])

    def class_embeddings(self) -> Tensor:
        return filled("teacher weights", (6, 768), 1.0)


class Scaled(Backbone):
    """The recipe's student with the scale of its teacher's logits."""

    logit_scale = 40.0  # type: ignore[assignment]


def test_equals_the_authors_code(tokenizer: TextTokenizer) -> None:
    """Loss, gradients, twenty steps; the tower's text side plays no part."""
    backbone = small_clip(GOLDEN, tokenizer)
    teaching = small_clip(GOLDEN, tokenizer)
    teaching.__class__ = Scaled
    learner: Any = create_learner(
        "promptkd", backbone, GOLDEN["classnames"], visual_length=3, visual_depth=2, temperature=2.0
    )
    learner.learn_from(GoldenTeacher(teaching))
    state = {name: tensor.clone() for name, tensor in learner.trainable_state().items()}
    for name in learner.learned_parameters():
        mean = 1.0 if name == "projector.1.weight" else 0.0
        state[name] = filled(name, state[name].shape, 0.02 if name == "visual" else 0.04, mean)
    learner.load_trainable_state(state)

    close(filled("images", (4,), 1.0), GOLDEN["first_image_values"])
    teacher = filled("teacher images", (3, 768), 1.0)
    batch = {"image": golden_images(learner), "teacher": teacher, "label": torch.zeros(3, dtype=torch.long)}
    loss = learner.train().loss(batch)["distillation"]
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN["loss"], rel=1e-4)
    gradients = dict(GOLDEN["gradients"])
    before_norm = gradients.pop("projector.0.bias")  # batch norm takes it away: rounding alone is left
    assert before_norm["norm"] < 1e-3 * gradients["projector.0.weight"]["norm"]
    check_gradients(gradients, learner)

    learner.load_trainable_state(state)  # what batch norm measured begins anew, too
    check_trajectory(GOLDEN["trajectory"], learner, batch, lr=1e-6)


def taught(backbone: Backbone, teacher: Learner, **options: Any) -> Any:
    student = create_learner("promptkd", backbone, teacher.classnames, **options)
    student.learn_from(teacher)
    return student


def test_the_loss_written_out(backbone: Backbone, images: Tensor) -> None:
    """One image and one class at a time, at a temperature."""
    teacher = create_learner("coop", backbone, NAMES, context_length=4, seed=2).eval()
    student = taught(backbone, teacher, weight=7.0, temperature=2.0).train()
    embeddings = teacher.embed_images(images)
    loss = student.loss({"image": images, "teacher": embeddings})["distillation"]

    with torch.no_grad():
        targets = (teacher(images) / 2).softmax(-1)
        z = F.normalize(student.embed_images(images), dim=-1)
        logits = backbone.logit_scale * z @ teacher.class_weights().T
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        answers = (row / 2).softmax(-1)
        for p, q in zip(target.tolist(), answers.tolist(), strict=True):
            total += p * (torch.tensor(p).log() - torch.tensor(q).log()).item()
    assert loss.item() == pytest.approx(7 * 4 * total / (6 * 3), rel=1e-3)


def test_only_prompts_and_projection_learn(backbone: Backbone, images: Tensor) -> None:
    teacher = create_learner("coop", backbone, NAMES)
    student = taught(backbone, teacher).train()
    student.loss({"image": images, "teacher": teacher.embed_images(images)})["distillation"].backward()
    own = student.learned_parameters()
    assert {name.partition(".")[0] for name in own} == {"visual", "projector"}
    assert all(bool(p.grad.isfinite().all()) for p in own.values())
    assert all(p.grad is None for p in [*teacher.parameters(), *backbone.parameters()])


def test_no_label_is_read(backbone: Backbone, digits: ImageDataset) -> None:
    """Training on labels turned round, or on none, ends with the same bits."""
    turned = tuple(Sample(s.source, 9 - s.classes[0]) for s in digits.samples)
    states = []
    for data in (digits, dataclasses.replace(digits, samples=turned), without_labels(digits)):
        student = taught(backbone, create_learner("coop", backbone, digits.classnames))
        fit(student, data, epochs=2, lr=0.005, batch_size=8, callbacks=())
        states.append(student.trainable_state())
    for other in states[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in states[0].items())


def test_a_teacher_with_prompts_in_its_images_on_another_backbone(
    make_backbone: Callable[..., Backbone],
    backbone: Backbone,
    digits: ImageDataset,
    images: Tensor,
    tmp_path: Path,
) -> None:
    """What the student trains on is what the teacher says of the same pictures, as that prepares them."""
    other = make_backbone(seed=5, vision={"image_size": 32, "layers": 2, "width": 96})
    teacher = create_learner("maple", other, digits.classnames)
    student = taught(backbone, teacher)
    fit(student, without_labels(digits), epochs=3, lr=0.005, batch_size=8, callbacks=())
    save(student, tmp_path)
    loaded = load(tmp_path, backbone)
    with torch.no_grad():
        assert torch.equal(loaded(images), student(images))
        weights = teacher.eval().class_weights()
        torch.testing.assert_close(loaded.class_weights(), weights)


def test_every_view_needs_an_answer(backbone: Backbone, digits: ImageDataset) -> None:
    student = taught(backbone, create_learner("coop", backbone, digits.classnames))
    with pytest.raises(DataError, match="sees every view once: give fixed views"):
        fit(student, digits, epochs=1, lr=0.01, augmentation="crop_flip", views=0, callbacks=())


def test_which_classes_it_names(backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    teacher = create_learner("coop", backbone, NAMES)
    student = taught(backbone, teacher).eval()
    save(student, tmp_path)
    alone = load(tmp_path, backbone)
    with torch.no_grad():
        fewer = alone.with_classes(["Hummingbird", "dog"])
        torch.testing.assert_close(fewer(images), student(images)[:, [2, 0]])
        with pytest.raises(
            DataError, match=r"weights of 3 classes, and none of 'tulip'\. Its file holds no teacher"
        ):
            alone.with_classes(["tulip", "dog"])
        more = student.with_classes(["tulip", "dog"])
        torch.testing.assert_close(more(images)[:, 1], student(images)[:, 0])
        alone.learn_from(teacher)  # type: ignore[attr-defined]
        assert alone.with_classes(["tulip", "dog"])(images).shape == (6, 2)


def test_who_can_teach_and_who_can_learn(backbone: Backbone) -> None:
    student = create_learner("promptkd", backbone, NAMES)
    head = create_learner("coop", backbone, NAMES, plugins=["dept"])
    with pytest.raises(
        DataError, match="coop with dept can't teach promptkd: its logits are more than cosines"
    ):
        student.learn_from(head)
    with pytest.raises(DataError, match=r"coop learns from labels, not from a teacher\. Use promptkd"):
        create_learner("coop", backbone, NAMES).learn_from(student)


def test_without_a_teacher_it_learns_the_frozen_model(backbone: Backbone, images: Tensor) -> None:
    student = create_learner("promptkd", backbone, NAMES).train()
    given = student.loss({"image": images, "frozen": backbone.image_embeddings(images)})["distillation"]
    state = student.trainable_state()
    again = create_learner("promptkd", backbone, NAMES).train()
    torch.testing.assert_close(again.loss({"image": images})["distillation"], given)
    assert "teacher_weights" not in state
    assert student.with_classes(["tulip", "dog"]).eval()(images).shape == (6, 2)
