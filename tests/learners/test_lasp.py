"""LASP against the authors' code, its text loss written out, and which names it may know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import read_golden, small_clip, small_embeddings
from tests.golden.trajectories import check_start, check_trajectory
from tests.golden.visual_learners import put
from tests.golden.weights import filled
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.learners.lasp import LASP_TEXTS

GOLDEN = read_golden("lasp_small")
NAMES = ["dog", "red circle", "American staffordshire terrier", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.fixture
def batch(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    return {"embedding": backbone.image_embeddings(images), "label": torch.arange(6) % 4}


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(
    case: str, golden_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``extra`` is their base-to-new run: its text loss knows the new half's names, which ours must be told."""
    golden = GOLDEN["cases"][case]
    options: dict[str, Any] = {"texts": "templates", "noise_probability": 0.0}
    if case == "extra":
        options["extra_names"] = GOLDEN["extra_names"]
    if case == "noisy":
        options["noise_probability"] = 1.0
        monkeypatch.setattr(torch, "randn_like", lambda tensor: filled("noise", tensor.shape, 1.0))
    learner = create_learner("lasp", golden_backbone, GOLDEN["classnames"], GOLDEN["texts"], **options)
    put(case, {"offset": 0.1}, learner)

    batch = {"embedding": small_embeddings(GOLDEN, golden_backbone), "label": torch.tensor(GOLDEN["labels"])}
    losses = check_start(golden, learner, batch)
    assert losses["text_to_text"].item() == pytest.approx(golden["text"], rel=1e-4)
    check_trajectory(golden["trajectory"], learner, batch, lr=0.002)


def test_norms_of_the_image_tower_equal_the_authors_code(golden_backbone: Backbone) -> None:
    """At a tenth of the rate, without weight decay: theirs pulls the scale to zero, ours the shift."""
    golden = GOLDEN["norms"]
    options = {"texts": "templates", "noise_probability": 0.0, "image_norms": True}
    learner = create_learner("lasp", golden_backbone, GOLDEN["classnames"], GOLDEN["texts"], **options)
    put("norms", {"offset": 0.1}, learner)

    images = filled("images", (3, 3, *golden_backbone.image_size), 1.0)
    batch = {"image": images, "label": torch.tensor(GOLDEN["labels"])}
    check_start(golden, learner, batch)
    check_trajectory(golden["trajectory"], learner, batch, lr=0.002, weight_decay=0.0)


def test_norms_start_as_they_are_and_learn_slowly(backbone: Backbone, images: Tensor) -> None:
    plain = create_learner("lasp", backbone, NAMES).eval()
    learner = create_learner("lasp", backbone, NAMES, image_norms=True).eval()
    torch.testing.assert_close(learner(images), plain(images), rtol=0, atol=1e-4)
    assert plain.static_images
    assert not learner.static_images
    assert plain.parameter_groups() == []

    usual, slow = learner.parameter_groups()
    assert usual == {"names": ["context", "offset"]}
    assert slow["rate"] == 0.1
    assert sorted([*usual["names"], *slow["names"]]) == sorted(learner.learned_parameters())
    numbers = sum(learner.learned_parameters()[name].numel() for name in slow["names"])
    assert numbers == backbone.vision.layers * 4 * backbone.vision.width


def test_the_text_loss_of_one_sentence_is_cross_entropy_of_the_gram_matrix(
    backbone: Backbone, batch: dict[str, Tensor]
) -> None:
    template = "the origami {}."
    learner = create_learner("lasp", backbone, NAMES, [template], texts="templates", weight=3.0).eval()
    texts = backbone.encode_text([template.format(name) for name in NAMES])
    total = torch.zeros(())
    for number, text in enumerate(texts):
        scores = torch.stack([backbone.logit_scale * text @ weight for weight in learner.class_weights()])
        total = total - torch.log_softmax(scores, 0)[number]
    torch.testing.assert_close(learner.loss(batch)["text_to_text"], 3.0 * total / len(NAMES))


def test_without_weight_and_offset_it_is_coop(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    coop = create_learner("coop", backbone, NAMES, init="a photo of a").train()
    learner = create_learner("lasp", backbone, NAMES, weight=0.0).train()
    gradients = [torch.autograd.grad(sum(x.loss(batch).values()), x.context)[0] for x in (coop, learner)]
    torch.testing.assert_close(*gradients)


def test_the_offset_moves_all_classes_alike(backbone: Backbone) -> None:
    learner = create_learner("lasp", backbone, NAMES)
    before = learner.class_embeddings().detach()
    with torch.no_grad():
        learner.offset.copy_(filled("offset", learner.offset.shape, 0.1))
    moved = learner.class_embeddings().detach() - before
    torch.testing.assert_close(moved, learner.offset.detach().expand_as(moved), rtol=0, atol=1e-5)


def test_noise_enters_a_share_of_the_training_steps(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = create_learner("lasp", backbone, NAMES, ["a {}."], texts="templates", noise=0.2)
    quiet = learner.eval().loss(batch)["text_to_text"].item()
    assert learner.loss(batch)["text_to_text"].item() == quiet  # only training is noisy

    learner.train()
    torch.manual_seed(0)
    found = [learner.loss(batch)["text_to_text"].item() for _ in range(60)]
    noisy = [value for value in found if abs(value - quiet) > 1e-4 * quiet]
    assert 18 <= len(noisy) <= 42
    assert len(set(noisy)) == len(noisy)


def test_only_names_that_it_is_told_join_the_text_loss(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    plain = create_learner("lasp", backbone, NAMES).eval()
    assert plain.all_names == plain.classnames
    told = create_learner("lasp", backbone, NAMES, extra_names=["tulip", "red_circle", "tulip"]).eval()
    assert told.all_names == (*NAMES, "tulip")
    assert told.text_features().shape[:2] == (len(LASP_TEXTS), 5)
    torch.testing.assert_close(told.loss(batch)["cross_entropy"], plain.loss(batch)["cross_entropy"])
    assert told.loss(batch)["text_to_text"] > plain.loss(batch)["text_to_text"]
    assert told.with_classes(["tulip", "dog"]).all_names == ("tulip", "dog", "red circle")


def test_the_authors_sentences_are_35(backbone: Backbone) -> None:
    learner = create_learner("lasp", backbone, NAMES)
    assert len(LASP_TEXTS) == 35
    features = learner.text_features()
    expected = F.normalize(backbone.text.encode_strings([LASP_TEXTS[4].format(n) for n in NAMES]), dim=-1)
    torch.testing.assert_close(features[4], expected, rtol=0, atol=1e-5)
    assert not features.requires_grad
