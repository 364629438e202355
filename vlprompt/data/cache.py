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
from vlprompt.data._shards import ShardStore, StoredRows
from vlprompt.data.base import ImageDataset
from vlprompt.data.transforms import Augmentation, Preprocess

__all__ = ["PREFIX_GIB", "FeatureCache"]

Encode = Callable[[torch.Tensor], torch.Tensor]
ProgressCallback = Callable[[int, int], None]
_ROWS_PER_SHARD = 4096  # at d = 512 and float32 a shard is 8 MiB, and a kill loses at most this many rows
_KEYS_PER_JOB = 256
_PREFIXES = "prefixes"  # folder of the shards of kept prefixes
_PLAIN = Augmentation()
PREFIX_GIB = 2.0
"""GiB that kept prefixes may take where nobody says: some 30,000 views of photo-vit, 3,500 of ViT-B-16."""


class FeatureCache:
    """Image features by content.

    Args:
        root: Folder of the shards, made when the first one is written; None keeps rows in memory only.
        rows_per_shard: Rows that are gathered before a shard is written.
        prefix_gib: GiB that kept prefixes may take (see :meth:`prefixes`), in memory or, with a folder, in the folder,
            those of earlier runs included; 0 keeps none.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        rows_per_shard: int = _ROWS_PER_SHARD,
        prefix_gib: float = PREFIX_GIB,
    ) -> None:
        self.root = None if root is None else user_path(root)
        self.rows_per_shard = rows_per_shard
        self.prefix_bytes = int(prefix_gib * 2**30)
        self._stores: dict[tuple[str, torch.dtype], ShardStore] = {}
        self._prefixes: dict[tuple[str, torch.dtype], ShardStore] = {}

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

        Returns:
            (n, d) on the CPU, in the data set's order.

        Raises:
            DataError: If an image can't be read (it is named), the data set is empty or ``encode`` returns
                no matrix.
            NonFiniteError: If a feature is NaN or infinite; names the image.
        """
        store = self._store(self._stores, fingerprint, dtype)
        run = _Run(dataset, encode, preprocess, augmentation, seed, view, batch_size, workers, progress)
        return run.fill(store).all()

    @torch.no_grad()
    def prefixes(
        self,
        dataset: ImageDataset,
        encode: Encode,
        preprocess: Preprocess,
        *,
        fingerprint: str,
        row_bytes: int,
        augmentation: Augmentation = _PLAIN,
        seed: int = 0,
        view: int = 0,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        workers: int = 2,
        progress: ProgressCallback | bool = True,
    ) -> StoredRows | None:
        """Return what the frozen beginning of an image tower makes of one view of every image.

        As :meth:`features`, but of wide rows, which stay where they are until they are asked for, and only if they
        fit into ``prefix_gib`` beside those that are kept already.

        Args:
            dataset: See :meth:`features`.
            encode: The frozen beginning: (B, 3, H, W) to (B, D).
            preprocess: See :meth:`features`.
            fingerprint: Of the backbone, and how far the beginning goes.
            row_bytes: Of a row.
            augmentation: See :meth:`features`, also for the rest.
            seed: See there.
            view: See there.
            dtype: See there.
            batch_size: See there.
            workers: See there.
            progress: See there.

        Returns:
            The rows; None if they don't fit.
        """
        store = self._store(self._prefixes, fingerprint, dtype)
        run = _Run(dataset, encode, preprocess, augmentation, seed, view, batch_size, workers, progress)

        missing = run.missing(store) * row_bytes
        if missing and self._prefix_bytes_used() + missing > self.prefix_bytes:
            return None
        return run.fill(store)

    def _prefix_bytes_used(self) -> int:
        """Return the bytes of kept prefixes: in the folder, those of earlier runs included, or in memory."""
        if self.root is None:
            return sum(store.size for store in self._prefixes.values())
        return sum(path.stat().st_size for path in (self.root / _PREFIXES).glob("*/*.safetensors"))

    def _store(
        self, stores: dict[tuple[str, torch.dtype], ShardStore], fingerprint: str, dtype: torch.dtype
    ) -> ShardStore:
        if (fingerprint, dtype) not in stores:
            folder = None
            if self.root is not None:
                digest = hashlib.sha256(f"{fingerprint}\x1f{dtype}".encode()).hexdigest()
                root = self.root / _PREFIXES if stores is self._prefixes else self.root
                folder = root / digest[:16]
            stores[fingerprint, dtype] = ShardStore(folder, fingerprint, dtype, self.rows_per_shard)

        store = stores[fingerprint, dtype]
        store.refresh()
        return store


class _Run:
    """One view of every image of a data set, and how it is encoded; arguments as of :meth:`FeatureCache.features`."""

    def __init__(
        self,
        dataset: ImageDataset,
        encode: Encode,
        preprocess: Preprocess,
        augmentation: Augmentation,
        seed: int,
        view: int,
        batch_size: int,
        workers: int,
        progress: ProgressCallback | bool,
    ) -> None:
        if not len(dataset):
            raise DataError(f"{dataset.name} ({dataset.split}): no images to encode.")

        self.dataset = dataset
        self.encode = encode
        self.batch_size = batch_size
        self.workers = max(1, workers)
        self.progress = progress

        with ThreadPoolExecutor(self.workers) as pool:
            self.image_keys = _image_keys(pool, dataset)
        view_text = augmentation.describe(seed, view)
        self.keys = [_row_key(k, view_text) for k in self.image_keys]

        def load(index: int) -> torch.Tensor:
            image, _ = dataset[index]
            return augmentation.augment(image, preprocess, seed, self.image_keys[index], view)

        self.load = load

    def missing(self, store: ShardStore) -> int:
        """Return how many rows a store doesn't have."""
        return len({key for key in self.keys if key not in store})

    def fill(self, store: ShardStore) -> StoredRows:
        """Encode what a store doesn't have, and return the rows."""
        dataset = self.dataset
        todo = _batches(self.keys, store, self.batch_size)
        done = len(dataset) - sum(map(len, todo))

        with (
            ThreadPoolExecutor(self.workers) as pool,
            _reporter(self.progress, f"{dataset.name} features") as report,
        ):
            try:
                for indices, images in _prefetched(pool, self.load, todo):
                    rows = _checked(self.encode(images), indices, dataset)
                    store.add([self.keys[i] for i in indices], rows.to("cpu", store.dtype))
                    done += len(indices)
                    report(done, len(dataset))
            finally:  # what was encoded before an error is not encoded again
                store.flush()

        return StoredRows(store, self.keys)


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
