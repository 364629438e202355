from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt import create_backbone, load, save
from vlprompt.backbones import Backbone
from vlprompt.backbones.image_only import image_backbone, without_text
from vlprompt.core.errors import BackboneError, CheckpointError, DataError
from vlprompt.learners import create_learner
from vlprompt.learners.cones import concept_classifier

NAMES = ("dog", "red circle", "hummingbird", "boeing 737-800")
TEMPLATES = ("a photo of a {}.", "a drawing of a {}.", "one {}.")
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def cones(backbone: Backbone, **options: Any) -> Any:
    return create_learner("cones", backbone, NAMES, TEMPLATES, **options)


def moved(learner: Any, scale: float = 0.3) -> Any:
    with torch.no_grad():
        learner.vectors()  # the start comes when it is first needed
        offset = learner.concepts.offset
        offset += scale * torch.randn(offset.shape, generator=torch.Generator().manual_seed(2))
    return learner.eval()


def test_starts_as_zero_shot_to_the_bit(backbone: Backbone, images: Tensor) -> None:
    expected = create_learner("zero_shot", backbone, NAMES, TEMPLATES)(images)
    for options in ({}, {"share": "global"}):
        assert torch.equal(cones(backbone, **options)(images), expected)
    several = cones(backbone, length=4, jitter=0)
    torch.testing.assert_close(several(images), expected, rtol=0, atol=1e-5)
    pooled = cones(backbone, length=4, jitter=0, pool="logsumexp")
    torch.testing.assert_close(pooled(images), expected, rtol=0, atol=1e-4)
    before = cones(backbone, space="text")
    torch.testing.assert_close(before(images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "logsumexp"])
def test_pools_sub_concepts_as_written_down(pool: str, backbone: Backbone, images: Tensor) -> None:
    learner = moved(cones(backbone, length=3, pool=pool))
    vectors = learner.concepts.start + learner.concepts.offset
    features = F.normalize(backbone.image_embeddings(images), dim=-1)
    for b, feature in enumerate(features):
        for c in range(len(NAMES)):
            each = [
                backbone.logit_scale * float(feature @ F.normalize(v, dim=0).detach()) for v in vectors[c]
            ]
            scores = torch.tensor(each, dtype=torch.float64)
            expected = scores.mean() if pool == "mean" else scores.exp().mean().log()
            assert float(learner(images)[b, c].detach()) == pytest.approx(float(expected), abs=1e-3)


def test_in_front_of_the_projection(backbone: Backbone, images: Tensor) -> None:
    learner = moved(cones(backbone, space="text"))
    rows = learner.concepts.start + learner.concepts.offset
    assert rows.shape == (4, 1, backbone.text.width)
    weights = F.normalize(rows[:, 0] @ backbone.text.projection, dim=-1)
    expected = backbone.logit_scale * backbone.encode_image(images) @ weights.T
    torch.testing.assert_close(learner(images), expected, rtol=0, atol=1e-4)


def test_starts_from_training_images(backbone: Backbone, images: Tensor) -> None:
    embeddings = backbone.image_embeddings(images)
    for space in ("joint", "text"):
        learner = cones(backbone, init="visual", space=space)
        with pytest.raises(DataError, match="starts from training images"):
            learner(images)
        learner.prepare(embeddings[None], LABELS)
        first = F.normalize(F.normalize(embeddings[[0, 4]], dim=-1).mean(0), dim=0)
        torch.testing.assert_close(learner.class_weights()[0], first, rtol=0, atol=1e-4)
    with pytest.raises(DataError, match="'boeing 737-800' has none"):
        learner.prepare(embeddings[None, :3], LABELS[:3])


def test_noise_has_the_spread_of_text_features(backbone: Backbone) -> None:
    learner = cones(backbone, init="normal", length=8)
    learner.vectors()
    text = torch.stack([backbone.encode_text([t.format(c) for t in TEMPLATES]).mean(0) for c in NAMES])
    assert float(learner.concepts.start.std()) == pytest.approx(float(text.std()), rel=0.1)
    other = cones(backbone, init="normal", length=8, seed=2)
    assert not torch.equal(other.vectors(), learner.vectors())


def test_the_text_tower_can_go_after_the_start(make_backbone: Any, images: Tensor) -> None:
    backbone = copy.deepcopy(make_backbone())
    learner = moved(cones(backbone, space="text", length=2, pool="logsumexp"))
    expected = learner(images)
    for part in ("transformer", "token_embedding", "ln_final", "text_projection"):
        delattr(backbone.model, part)
    del backbone.text
    assert torch.equal(learner(images), expected)
    learner.train()
    learner.loss({"image": images, "label": LABELS})["cross_entropy"].backward()
    grads = {n for n, p in learner.named_parameters() if p.grad is not None}
    assert grads == {"concepts.offset"}


def test_saved_vectors_need_no_text_tower(
    make_backbone: Any, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone()
    learner = moved(cones(backbone, space="text", length=2))
    path = learner.to_concepts().save(tmp_path / "concepts.safetensors")
    assert path.stat().st_size < 4096
    images_only = without_text(make_backbone())
    assert not [n for n, _ in images_only.named_parameters() if "token" in n or n.startswith("model.transf")]
    again = concept_classifier(path, images_only)
    torch.testing.assert_close(again(images), learner(images), rtol=0, atol=1e-4)
    assert again.classnames == learner.classnames
    with pytest.raises(BackboneError, match="text tower was left out"):
        images_only.encode_text(["a dog"])
    with pytest.raises(CheckpointError, match="weights: saved"):
        concept_classifier(path, without_text(make_backbone(seed=3)))
    # the ordinary artefact does not ask the text tower either
    save(learner, tmp_path / "prompt")
    monkeypatch.setattr(type(backbone.text), "encode_strings", lambda *_: pytest.fail("text tower was asked"))
    assert torch.equal(load(tmp_path / "prompt", backbone)(images), learner(images))


def test_vectors_learned_in_half_precision_fit_the_same_image_tower_in_float32(
    make_backbone: Any, images: Tensor, tmp_path: Path
) -> None:
    half = make_backbone().set_precision("bf16")
    learner = moved(cones(half))
    learner.to_concepts().save(tmp_path / "vectors.safetensors")

    again = concept_classifier(tmp_path / "vectors.safetensors", without_text(make_backbone()))
    assert without_text(half).fingerprint == without_text(make_backbone()).fingerprint
    torch.testing.assert_close(
        again(images), learner(images), rtol=0, atol=2.0
    )  # logits are cosines times 100
    with pytest.raises(CheckpointError, match="weights: saved"):
        concept_classifier(tmp_path / "vectors.safetensors", make_backbone(seed=3).set_precision("bf16"))


def test_the_image_side_of_tiny_is_read_alone() -> None:
    alone = image_backbone("tiny")
    assert sum(p.numel() for p in alone.parameters()) < 2_000_000
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = create_backbone("tiny")
    assert torch.equal(alone.encode_image(pixels), whole.encode_image(pixels))
    assert alone.fingerprint == without_text(whole).fingerprint


def test_other_classes_only_with_a_shared_offset(backbone: Backbone, images: Tensor) -> None:
    learner = moved(cones(backbone, share="global"))
    other = learner.with_classes(["tulip", "dog"])
    assert torch.equal(other.concepts.offset, learner.concepts.offset)
    torch.testing.assert_close(other(images)[:, 1], learner(images)[:, 0], rtol=0, atol=1e-5)
    for options in ({}, {"share": "global", "init": "normal"}):
        with pytest.raises(DataError, match="cones learned one set of parameters per class"):
            cones(backbone, **options).with_classes(["tulip", "dog"])
