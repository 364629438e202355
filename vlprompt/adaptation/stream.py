"""Adapting to a data set as a stream of images: views shared between methods, results written batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.adaptation.base import Adapter, EncodedViews
from vlprompt.adaptation.predictions import Predictions
from vlprompt.adaptation.views import OpenedImage, open_images
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.shares import share_rows
from vlprompt.data import ImageDataset
from vlprompt.data.base import hash_strings

__all__ = ["adapt_dataset", "read_predictions"]

Progress = Callable[[int, int], None]


def adapt_dataset(
    adapters: Mapping[str, Adapter],
    data: ImageDataset,
    *,
    folder: str | Path | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Predictions]:
    """Adapt to every image of a data set, in its order, by one or several methods.

    Methods that agree on their standard views share them: they are made and encoded once. What learns from the stream
    starts by forgetting. With a folder, results are written batch by batch; called again it continues behind the
    last batch, and what learned from the stream continues with it. Several processes share the batches if no method
    learns from the stream.

    Args:
        adapters: By a label of one's choice.
        data: Its class names must be the adapters'.
        folder: Where batches are written; None for nowhere.
        batch_size: Images in memory at once.
        progress: Called with (done, n) after each batch.

    Returns:
        Predictions by label, in the data set's order.

    Raises:
        DataError: If the data set is empty, its class names differ or an image can't be read; finished batches stay.
        CheckpointError: If the folder holds results of other images or methods.
    """
    _check(adapters, data)
    for adapter in adapters.values():
        adapter.reset()

    def adapt(rows: range) -> list[Tensor]:
        predictions = _adapt_rows(adapters, data, rows, folder, batch_size, progress)
        return [tensor for label in adapters for tensor in predictions[label].tensors().values()]

    if not all(adapter.episodic for adapter in adapters.values()):  # a stream has one order
        return _adapt_rows(adapters, data, range(len(data)), folder, batch_size, progress)

    tensors = iter(share_rows(len(data), batch_size, adapt))
    return {
        label: Predictions(adapter.classnames, **{name: next(tensors) for name in Predictions.TENSORS})
        for label, adapter in adapters.items()
    }


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


def _adapt_rows(
    adapters: Mapping[str, Adapter],
    data: ImageDataset,
    rows: range,
    folder: str | Path | None,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, Predictions]:
    """Adapt to consecutive images, batch by batch."""
    parts: dict[str, list[Predictions]] = {label: [] for label in adapters}
    for start in range(rows.start, rows.stop, batch_size):
        own = range(start, min(start + batch_size, rows.stop))
        path = None if folder is None else Path(folder) / f"{start:07d}.safetensors"
        # A folder must not be continued with other images or methods.
        facts = {
            "sources": hash_strings(str(data.samples[i].source) for i in own),
            "labels": sorted(adapters),
        }
        if path is not None and path.is_file():
            batch = _read(path, facts, adapters)
        else:
            images = [data[i][0] for i in own]
            backbone = next(iter(adapters.values())).backbone
            batch = _adapt(adapters, open_images(images, backbone))
            if path is not None:
                _write(path, facts, adapters, batch)

        for label, predictions in batch.items():
            parts[label].append(predictions)
        if progress is not None:
            progress(own.stop, len(data))
    return {label: Predictions.cat(batches) for label, batches in parts.items()}


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
