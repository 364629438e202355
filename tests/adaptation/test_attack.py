"""Attacks stay in their ball, raise the loss, depend on nothing but image, classifier and seed, and are made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from tests.adaptation.test_experiment import experiment, run
from vlprompt import create_adapter, create_backbone, create_learner, load_dataset
from vlprompt.adaptation.attack import PGD, AttackedData, attack_dataset, static_classifier
from vlprompt.adaptation.stream import adapt_dataset
from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data import ImageDataset
from vlprompt.learners import Learner

KEYS = ["a", "b", "c", "d", "e"]
LABELS = torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("scenes/shape@inverted", "val").subset(range(0, 160, 8))


@pytest.fixture(scope="module")
def learner(tiny: Backbone, data: ImageDataset) -> Learner:
    return create_learner("zero_shot", tiny, data.classnames, data.templates).eval()


@pytest.fixture(scope="module")
def attacked(data: ImageDataset, learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> AttackedData:
    return attack_dataset(data, learner, PGD(8 / 255, 7), tmp_path_factory.mktemp("attacked"))


def images(size: tuple[int, int] = (6, 5)) -> Tensor:
    """Bytes, the darkest and the brightest among them."""
    values = torch.randint(0, 256, (5, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    values[0, 0], values[1, 1] = 0, 255
    return values / 255


def linear(pixels: Tensor) -> Tensor:
    weights = torch.randn(
        pixels[0].numel(), 3, generator=torch.Generator().manual_seed(1), dtype=pixels.dtype
    )
    return pixels.flatten(1) @ weights / 10


@pytest.mark.parametrize("eps", [1 / 255, 4 / 255, 0.1])
@pytest.mark.parametrize("steps", [0, 7])
def test_no_pixel_leaves_the_ball(eps: float, steps: int) -> None:
    clean = images()
    floats = PGD(eps, steps, pixels="floats").perturb(linear, clean, LABELS, KEYS)
    assert float((floats.double() - clean.double()).abs().max()) <= eps  # exactly, in float64
    assert 0 <= float(floats.min()) <= float(floats.max()) <= 1

    rounded = PGD(eps, steps).perturb(linear, clean, LABELS, KEYS)
    before, after = (255 * clean).round().long(), (255 * rounded).round().long()
    assert torch.equal(after.float() / 255, rounded)
    assert int((after - before).abs().max()) == int(255 * eps + 1e-9)
    if steps:  # bytes that are cut off would never rise inside the ball
        assert bool((after > before).any())
        assert bool((after < before).any())


@pytest.mark.parametrize("pixels", ["bytes", "floats"])
def test_a_ball_without_room_is_the_image(pixels: Any) -> None:
    assert torch.equal(PGD(0.0, pixels=pixels).perturb(linear, images(), LABELS, KEYS), images())


def test_against_a_linear_classifier_it_finds_the_corner_of_the_ball() -> None:
    direction = torch.randn(3 * 6 * 5, generator=torch.Generator().manual_seed(2))

    def two_classes(pixels: Tensor) -> Tensor:
        score = pixels.flatten(1) @ direction
        return torch.stack([score, -score], 1)

    eps = 4 / 255
    labels = torch.tensor([0, 1, 0, 1, 0])
    # Eight steps of a quarter cross the ball from any start.
    got = PGD(eps, 8, pixels="floats").perturb(two_classes, images(), labels, KEYS)
    away = direction.sign().view(3, 6, 5) * torch.where(labels == 0, -1.0, 1.0)[:, None, None, None]
    torch.testing.assert_close(got, (images() + eps * away).clamp(0, 1), rtol=0, atol=1e-7)


def test_it_depends_on_image_key_and_seed_alone() -> None:
    attack = PGD(4 / 255, 2, pixels="floats")
    together = attack.perturb(linear, images(), LABELS, KEYS)
    for row, key in enumerate(KEYS):
        alone = attack.perturb(linear, images()[row, None], LABELS[row, None], [key])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-7)
    assert torch.equal(attack.perturb(linear, images(), LABELS, KEYS), together)
    for other in (
        PGD(4 / 255, 2, 1, "floats").perturb(linear, images(), LABELS, KEYS),
        attack.perturb(linear, images(), LABELS, KEYS[::-1]),
    ):
        assert not torch.equal(other, together)


def test_its_gradient_is_that_of_the_classifier(data: ImageDataset, learner: Learner, tmp_path: Path) -> None:
    clean = attack_dataset(data.subset([0]), learner, PGD(0.0, 0), tmp_path).clean
    image = learner.backbone.preprocess(clean[0][0])
    classify = static_classifier(learner)
    pixels = tvf.pil_to_tensor(clean[0][0])[None] / 255
    torch.testing.assert_close(classify(pixels), learner(image[None]), rtol=1e-4, atol=1e-4)

    label = torch.tensor([clean[0][1]])
    leaf = pixels.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(classify(leaf), label), leaf)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (F.cross_entropy(classify(pixels + sign * step), label) for sign in (1, -1))
    assert float((up - down) / 2e-3) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_loss_rises_and_accuracy_falls(attacked: AttackedData, learner: Learner) -> None:
    losses, right = [], []
    for part in (attacked.clean, attacked.attacked):
        pixels = torch.stack([learner.backbone.preprocess(image) for image, _ in part])
        with torch.no_grad():
            logits = learner(pixels)
        labels = torch.tensor(part.labels)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        right.append(float((logits.argmax(1) == labels).float().mean()))
    assert bool((losses[1] > losses[0]).all())
    assert right[0] > 0.7
    assert right[1] < 0.2


def test_attacks_of_other_images_labels_classifiers_and_numbers_are_kept_apart_and_none_is_made_twice(
    data: ImageDataset, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    vision = learner.backbone.vision
    encode = vision.encode
    monkeypatch.setattr(vision, "encode", lambda images, *rest: calls.append(1) or encode(images, *rest))

    def passes(part: ImageDataset, who: Learner, attack: PGD) -> int:
        calls.clear()
        attack_dataset(part, who, attack, tmp_path)
        return len(calls)

    few, attack = data.subset(range(3)), PGD(4 / 255, 2)
    assert passes(few, learner, attack) == 6
    assert passes(few, learner, attack) == 0
    assert passes(data.subset([2, 1, 0, 3]), learner, attack) == 2
    other = create_learner("zero_shot", learner.backbone, data.classnames, ["one {}."])
    assert passes(few, other, attack) == 6
    for changed in (PGD(3 / 255, 2), PGD(4 / 255, 1), PGD(4 / 255, 2, 1), PGD(4 / 255, 2, 0, "floats")):
        assert passes(few, learner, changed) > 0


def test_floats_arrive_as_they_are(data: ImageDataset, learner: Learner, tmp_path: Path) -> None:
    few = data.subset(range(2))
    pair = attack_dataset(few, learner, PGD(4 / 255, 3, pixels="floats"), tmp_path)
    exact = pair.attacked.reader.exact(pair.attacked.samples[1].source)
    assert exact is not None
    assert pair.clean.reader.exact(pair.clean.samples[1].source) is None

    adapter = create_adapter("zero", learner, views=1)
    got = adapt_dataset({"zero": adapter}, pair.attacked)["zero"].before[1]
    with torch.no_grad():
        expected = static_classifier(learner)(exact[None])[0].softmax(-1)
        rounded = learner(learner.backbone.preprocess(pair.attacked[1][0])[None])[0].softmax(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(got, rounded, rtol=1e-4, atol=1e-6)


def test_given_class_weights_are_attacked(data: ImageDataset, learner: Learner, tmp_path: Path) -> None:
    few = data.subset(range(2))
    head = create_learner("clip_adapter", learner.backbone, data.classnames)
    with pytest.raises(DataError, match="clip_adapter classifies by more than class weights"):
        attack_dataset(few, head, PGD(), tmp_path)
    flipped = -learner.class_weights()
    one = attack_dataset(few, head, PGD(steps=1), tmp_path, weights=flipped).attacked
    two = attack_dataset(few, learner, PGD(steps=1), tmp_path).attacked
    assert one[0][0].tobytes() != two[0][0].tobytes()
    with pytest.raises(DataError, match="other class names"):
        attack_dataset(few, create_learner("zero_shot", learner.backbone, ["a", "b"]), PGD(), tmp_path)


def test_four_is_no_share_of_a_pixel() -> None:
    with pytest.raises(ConfigError, match="papers' 4 of 255 is 4/255"):
        PGD(4)


def test_r_tpt_withstands_what_breaks_zero_shot(
    data: ImageDataset, learner: Learner, attacked: AttackedData
) -> None:
    adapter = create_adapter(
        "rtpt", learner.backbone, data.classnames, views=24, augment="augmix:0.8", share=0.5, lr=0.05
    )
    got = adapt_dataset({"rtpt": adapter}, attacked.attacked)["rtpt"]
    labels = torch.tensor(data.labels)
    robust = float((got.classes == labels).float().mean())
    zero_shot = float((got.before.argmax(1) == labels).float().mean())
    assert robust > zero_shot + 0.2


def test_a_run_measures_robust_accuracy_beside_clean_accuracy(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "backbone": {"name": "tiny"},
        "attack": {"eps": "8/255", "steps": 4, "store": str(tmp_path / "store")},
        "methods": {"zero": {"views": 3}, "bca": {"views": 1}},
        "data": {"name": "scenes/shape@inverted", "split": "val", "test_images": 8},
        "protocol": {"seeds": [1, 2], "orders": 2},
    }
    outcome = run(tmp_path, **sections)
    metrics = outcome.metrics
    key = "zero/scenes/shape@inverted"
    assert metrics[f"{key}/before_robust_accuracy"] < metrics[f"{key}/before_accuracy"]
    assert f"{key}/robust_accuracy_gain" in metrics
    assert "Under attack (PGD, eps 8/255, 4 steps, non-adaptive)" in outcome.text
    assert metrics["attack"]["steps"] == 4

    records = json.loads(next(outcome.folder.glob("cells/*/records.json")).read_text())
    assert records[0]["stream"]["attack"]["steps"] == 4
    assert 0 <= records[0]["metrics"]["robust_accuracy"] <= 1
    files = sorted((tmp_path / "store").rglob("*.safetensors"))
    assert len(files) >= 8

    # Another run takes the attacked images of the store.
    stamps = [path.stat().st_mtime_ns for path in files]
    run(tmp_path, "name=again", **{**sections, "methods": {"zero": {"views": 2}}})
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "store").rglob("*.safetensors"))] == stamps


def test_impossible_attacks_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"attack\.eps.*'four/255' is no fraction"):
        experiment(tmp_path, attack={"eps": "four/255"})
    with pytest.raises(ConfigError, match=r"attack\.eps"):
        experiment(tmp_path, attack={"eps": 4})
    views = {"difftpt": {"generated": 2}}
    with pytest.raises(ConfigError, match="store of generated views holds none of attacked images"):
        experiment(
            tmp_path,
            attack={},
            methods=views,
            diffusion={"generator": "tiny-diffusion", "store": str(tmp_path / "views")},
        )
