"""Exact feature cache: a frozen tower never sees the same view of the same image twice.

A row is keyed by what it depends on: the image's bytes, the view, the backbone's fingerprint (which covers
weights, activation and preprocessing) and the type it is stored in. It depends on nothing else, so it can
never be out of date.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.core.paths import user_path
from vlprompt.data._shards import ShardStore
from vlprompt.data.base import ImageDataset
from vlprompt.data.loading import Loader, Workers
from vlprompt.data.transforms import Augmentation, Preprocess

__all__ = ["FeatureCache"]

Encode = Callable[[torch.Tensor], torch.Tensor]
ProgressCallback = Callable[[int, int], None]
_ROWS_PER_SHARD = 4096  # at d = 512 and float32 a shard is 8 MiB, and a kill loses at most this many rows
_KEYS_PER_JOB = 256
_HASHING_THREADS = 4
_PLAIN = Augmentation()


class FeatureCache:
    """Image features by content.

    Args:
        root: Folder of the shards, made when the first one is written; None keeps rows in memory only.
        rows_per_shard: Rows that are gathered before a shard is written.
    """

    def __init__(self, root: str | Path | None = None, rows_per_shard: int = _ROWS_PER_SHARD) -> None:
        self.root = None if root is None else user_path(root)
        self.rows_per_shard = rows_per_shard
        self._stores: dict[tuple[str, torch.dtype], ShardStore] = {}

    @torch.no_grad()
    def features(
        self,
        dataset: ImageDataset,
        encode: Encode,
        preprocess: Preprocess,
        *,
        fingerprint: str,
        augmentation: Augmentation = _PLAIN,
        seed: int = 0,
        view: int = 0,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        workers: Workers | None = None,
        progress: ProgressCallback | bool = True,
    ) -> torch.Tensor:
        """Return the features of one view of every image, encoding only those that are not stored yet.

        Batches are runs of consecutive samples, without those that are stored already: a run that was killed
        between two batches and started again makes the same batches again, hence the same bits.

        Args:
            dataset: n images.
            encode: The frozen tower: (B, 3, H, W) to (B, d); moves its input where it wants it.
            preprocess: The backbone's: PIL image to (3, H, W).
            fingerprint: The backbone's.
            augmentation: Which views to take.
            seed: Seed of the views.
            view: Number of the view, from 0.
            dtype: Type of the result and of what is stored.
            batch_size: Images per call of ``encode``; at most two batches of images per worker are in memory, and one.
            workers: Processes that decode and augment; see :class:`vlprompt.data.loading.Loader`.
            progress: Called with (done, n); True shows a bar if the error stream is a terminal, False shows
                none.

        Returns:
            (n, d) on the CPU, in the data set's order.

        Raises:
            DataError: If an image can't be read (it is named), the data set is empty or ``encode`` returns
                no matrix.
            NonFiniteError: If a feature is NaN or infinite; names the image.
        """
        if not len(dataset):
            raise DataError(f"{dataset.name} ({dataset.split}): no images to encode.")

        store = self._store(fingerprint, dtype)
        image_keys = _image_keys(dataset)
        view_text = augmentation.describe(seed, view)
        keys = [_row_key(k, view_text) for k in image_keys]

        todo = _batches(keys, store, batch_size)
        done = len(dataset) - sum(map(len, todo))
        reader = _ViewReader(dataset, image_keys, augmentation, preprocess, seed, view)
        with (
            Loader(reader, workers=workers) as loader,
            _reporter(progress, f"{dataset.name} features") as report,
        ):
            try:
                for indices, images in zip(todo, loader.stream(todo), strict=True):
                    rows = _checked(encode(images), indices, dataset).to("cpu", dtype)
                    store.add([keys[i] for i in indices], rows)
                    done += len(indices)
                    report(done, len(dataset))
            finally:  # what was encoded before an error is not encoded again
                store.flush()

        return store.rows(keys)

    def _store(self, fingerprint: str, dtype: torch.dtype) -> ShardStore:
        if (fingerprint, dtype) not in self._stores:
            folder = None
            if self.root is not None:
                digest = hashlib.sha256(f"{fingerprint}\x1f{dtype}".encode()).hexdigest()
                folder = self.root / digest[:16]
            self._stores[fingerprint, dtype] = ShardStore(folder, fingerprint, dtype, self.rows_per_shard)

        store = self._stores[fingerprint, dtype]
        store.refresh()
        return store


@dataclass(frozen=True)
class _ViewReader:
    """Reads one view of some images of a data set."""

    dataset: ImageDataset
    image_keys: Sequence[str]
    augmentation: Augmentation
    preprocess: Preprocess
    seed: int
    view: int

    def __call__(self, indices: Sequence[int]) -> torch.Tensor:
        """Return (B, 3, H, W)."""
        return torch.stack([self._view(index) for index in indices])

    def _view(self, index: int) -> torch.Tensor:
        image, _ = self.dataset[index]
        return self.augmentation.augment(
            image, self.preprocess, self.seed, self.image_keys[index], self.view
        )


def _image_keys(dataset: ImageDataset) -> list[str]:
    """Return every image's content key.

    Files are hashed in threads, many per job, not by loading workers: hashing leaves the interpreter to others, and what
    it finds is remembered in this process.
    """
    starts = range(0, len(dataset), _KEYS_PER_JOB)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        runs = pool.map(
            lambda s: [dataset.key(i) for i in range(s, min(s + _KEYS_PER_JOB, len(dataset)))], starts
        )
        return [key for run in runs for key in run]


def _row_key(image_key: str, view: str) -> bytes:
    return hashlib.sha256(f"{image_key}\x1f{view}".encode()).digest()[:16]


def _batches(keys: Sequence[bytes], store: ShardStore, size: int) -> list[list[int]]:
    """Return the indices to encode, in fixed runs of ``size`` samples; equal images are encoded once."""
    seen: set[bytes] = set()
    batches = []
    for start in range(0, len(keys), max(1, size)):
        batch = []
        for index in range(start, min(start + max(1, size), len(keys))):
            if keys[index] not in store and keys[index] not in seen:
                seen.add(keys[index])
                batch.append(index)
        if batch:
            batches.append(batch)

    return batches


def _checked(features: torch.Tensor, indices: list[int], dataset: ImageDataset) -> torch.Tensor:
    if features.ndim != 2 or len(features) != len(indices):
        raise DataError(
            f"encode must turn {len(indices)} images into ({len(indices)}, d); got {tuple(features.shape)}."
        )

    finite = torch.isfinite(features).all(dim=1)
    if not bool(finite.all()):
        worst = indices[int((~finite).nonzero()[0])]
        source = dataset.samples[worst].source
        raise NonFiniteError(
            f"{dataset.name} ({dataset.split}): the features of image {source} are not finite."
        )

    return features


@contextmanager
def _reporter(progress: ProgressCallback | bool, title: str) -> Iterator[ProgressCallback]:
    if callable(progress):
        yield progress
        return

    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield lambda done, total: None
        return

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
