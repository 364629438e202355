"""Adapting to a data set as a stream of images: views shared between methods, results kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.adaptation.base import Adapter, EncodedViews
from vlprompt.adaptation.predictions import Predictions
from vlprompt.adaptation.views import OpenedImage, open_images
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.data import ImageDataset
from vlprompt.data.base import hash_strings

__all__ = ["adapt_dataset"]

Progress = Callable[[int, int], None]
_FIELDS = tuple(f.name for f in fields(Predictions))[1:]


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
    last batch, and what learned from the stream continues with it.

    Args:
        adapters: By a label of one's choice.
        data: Its class names must be the adapters'.
        folder: Where batches are kept; None keeps none.
        batch_size: Images in memory at once.
        progress: Called with (done, n).

    Returns:
        Predictions by label, in the data set's order.

    Raises:
        DataError: If the data set is empty, its class names differ or an image can't be read; what was done is kept.
        CheckpointError: If the folder holds results of other images or methods.
    """
    _check(adapters, data)
    for adapter in adapters.values():
        adapter.reset()
    parts: dict[str, list[Predictions]] = {label: [] for label in adapters}
    resuming = folder is not None
    for start in range(0, len(data), batch_size):
        rows = range(start, min(start + batch_size, len(data)))
        path = None if folder is None else Path(folder) / f"{start:07d}.safetensors"
        facts = {
            "sources": hash_strings(str(data.samples[i].source) for i in rows),
            "labels": sorted(adapters),
        }
        if resuming and path is not None and path.is_file():
            found = _read(path, facts, adapters)
        else:
            resuming = False
            found = _adapt(adapters, open_images([data[i][0] for i in rows], _any(adapters).backbone))
            if path is not None:
                _write(path, facts, adapters, found)
        for label, predictions in found.items():
            parts[label].append(predictions)
        if progress is not None:
            progress(rows.stop, len(data))
    return {label: Predictions.cat(found) for label, found in parts.items()}


def _adapt(adapters: Mapping[str, Adapter], opened: Sequence[OpenedImage]) -> dict[str, Predictions]:
    encoded: dict[tuple[object, ...], EncodedViews] = {}
    found = {}
    for label, adapter in adapters.items():
        identity = adapter.view_identity()
        views = adapter.encode(opened, encoded.get(identity))
        if not views.generated:
            encoded[identity] = views
        found[label] = adapter.predict_encoded(views)
    return found


def _write(
    path: Path, facts: Mapping[str, Any], adapters: Mapping[str, Adapter], found: Mapping[str, Predictions]
) -> None:
    tensors: dict[str, Tensor] = {}
    for label, predictions in found.items():
        tensors |= {f"{label}/{name}": getattr(predictions, name) for name in _FIELDS}
        tensors |= {f"{label}/state/{name}": t for name, t in adapters[label].state().items()}
    write_tensors(path, tensors, facts)


def _read(path: Path, facts: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> dict[str, Predictions]:
    tensors, held = read_tensors(path)
    if held != facts:
        raise CheckpointError(
            f"{path} holds results of other images or methods. Name another folder, or delete this one."
        )
    found = {}
    for label, adapter in adapters.items():
        state = f"{label}/state/"
        adapter.load_state({n.removeprefix(state): t for n, t in tensors.items() if n.startswith(state)})
        found[label] = Predictions(adapter.classnames, *(tensors[f"{label}/{name}"] for name in _FIELDS))
    return found


def _check(adapters: Mapping[str, Adapter], data: ImageDataset) -> None:
    if not len(data) or not adapters:
        raise DataError(f"{data.name}: nothing to adapt to, {len(data)} images and {len(adapters)} adapters.")
    for label, adapter in adapters.items():
        if adapter.classnames != data.classnames:
            raise DataError(
                f"{data.name} has other class names than the adapter {label!r}. Build it with "
                "classnames=data.classnames."
            )


def _any(adapters: Mapping[str, Adapter]) -> Adapter:
    return next(iter(adapters.values()))
