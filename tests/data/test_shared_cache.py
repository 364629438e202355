"""One folder of features, several processes: every row is computed once, by whoever comes first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_cache import PREPROCESS, WEIGHT, direct
from vlprompt.core.claims import Claims
from vlprompt.data import FeatureCache, FileReader, ImageDataset, Sample

CONTEXT = multiprocessing.get_context("fork")
PARTS = {
    "whole": range(23),
    "front": range(12),
    "middle": range(5, 20),
}  # data sets that have images in common


@pytest.fixture(scope="module")
def image_data(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(23):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    samples = tuple(Sample(f"{i:02d}.png", i % 2) for i in range(23))
    return ImageDataset("toy", "train", samples, ("a", "b"), ("{}",), FileReader(folder))


class Diary:
    """A tower that writes down, in a file that processes share, the first pixel of every image it is shown."""

    def __init__(self, path: Path, seconds: float = 0.01) -> None:
        self.path = path
        self.seconds = seconds

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        lines = "".join(f"{image.double().sum().item()!r}\n" for image in images.unique(dim=0))
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
            file.write(lines)
        time.sleep(self.seconds)
        return images.flatten(1) @ WEIGHT


def features(root: Path, dataset: ImageDataset, tower: Any) -> torch.Tensor:
    options = {"fingerprint": "tower-1", "batch_size": 4, "progress": False, "workers": 0}
    return FeatureCache(root, 4).features(dataset, tower, PREPROCESS, **options)


def _compute(root: Path, dataset: ImageDataset, diary: Path, out: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    torch.save(features(root, dataset, Diary(diary, seconds)), out)


def start(root: Path, dataset: ImageDataset, diary: Path, out: Path, seconds: float = 0.01) -> Any:
    process = CONTEXT.Process(target=_compute, args=(root, dataset, diary, out, seconds))
    process.start()
    return process


def test_processes_that_want_rows_in_common_compute_each_once(
    tmp_path: Path, image_data: ImageDataset
) -> None:
    diary = tmp_path / "diary"
    parts = {f"{name}{copy}": image_data.subset(rows) for name, rows in PARTS.items() for copy in range(2)}
    running = [start(tmp_path / "cache", part, diary, tmp_path / name) for name, part in parts.items()]
    for process in running:
        process.join(120)
        assert process.exitcode == 0

    seen = diary.read_text().splitlines()
    assert len(seen) == len(set(seen)) == 23
    for name, part in parts.items():
        made = torch.load(tmp_path / name, weights_only=True)
        torch.testing.assert_close(made, direct(part))
    assert not list((tmp_path / "cache").rglob("*.claim"))


def test_what_a_killed_process_had_claimed_is_computed_by_another(
    tmp_path: Path, image_data: ImageDataset
) -> None:
    diary, cache = tmp_path / "diary", tmp_path / "cache"
    victim = start(
        cache, image_data, diary, tmp_path / "never", seconds=5.0
    )  # it is killed within the first image
    deadline = time.monotonic() + 60
    while not diary.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert list(cache.rglob(".*.claim"))

    assert torch.equal(features(cache, image_data, Diary(diary)), direct(image_data))
    assert not list(cache.rglob(".*.claim"))
    assert not (tmp_path / "never").exists()


def test_rows_that_a_living_process_is_encoding_are_waited_for(
    tmp_path: Path, image_data: ImageDataset
) -> None:
    """The first of two keeps the folder's claim while it encodes; the second then finds the rows."""
    diary, cache = tmp_path / "diary", tmp_path / "cache"
    small = image_data.subset(range(4))
    first = start(cache, small, diary, tmp_path / "first", seconds=0.5)
    folder = None
    deadline = time.monotonic() + 60
    while folder is None and time.monotonic() < deadline:
        folder = next((path.parent for path in cache.rglob(".*.claim")), None)
    assert folder is not None
    assert Claims(folder).take(["somebody else's rows"]) is not None

    assert torch.equal(features(cache, small, Diary(diary)), direct(small))
    first.join(60)
    assert len(diary.read_text().splitlines()) == 4
