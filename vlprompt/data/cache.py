"""Exact feature cache: a frozen tower never sees the same view of the same image twice.

A row is keyed by what it depends on: the image's bytes, the view, the backbone's fingerprint (which covers
weights, activation and preprocessing) and the type it is stored in. It depends on nothing else, so it can
never be out of date.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.core.paths import user_path
from vlprompt.core.shares import share_rows, shares_work
from vlprompt.data._shards import ShardStore
from vlprompt.data.base import ImageDataset
from vlprompt.data.transforms import Augmentation, Preprocess

__all__ = ["FeatureCache"]

Encode = Callable[[torch.Tensor], torch.Tensor]
ProgressCallback = Callable[[int, int], None]
_ROWS_PER_SHARD = 4096  # at d = 512 and float32 a shard is 8 MiB, and a kill loses at most this many rows
_KEYS_PER_JOB = 256
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
        workers: int = 2,
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
            batch_size: Images per call of ``encode``; at most three batches of images are in memory.
            workers: Threads that decode and augment.
            progress: Called with (done, n); True shows a bar if the error stream is a terminal, False shows
                none.

        Where several processes share work, each encodes and stores a part, and all get the whole.

        Returns:
            (n, d) on the CPU, in the data set's order.

        Raises:
            DataError: If an image can't be read (it is named), the data set is empty or ``encode`` returns
                no matrix.
            NonFiniteError: If a feature is NaN or infinite; names the image.
        """
        if not len(dataset):
            raise DataError(f"{dataset.name} ({dataset.split}): no images to encode.")

        if shares_work():

            def features_of(rows: range) -> list[torch.Tensor]:
                part = self.features(
                    dataset.subset(rows),
                    encode,
                    preprocess,
                    fingerprint=fingerprint,
                    augmentation=augmentation,
                    seed=seed,
                    view=view,
                    dtype=dtype,
                    batch_size=batch_size,
                    workers=workers,
                    progress=progress,
                )
                return [part]

            return share_rows(len(dataset), batch_size, features_of)[0]

        store = self._store(fingerprint, dtype)
        with (
            ThreadPoolExecutor(max(1, workers)) as pool,
            _reporter(progress, f"{dataset.name} features") as report,
        ):
            image_keys = _image_keys(pool, dataset)
            view_text = augmentation.describe(seed, view)
            keys = [_row_key(k, view_text) for k in image_keys]

            def load(index: int) -> torch.Tensor:
                image, _ = dataset[index]
                return augmentation.augment(image, preprocess, seed, image_keys[index], view)

            todo = _batches(keys, store, batch_size)
            done = len(dataset) - sum(map(len, todo))
            try:
                for indices, images in _prefetched(pool, load, todo):
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


def _image_keys(pool: ThreadPoolExecutor, dataset: ImageDataset) -> list[str]:
    """Return every image's content key; files are hashed in threads, many per job."""
    starts = range(0, len(dataset), _KEYS_PER_JOB)
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


def _prefetched(
    pool: ThreadPoolExecutor, load: Callable[[int], torch.Tensor], batches: list[list[int]]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield stacked batches; the next two decode while the caller works on one."""
    running: list[tuple[list[int], list[Future[torch.Tensor]]]] = []
    coming = iter(batches)
    try:
        while True:
            while len(running) < 2 and (batch := next(coming, None)) is not None:
                running.append((batch, [pool.submit(load, i) for i in batch]))
            if not running:
                return
            indices, futures = running.pop(0)
            images = torch.stack([f.result() for f in futures])
            if (batch := next(coming, None)) is not None:
                running.append((batch, [pool.submit(load, i) for i in batch]))
            yield indices, images
    finally:  # after an error the images that were decoded ahead are not needed
        for _, futures in running:
            for future in futures:
                future.cancel()


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
