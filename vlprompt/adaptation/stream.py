"""Adapting to a data set as a stream of images: views shared between methods, results written batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.adaptation.base import Adapter, EncodedViews
from vlprompt.adaptation.predictions import Predictions
from vlprompt.adaptation.views import OpenedImage, ViewPlan
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.data import ImageDataset
from vlprompt.data.base import hash_strings
from vlprompt.data.images import pixel_key
from vlprompt.data.loading import Loader, Workers, takes_workers
from vlprompt.data.transforms import Preprocess, affine_of

__all__ = ["adapt_dataset", "read_predictions"]

Progress = Callable[[int, int], None]


@takes_workers
def adapt_dataset(
    adapters: Mapping[str, Adapter],
    data: ImageDataset,
    *,
    folder: str | Path | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> dict[str, Predictions]:
    """Adapt to every image of a data set, in its order, by one or several methods.

    Methods that agree on their standard views share them: they are made and encoded once. What learns from the stream
    starts by forgetting. With a folder, results are written batch by batch; called again it continues behind the
    last batch, and what learned from the stream continues with it.

    Args:
        adapters: By a label of one's choice.
        data: Its class names must be the adapters'.
        folder: Where batches are written; None for nowhere.
        batch_size: Images in memory at once.
        progress: Called with (done, n) after each batch.
        workers: Processes that read images and cut their views; see :data:`vlprompt.data.loading.Workers`.

    Returns:
        Predictions by label, in the data set's order.

    Raises:
        DataError: If the data set is empty, its class names differ or an image can't be read; finished batches stay.
        CheckpointError: If the folder holds results of other images or methods.
    """
    _check(adapters, data)
    for adapter in adapters.values():
        adapter.reset()

    batches = [range(len(data))[start : start + batch_size] for start in range(0, len(data), batch_size)]
    paths = [None if folder is None else Path(folder) / f"{rows.start:07d}.safetensors" for rows in batches]
    finished = {rows.start for rows, path in zip(batches, paths, strict=True) if path and path.is_file()}
    with Loader(_ImageOpener.of(data, adapters)) as loader:
        images = loader.stream([i for rows in batches if rows.start not in finished for i in rows])
        return _adapt_batches(adapters, data, batches, paths, finished, images, progress)


def _adapt_batches(
    adapters: Mapping[str, Adapter],
    data: ImageDataset,
    batches: Sequence[range],
    paths: Sequence[Path | None],
    finished: Set[int],
    images: Iterator[OpenedImage],
    progress: Progress | None,
) -> dict[str, Predictions]:
    """Adapt batch by batch; arguments as in :func:`adapt_dataset`.

    Args:
        adapters: By label.
        data: The images.
        batches: Their rows.
        paths: Where each batch is written.
        finished: First rows of the batches that were written before.
        images: Those of the other batches.
        progress: Called after each batch.
    """
    parts: dict[str, list[Predictions]] = {label: [] for label in adapters}
    for rows, path in zip(batches, paths, strict=True):
        # A folder must not be continued with other images or methods.
        facts = {
            "sources": hash_strings(str(data.samples[i].source) for i in rows),
            "labels": sorted(adapters),
        }
        if path is not None and rows.start in finished:
            batch = _read(path, facts, adapters)
        else:
            batch = _adapt(adapters, list(islice(images, len(rows))))
            if path is not None:
                _write(path, facts, adapters, batch)

        for label, predictions in batch.items():
            parts[label].append(predictions)
        if progress is not None:
            progress(rows.stop, len(data))
    return {label: Predictions.cat(predictions) for label, predictions in parts.items()}


@dataclass(frozen=True)
class _ImageOpener:
    """Opens images of a data set and cuts the views that methods share, where bytes are all that views are made of.

    Attributes:
        data: The images.
        preprocess: The backbone's.
        size: H and W of its input.
        plans: Of the methods; each once.
    """

    data: ImageDataset
    preprocess: Preprocess
    size: tuple[int, int]
    plans: tuple[ViewPlan, ...]

    @classmethod
    def of(cls, data: ImageDataset, adapters: Mapping[str, Adapter]) -> _ImageOpener:
        """Return what opens images for some methods."""
        backbone = next(iter(adapters.values())).backbone
        plans = tuple(dict.fromkeys(adapter.plan for adapter in adapters.values()))
        if affine_of(backbone.preprocess, backbone.image_size) is None:
            plans = ()
        return cls(data, backbone.preprocess, backbone.image_size, plans)

    def __call__(self, index: int) -> OpenedImage:
        """Return one image."""
        image, _ = self.data[index]
        key = pixel_key(image)
        crops = {
            plan: plan.cut(image, key, self.size)
            for plan in self.plans
            if plan.kind == "crop_flip" and plan.count > 1
        }
        return OpenedImage(key, image, first=self.preprocess(image), crops=crops)


def read_predictions(folder: str | Path, label: str, classnames: Sequence[str]) -> Predictions:
    """Return the predictions of one method that :func:`adapt_dataset` wrote.

    Raises:
        CheckpointError: If there are none, or a file is damaged.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no predictions.")
    batches = [_predictions(read_tensors(path)[0], label, tuple(classnames)) for path in paths]
    return Predictions.cat(batches)


def _adapt(adapters: Mapping[str, Adapter], images: Sequence[OpenedImage]) -> dict[str, Predictions]:
    """Run all methods on one batch."""
    encoded: dict[tuple[object, ...], EncodedViews] = {}
    predictions = {}

    for label, adapter in adapters.items():
        identity = adapter.view_identity()
        views = adapter.encode(images, encoded.get(identity))
        # Generated views belong to one method; what others may share are the standard views alone.
        if not views.generated:
            encoded[identity] = views
        predictions[label] = adapter.predict_encoded(views)

    return predictions


def _write(
    path: Path, facts: Mapping[str, Any], adapters: Mapping[str, Adapter], batch: Mapping[str, Predictions]
) -> None:
    tensors: dict[str, Tensor] = {}
    for label, predictions in batch.items():
        tensors |= {f"{label}/{name}": tensor for name, tensor in predictions.tensors().items()}
        # The state comes from behind the batch: what learns from the stream goes on from there.
        tensors |= {f"{label}/state/{name}": tensor for name, tensor in adapters[label].state().items()}
    write_tensors(path, tensors, facts)


def _read(path: Path, facts: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> dict[str, Predictions]:
    """Return a batch that was written before, and put every method into the state that it had behind it."""
    tensors, metadata = read_tensors(path)
    if metadata != facts:
        raise CheckpointError(
            f"{path} holds results of other images or methods. Name another folder, or delete this one."
        )

    batch = {}

    for label, adapter in adapters.items():
        prefix = f"{label}/state/"
        state = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        adapter.load_state(state)
        batch[label] = _predictions(tensors, label, adapter.classnames)

    return batch


def _predictions(tensors: Mapping[str, Tensor], label: str, classnames: tuple[str, ...]) -> Predictions:
    parts = {name: tensors[f"{label}/{name}"] for name in Predictions.TENSORS}
    return Predictions(classnames, **parts)


def _check(adapters: Mapping[str, Adapter], data: ImageDataset) -> None:
    if not len(data) or not adapters:
        raise DataError(f"{data.name}: nothing to adapt to, {len(data)} images and {len(adapters)} adapters.")

    for label, adapter in adapters.items():
        if adapter.classnames != data.classnames:
            raise DataError(
                f"{data.name} has other class names than the adapter {label!r}. Build it with "
                "classnames=data.classnames."
            )
