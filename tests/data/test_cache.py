from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from vlprompt.backbones import create_backbone
from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.data import Augmentation, FeatureCache, FileReader, ImageDataset, Sample, load_dataset

PREPROCESS = v2.Compose([v2.Resize((8, 8)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
WEIGHT = torch.randn(3 * 8 * 8, 5, generator=torch.Generator().manual_seed(0))


class Tower:
    """A linear image tower that counts the different images that it is shown; batches are filled up by repetition."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images.unique(dim=0)))
        return images.flatten(1) @ WEIGHT

    @property
    def seen(self) -> int:
        return sum(self.batches)


@pytest.fixture
def image_data(tmp_path: Path) -> ImageDataset:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(23):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    samples = tuple(Sample(f"{i:02d}.png", i % 2) for i in range(23))
    return ImageDataset("toy", "train", samples, ("a", "b"), ("{}",), FileReader(folder))


def direct(dataset: ImageDataset, size: int = 4) -> torch.Tensor:
    images = [PREPROCESS(image) for image, _ in dataset]
    filled = [*images, *images[: -len(images) % size]]
    rows = [Tower()(torch.stack(filled[i : i + size])) for i in range(0, len(filled), size)]
    return torch.cat(rows)[: len(images)]


def run(
    cache: FeatureCache, dataset: ImageDataset, tower: Tower | None = None, **options: object
) -> torch.Tensor:
    given = {"fingerprint": "tower-1", "batch_size": 4, "progress": False, **options}
    return cache.features(dataset, tower or Tower(), PREPROCESS, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("rows_per_shard", [3, 4096])
def test_equal_to_direct_encoding_and_encoded_once(
    tmp_path: Path, image_data: ImageDataset, on_disk: bool, rows_per_shard: int
) -> None:
    cache = FeatureCache(tmp_path / "cache" if on_disk else None, rows_per_shard)
    tower = Tower()
    assert torch.equal(run(cache, image_data, tower), direct(image_data))
    assert tower.batches == [4, 4, 4, 4, 4, 3]
    again = FeatureCache(cache.root, rows_per_shard) if on_disk else cache
    assert torch.equal(run(again, image_data, tower), direct(image_data))
    assert tower.seen == 23


def test_only_misses_are_encoded_in_any_order(tmp_path: Path, image_data: ImageDataset) -> None:
    cache = FeatureCache(tmp_path / "cache")
    run(cache, image_data.subset(range(10)))
    tower = Tower()
    shuffled = image_data.subset(reversed(range(23)))
    assert torch.allclose(run(cache, shuffled, tower), direct(image_data).flip(0))
    assert tower.seen == 13


@pytest.mark.parametrize("name", ["tiny", "photo-vit"])
def test_a_row_has_the_same_bits_whatever_is_stored_already(tmp_path: Path, name: str) -> None:
    backbone = create_backbone(name)
    data = load_dataset("digits", "train").subset(range(23))
    options = {"fingerprint": name, "progress": False}
    encode, preprocess = backbone.encode_image, backbone.preprocess
    whole = FeatureCache().features(data, encode, preprocess, **options)  # type: ignore[arg-type]

    cache = FeatureCache(tmp_path)
    for rows in ([3], [5, 6], [9, 3, 11, 10, 20], range(23)):
        found = cache.features(data.subset(rows), encode, preprocess, **options)  # type: ignore[arg-type]
        assert torch.equal(found, whole[list(rows)])


def test_equal_images_are_encoded_once(image_data: ImageDataset) -> None:
    tower = Tower()
    features = run(FeatureCache(), image_data.subset([0, 1, 0, 0, 1, 2, 0]), tower)
    assert tower.seen == 3
    assert torch.equal(features[0], features[6])


def test_another_fingerprint_never_hits(tmp_path: Path, image_data: ImageDataset) -> None:
    cache = FeatureCache(tmp_path / "cache")
    run(cache, image_data)
    tower = Tower()
    run(cache, image_data, tower, fingerprint="tower-2")
    assert tower.seen == 23
    run(FeatureCache(tmp_path / "cache"), image_data, tower)
    assert tower.seen == 23


def test_a_shard_in_the_wrong_place_is_not_believed(tmp_path: Path, image_data: ImageDataset) -> None:
    run(FeatureCache(tmp_path / "cache"), image_data)
    (mine,) = (tmp_path / "cache").iterdir()
    run(FeatureCache(tmp_path / "cache"), image_data.subset([0]), fingerprint="tower-2")
    (other,) = (p for p in (tmp_path / "cache").iterdir() if p != mine)
    for shard in mine.iterdir():
        shard.rename(other / shard.name)
    tower = Tower()
    run(FeatureCache(tmp_path / "cache"), image_data, tower, fingerprint="tower-2")
    assert tower.seen == 22


def test_changed_bytes_and_types_miss(tmp_path: Path, image_data: ImageDataset) -> None:
    cache = FeatureCache(tmp_path / "cache")
    before = run(cache, image_data)
    Image.new("RGB", (30, 30), "green").save(image_data.reader.path("05.png"))  # type: ignore[attr-defined]
    tower = Tower()
    after = run(cache, image_data, tower)
    assert tower.seen == 1
    assert [i for i in range(23) if not torch.equal(before[i], after[i])] == [5]
    half = run(cache, image_data, tower, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert tower.seen == 24


def test_every_view_has_its_own_rows(tmp_path: Path, image_data: ImageDataset) -> None:
    cache, tower = FeatureCache(tmp_path / "cache"), Tower()
    crop = Augmentation("crop_flip", scale=(0.2, 0.9))
    asked = [{"seed": s, "view": v, "augmentation": crop} for s, v in ((1, 0), (1, 1), (2, 0))]
    views = [run(cache, image_data, tower, **options) for options in asked]
    assert tower.seen == 69
    assert not torch.equal(views[0], views[1])
    for options, view in zip(asked, views, strict=True):
        assert torch.equal(run(FeatureCache(tmp_path / "cache"), image_data, tower, **options), view)
    assert tower.seen == 69
    key = image_data.key(3)
    expected = crop.augment(image_data[3][0], PREPROCESS, 1, key, 1).flatten() @ WEIGHT
    assert torch.allclose(views[1][3], expected, atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_shard_is_named_and_recomputed(tmp_path: Path, image_data: ImageDataset, damage: str) -> None:
    expected = run(FeatureCache(tmp_path / "cache"), image_data)
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-7] ^= 255
    shard.write_bytes({"cut": content[:-40], "flip": content, "empty": b""}[damage])
    tower = Tower()
    with pytest.warns(UserWarning, match=f"{shard.name} is damaged"):
        assert torch.equal(run(FeatureCache(tmp_path / "cache"), image_data, tower), expected)
    assert tower.seen == 23
    run(FeatureCache(tmp_path / "cache"), image_data, tower)
    assert tower.seen == 23


WRITER = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_cache import PREPROCESS, Tower, direct
from vlprompt.data import FeatureCache, load_dataset
data = load_dataset("digits", "train")
while True:
    cache = FeatureCache({root!r}, rows_per_shard=8)
    cache.features(data, Tower(), PREPROCESS, fingerprint=str(torch.randint(0, 5, ()).item()), batch_size=8,
                   progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.filterwarnings("error")
def test_kill_while_writing_leaves_whole_shards(tmp_path: Path) -> None:
    script = textwrap.dedent(WRITER.format(tests=str(Path(__file__).parent), root=str(tmp_path)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        for _ in range(40):
            process.stdout.readline()
        time.sleep(0.013)
        process.send_signal(signal.SIGKILL)
    data = load_dataset("digits", "train")
    assert list(tmp_path.rglob("*.safetensors"))
    for fingerprint in range(5):  # a damaged shard would warn, which is an error here
        tower = Tower()
        found = FeatureCache(tmp_path).features(
            data, tower, PREPROCESS, fingerprint=str(fingerprint), batch_size=8, progress=False
        )
        assert torch.equal(found, direct(data, 8))
        assert set(tower.batches[:-1]) <= {8}  # a resumed run makes the batches of an uninterrupted one


def test_full_disk_costs_a_warning(tmp_path: Path, image_data: ImageDataset) -> None:
    (tmp_path / "cache").write_text("a file is where the folder should be")
    with pytest.warns(UserWarning, match="could not be stored"):
        assert torch.equal(run(FeatureCache(tmp_path / "cache"), image_data), direct(image_data))


def test_what_was_encoded_before_an_error_is_kept(tmp_path: Path, image_data: ImageDataset) -> None:
    broken = image_data.reader.path("17.png")  # type: ignore[attr-defined]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    with pytest.raises(DataError, match=r"17\.png"):
        run(FeatureCache(tmp_path / "cache"), image_data)
    broken.write_bytes(whole)
    tower = Tower()
    assert torch.equal(run(FeatureCache(tmp_path / "cache"), image_data, tower), direct(image_data))
    assert tower.batches == [4, 3]


def test_features_that_are_not_finite_are_refused(image_data: ImageDataset) -> None:
    def spoiled(images: torch.Tensor) -> torch.Tensor:
        features = Tower()(images)
        features[2, 1] = float("nan")
        return features

    with pytest.raises(NonFiniteError, match=r"02\.png"):
        FeatureCache().features(
            image_data, spoiled, PREPROCESS, fingerprint="x", batch_size=4, progress=False
        )


def test_wrong_shapes_are_refused(image_data: ImageDataset) -> None:
    cache = FeatureCache()
    with pytest.raises(DataError, match=r"must turn 23 images into \(23, d\)"):
        cache.features(image_data, lambda x: x, PREPROCESS, fingerprint="x", progress=False)
    run(cache, image_data)
    with pytest.raises(DataError, match="a fingerprint must change"):
        cache.features(
            image_data, lambda x: x.flatten(1), PREPROCESS, fingerprint="tower-1", progress=False,
            augmentation=Augmentation("flip"),
        )  # fmt: skip


def test_progress_counts_known_images(image_data: ImageDataset) -> None:
    cache, calls = FeatureCache(), []
    run(cache, image_data.subset(range(8)))
    run(cache, image_data, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(12, 23), (16, 23), (20, 23), (23, 23)]
