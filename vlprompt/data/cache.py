"""Exact feature cache: a frozen tower never sees the same view of the same image twice.

A row is keyed by what it depends on: the image's bytes, the view, the backbone's fingerprint (which covers
weights, activation and preprocessing) and the type it is stored in. It depends on nothing else, so it can
never be out of date.

A folder of rows may be shared by processes of many machines. Who comes first computes a row: he claims the rows of a
few thousand images (see :mod:`vlprompt.core.claims`), looks once more whether they are there by now, encodes them and
puts them on the disk before he lets go. The others take the next ones, and wait only when there is nothing else to do.
Nobody waits while he holds a claim, so no two ever wait for each other; what a dead process had claimed is computed by
another one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from vlprompt.core.claims import Claims
from vlprompt.core.errors import CheckpointError, DataError, NonFiniteError
from vlprompt.core.paths import user_path
from vlprompt.core.shares import share_rows, shares_work
from vlprompt.data._shards import ShardStore, StoredRows
from vlprompt.data.base import ImageDataset
from vlprompt.data.loading import Loader, Workers
from vlprompt.data.transforms import Augmentation, Preprocess

__all__ = ["PREFIX_GIB", "FeatureCache"]

Encode = Callable[[torch.Tensor], torch.Tensor]
ProgressCallback = Callable[[int, int], None]
_ROWS_PER_SHARD = 4096  # at d = 512 and float32 a shard is 8 MiB, and a kill loses at most this many rows
_ROWS_PER_BLOCK = 16  # from here on, a row has the same bits whatever the size of its batch
_KEYS_PER_JOB = 256
_HASHING_THREADS = 4
_VIEWS_AT_ONCE = 4  # of each image of a batch, in memory
_LOOK_SECONDS = 0.2  # between two looks at rows that other processes encode
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

    def features(
        self, dataset: ImageDataset, encode: Encode, preprocess: Preprocess, *, view: int = 0, **options: Any
    ) -> torch.Tensor:
        """Return (n, d) features of one view; arguments and errors as :meth:`view_features`."""
        return self.view_features(dataset, encode, preprocess, views=[view], **options)[0]

    @torch.no_grad()
    def view_features(
        self,
        dataset: ImageDataset,
        encode: Encode,
        preprocess: Preprocess,
        *,
        fingerprint: str,
        augmentation: Augmentation = _PLAIN,
        seed: int = 0,
        views: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        workers: Workers | None = None,
        progress: ProgressCallback | bool = True,
    ) -> list[torch.Tensor]:
        """Return the features of some views of every image, encoding only those that are not stored yet.

        Batches are runs of consecutive samples, without those that are stored already, and are filled up to whole
        blocks of 16 (of ``batch_size``, if that is less): on a CPU a row has the same bits whoever computes it, after
        any kill, and beside any other rows. Where several processes share work, each encodes and stores a part, and all
        get the whole.

        Args:
            dataset: n images.
            encode: The frozen tower: (B, 3, H, W) to (B, d); moves its input where it wants it.
            preprocess: The backbone's: PIL image to (3, H, W).
            fingerprint: The backbone's.
            augmentation: Which views to take.
            seed: Seed of the views.
            views: Numbers of the views, from 0; an image is decoded once for several of them.
            dtype: Type of the result and of what is stored.
            batch_size: Images per call of ``encode``; at most two batches per worker are in memory, and one, each of up
                to four views.
            workers: Processes that decode and augment; see :class:`vlprompt.data.loading.Loader`.
            progress: Called with (done, n V); True shows a bar if the error stream is a terminal, False shows
                none.

        Returns:
            Of each view (n, d) on the CPU, in the data set's order.

        Raises:
            DataError: If an image can't be read (it is named), the data set is empty or ``encode`` returns
                no matrix.
            NonFiniteError: If a feature is NaN or infinite; names the image.
        """
        if not len(dataset):
            raise DataError(f"{dataset.name} ({dataset.split}): no images to encode.")

        if shares_work():

            def features_of(rows: range) -> list[torch.Tensor]:
                return self.view_features(
                    dataset.subset(rows),
                    encode,
                    preprocess,
                    fingerprint=fingerprint,
                    augmentation=augmentation,
                    seed=seed,
                    views=views,
                    dtype=dtype,
                    batch_size=batch_size,
                    workers=workers,
                    progress=progress,
                )

            return share_rows(len(dataset), batch_size, features_of)

        reading = _Reading.of(dataset, preprocess, augmentation, seed, views)
        store = self._store(self._stores, fingerprint, dtype)
        reading.fill(store, encode, batch_size, workers, progress)
        return [store.rows(keys) for keys in reading.keys.values()]

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
        workers: Workers | None = None,
        progress: ProgressCallback | bool = True,
    ) -> StoredRows | None:
        """Return what the frozen beginning of an image tower makes of one view of every image.

        As :meth:`view_features`, but of wide rows, which stay where they are until they are asked for, and only if they
        fit into ``prefix_gib`` beside those that are kept already. Several processes keep all rows each.

        Args:
            dataset: See :meth:`view_features`.
            encode: The frozen beginning: (B, 3, H, W) to (B, D).
            preprocess: See :meth:`view_features`.
            fingerprint: Of the backbone, and how far the beginning goes.
            row_bytes: Of a row.
            augmentation: See :meth:`view_features`, also for the rest.
            seed: See there.
            view: See there.
            dtype: See there.
            batch_size: See there.
            workers: See there.
            progress: See there.

        Returns:
            The rows; None if they don't fit.
        """
        if not len(dataset):
            raise DataError(f"{dataset.name} ({dataset.split}): no images to encode.")

        reading = _Reading.of(dataset, preprocess, augmentation, seed, [view])
        store = self._store(self._prefixes, fingerprint, dtype)
        keys = reading.keys[view]

        missing = len({key for key in keys if key not in store}) * row_bytes
        if missing and self._prefix_bytes_used() + missing > self.prefix_bytes:
            return None
        reading.fill(store, encode, batch_size, workers, progress)
        return StoredRows(store, keys)

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


@dataclass(frozen=True)
class _Reading:
    """Some views of every image of a data set, with the keys of their rows.

    Attributes:
        reader: Reads the views.
        keys: Of every image, by view.
    """

    reader: _ViewReader
    keys: Mapping[int, Sequence[bytes]]

    @classmethod
    def of(
        cls,
        dataset: ImageDataset,
        preprocess: Preprocess,
        augmentation: Augmentation,
        seed: int,
        views: Sequence[int],
    ) -> _Reading:
        """Hash the images; arguments as of :meth:`FeatureCache.view_features`."""
        image_keys = _image_keys(dataset)
        keys = {
            view: [_row_key(key, augmentation.describe(seed, view)) for key in image_keys] for view in views
        }
        return cls(_ViewReader(dataset, image_keys, augmentation, preprocess, seed), keys)

    def fill(
        self,
        store: ShardStore,
        encode: Encode,
        batch_size: int,
        workers: Workers | None,
        progress: ProgressCallback | bool,
    ) -> None:
        """Encode what a store doesn't have, but for what another process is encoding: that is waited for."""
        dataset = self.reader.dataset
        total = len(dataset) * len(self.keys)
        blocks = _InBlocks(encode, min(_ROWS_PER_BLOCK, batch_size))
        todo = _batches(self.keys, store, batch_size)
        with (
            Loader(self.reader, workers=workers, expected=len(todo)) as loader,
            _reporter(progress, f"{dataset.name} features") as report,
        ):
            while todo:
                done = total - sum(len(indices) for batch in todo for indices in batch.values())
                waits = True
                for portion in _portions(todo, store):
                    with self._claimed(store, portion) as mine:
                        if mine:
                            waits = False
                            done = self._encode(store, blocks, portion, loader, report, done)

                if waits:
                    time.sleep(_LOOK_SECONDS)
                store.refresh()
                todo = _batches(self.keys, store, batch_size)

    @contextmanager
    def _claimed(self, store: ShardStore, portion: Sequence[Mapping[int, Sequence[int]]]) -> Iterator[bool]:
        """Own the rows of some batches, unless another process does or has put one of them there by now."""
        keys = [self.keys[view][i] for batch in portion for view, indices in batch.items() for i in indices]
        if store.folder is None:
            yield True
            return

        try:
            claim = Claims(store.folder).take([key.hex() for key in keys])
        except (
            CheckpointError
        ):  # a folder that can't be written: rows stay in memory, and nobody else waits for them
            yield True
            return
        if claim is None:
            yield False
            return

        with claim:
            store.refresh()
            yield not any(key in store for key in keys)

    def _encode(
        self,
        store: ShardStore,
        encode: Encode,
        portion: Sequence[dict[int, list[int]]],
        loader: Loader[Mapping[int, Sequence[int]], list[torch.Tensor]],
        report: ProgressCallback,
        done: int,
    ) -> int:
        """Encode some batches, and put their rows on the disk; return how many rows are there then."""
        dataset = self.reader.dataset
        total = len(dataset) * len(self.keys)
        try:
            for batch, parts in zip(portion, loader.stream(portion), strict=True):
                for (view, indices), images in zip(batch.items(), parts, strict=True):
                    rows = _checked(encode(images), indices, dataset).to("cpu", store.dtype)
                    store.add([self.keys[view][i] for i in indices], rows)
                    done += len(indices)
                    report(done, total)
        finally:  # what was encoded before an error is not encoded again
            store.flush()
        return done


@dataclass(frozen=True)
class _ViewReader:
    """Reads views of some images of a data set; each image is decoded once."""

    dataset: ImageDataset
    image_keys: Sequence[str]
    augmentation: Augmentation
    preprocess: Preprocess
    seed: int

    def __call__(self, group: Mapping[int, Sequence[int]]) -> list[torch.Tensor]:
        """Return (B, 3, H, W) of each view, for the images that it lacks."""
        rows: dict[int, list[torch.Tensor]] = {view: [] for view in group}
        for index in sorted({index for indices in group.values() for index in indices}):
            wanted = [view for view, indices in group.items() if index in indices]
            image, _ = self.dataset[index]
            made = self.augmentation.augment_all(
                image, self.preprocess, self.seed, self.image_keys[index], wanted
            )
            for view, pixels in zip(wanted, made, strict=True):
                rows[view].append(pixels)
        return [torch.stack(parts) for parts in rows.values()]


def _image_keys(dataset: ImageDataset) -> list[str]:
    """Return every image's content key.

    Files are hashed in threads, many per job, not by loading workers: hashing leaves the interpreter to others, and
    what it finds is remembered in this process.
    """
    starts = range(0, len(dataset), _KEYS_PER_JOB)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        runs = pool.map(
            lambda s: [dataset.key(i) for i in range(s, min(s + _KEYS_PER_JOB, len(dataset)))], starts
        )
        return [key for run in runs for key in run]


def _row_key(image_key: str, view: str) -> bytes:
    return hashlib.sha256(f"{image_key}\x1f{view}".encode()).digest()[:16]


def _batches(keys: Mapping[int, Sequence[bytes]], store: ShardStore, size: int) -> list[dict[int, list[int]]]:
    """Return the indices to encode by view, in fixed runs of ``size`` samples; equal images are encoded once.

    A run holds a few views, for which its images are decoded together.
    """
    seen: set[bytes] = set()
    batches = []
    views = list(keys)
    count = len(next(iter(keys.values()), ()))

    for group in (views[i : i + _VIEWS_AT_ONCE] for i in range(0, len(views), _VIEWS_AT_ONCE)):
        for start in range(0, count, max(1, size)):
            batch = {}
            for view in group:
                indices = []
                for index in range(start, min(start + max(1, size), count)):
                    key = keys[view][index]
                    if key not in store and key not in seen:
                        seen.add(key)
                        indices.append(index)
                if indices:
                    batch[view] = indices
            if batch:
                batches.append(batch)

    return batches


def _portions(
    batches: Sequence[dict[int, list[int]]], store: ShardStore
) -> Iterator[list[dict[int, list[int]]]]:
    """Yield the batches that one process claims together: as many as make a shard; all of them if nobody shares."""
    portion: list[dict[int, list[int]]] = []
    rows = 0
    for batch in batches:
        portion.append(batch)
        rows += sum(len(indices) for indices in batch.values())
        if store.folder is not None and rows >= store.rows_per_shard:
            yield portion
            portion = []
            rows = 0
    if portion:
        yield portion


@dataclass(frozen=True)
class _InBlocks:
    """Encodes images in whole blocks.

    Libraries of matrix products and convolutions choose their way by the size of a batch, and ways differ in the last
    bits. Which images lie in a batch depends on what is stored already, so on kills and on other processes.

    Attributes:
        encode: (B, 3, H, W) to (B, D).
        size: Of a block; from 16 on, the number of blocks makes no difference either.
    """

    encode: Encode
    size: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B, D) rows of any number of images."""
        missing = -len(images) % self.size
        filled = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images
        return self.encode(filled)[: len(images)]


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
