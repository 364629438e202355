"""Adapting to a data set as a stream of images: views shared between methods, results written portion by portion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlprompt.adaptation.base import Adapter, Collector, EncodedViews
from vlprompt.adaptation.predictions import Predictions
from vlprompt.adaptation.views import OpenedImage, ViewPlan, open_images
from vlprompt.core.errors import CheckpointError, DataError, NonFiniteError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.options import check_counts, check_options, check_type
from vlprompt.core.shares import process_count, share_rows
from vlprompt.data import ImageDataset
from vlprompt.data.base import hash_strings
from vlprompt.data.images import pixel_key
from vlprompt.data.loading import Loader, Workers, takes_workers
from vlprompt.data.transforms import Preprocess, affine_of

__all__ = ["EncodedStream", "adapt_dataset", "adapt_stream", "read_predictions"]

Progress = Callable[[int, int], None]
OnBadImage = Literal["error", "skip"]
_STATE = "state.safetensors"  # what was learned from the stream, behind the last portion
_PORTIONS = "[0-9]*.safetensors"
_WAITING = "waiting"  # embeddings whose predictions wait for more images
_REFUSED = "refused"


class EncodedStream:
    """Encoded standard views of a data set's images, kept in memory: other orders of the stream encode nothing.

    Args:
        adapters: The methods that will be run again, by label; those that run the image tower themselves keep nothing.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.wanted = {
            _shared_by(label, adapters)
            for label, adapter in adapters.items()
            if adapter.granularity != "image" and not adapter.needs_pixels
        }
        self._rows: dict[tuple[object, ...], dict[str, EncodedViews]] = {}

    def get(self, identity: tuple[object, ...], images: Sequence[OpenedImage]) -> EncodedViews | None:
        """Return the views of images that were all encoded before, or None."""
        rows = self._rows.get(identity, {})
        if any(image.key not in rows for image in images):
            return None
        return EncodedViews.cat([rows[image.key] for image in images])

    def put(self, identity: tuple[object, ...], images: Sequence[OpenedImage], views: EncodedViews) -> None:
        """Keep the views of images, if a method wants them again."""
        if identity not in self.wanted:
            return
        for row, image in enumerate(images):
            self._rows.setdefault(identity, {})[image.key] = views.rows([row])


@takes_workers
def adapt_dataset(
    adapters: Mapping[str, Adapter],
    data: ImageDataset,
    *,
    folder: str | Path | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
    encoded: EncodedStream | None = None,
    on_bad_image: OnBadImage = "error",
    forget: bool = True,
    workers: Workers | None = None,
) -> dict[str, Predictions]:
    """Adapt to every image of a data set, in its order, by one or several methods.

    Methods that agree on their standard views share them: they are made and encoded once, for the largest plan. What
    learns from the stream starts by forgetting, unless it is told not to. With a folder, results are written portion
    by portion; called again it continues behind the last portion, and what learned from the stream continues with it.
    Several processes share the portions if no method depends on other images.

    Args:
        adapters: By a label of one's choice.
        data: Its class names must be the adapters'.
        folder: Where portions are written; None for nowhere.
        batch_size: Images in memory at once; it changes no prediction.
        progress: Called with (done, n) after each portion.
        encoded: Views that were encoded before; what is missing is added.
        on_bad_image: What an embedding that is NaN or infinite does: ``"error"`` stops; ``"skip"`` refuses that image,
            which learns nothing and whose probabilities are NaN, and goes on.
        forget: Pass False where these images go on a stream: what was learned before them stays.
        workers: Processes that read images and cut their views; see :data:`vlprompt.data.loading.Workers`.

    Returns:
        Predictions by label, in the data set's order.

    Raises:
        ConfigError: If ``on_bad_image`` has another value.
        DataError: If the data set is empty, its class names differ or an image can't be read; finished portions stay.
        NonFiniteError: If an embedding is NaN or infinite; names the image.
        CheckpointError: If the folder holds results of other images or methods.
    """
    check_counts(batch_size=batch_size)
    check_options(_check_arguments, {"on_bad_image": on_bad_image}, source="adapt_dataset")
    _check(adapters, data)
    for adapter in adapters.values():
        if forget:
            adapter.reset()

    def adapt(rows: range) -> dict[str, Predictions]:
        return _adapt_rows(adapters, data, rows, folder, batch_size, progress, encoded, on_bad_image)

    portions = -(-len(data) // batch_size)
    is_free = all(adapter.granularity == "image" for adapter in adapters.values())  # a stream has one order
    if not is_free or portions < process_count():
        return adapt(range(len(data)))

    names: dict[str, list[str]] = {}

    def tensors_of(rows: range) -> list[Tensor]:
        by_label = {label: predictions.tensors() for label, predictions in adapt(rows).items()}
        names.update({label: list(tensors) for label, tensors in by_label.items()})
        return [tensor for tensors in by_label.values() for tensor in tensors.values()]

    gathered = iter(share_rows(len(data), batch_size, tensors_of))
    return {
        label: Predictions.of_tensors(adapter.classnames, {name: next(gathered) for name in names[label]})
        for label, adapter in adapters.items()
    }


def adapt_stream(
    adapter: Adapter, images: Iterable[Any], *, on_bad_image: OnBadImage = "error"
) -> Iterator[Predictions]:
    """Yield predictions as images come; nothing is forgotten before or after.

    One image at a time is opened, encoded and adapted to. Methods that need a batch, or all images, yield when they
    can; what waits at the end is predicted then. Its state can be taken (``adapter.state()``) between two images.

    Args:
        adapter: What it has learned from earlier images stays; call :meth:`Adapter.reset` to begin anew.
        images: PIL images, paths or tensors of one image each; may never end.
        on_bad_image: ``"skip"`` leaves out an image that can't be read or whose embedding is NaN or infinite; no
            prediction comes for it.

    Raises:
        ConfigError: If ``on_bad_image`` has another value.
        DataError: If an image can't be read; says which.
        NonFiniteError: If an embedding is NaN or infinite; says which, from 0.
    """
    check_type(adapter, Adapter, "an adapter", "vlprompt.create_adapter(...)")
    check_options(_check_arguments, {"on_bad_image": on_bad_image}, source="adapt_stream")
    collector = Collector(adapter)
    for number, image in enumerate(images):
        try:
            views = adapter.encode(open_images(image, adapter.backbone))
            if not bool(views.finite.all()):
                raise NonFiniteError(f"image {number} (from 0): its embedding is NaN or infinite.")
        except (DataError, NonFiniteError):
            if on_bad_image == "error":
                raise
            continue
        yield from collector.add(views)
    yield from collector.close()


def read_predictions(folder: str | Path, label: str, classnames: Sequence[str]) -> Predictions:
    """Return the predictions of one method that :func:`adapt_dataset` wrote; refused images are left out.

    Raises:
        CheckpointError: If there are none, or a file is damaged.
    """
    paths = sorted(Path(folder).glob(_PORTIONS))
    if not paths:
        raise CheckpointError(f"{folder} holds no predictions.")
    parts = [_predictions(read_tensors(path)[0], label, tuple(classnames)) for path in paths]
    return Predictions.cat([part for part in parts if part is not None])


def _check_arguments(*, on_bad_image: OnBadImage) -> None:
    """Say what may be done with a bad image."""


def _adapt_rows(
    adapters: Mapping[str, Adapter],
    data: ImageDataset,
    rows: range,
    folder: str | Path | None,
    batch_size: int,
    progress: Progress | None,
    encoded: EncodedStream | None,
    on_bad_image: OnBadImage,
) -> dict[str, Predictions]:
    """Adapt to consecutive images, portion by portion; arguments as of :func:`adapt_dataset`."""
    collectors = {label: Collector(adapter) for label, adapter in adapters.items()}
    parts: dict[str, list[Predictions]] = {label: [] for label in adapters}
    refused: list[int] = []
    learns = any(adapter.granularity != "image" for adapter in adapters.values())
    state = _State(Path(folder)) if folder is not None and learns else None

    portions = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    paths = [None if folder is None else Path(folder) / f"{own.start:07d}.safetensors" for own in portions]
    finished = {
        own.start
        for own, path in zip(portions, paths, strict=True)
        if path is not None and path.is_file() and (state is None or own.stop <= state.done)
    }

    opener = _ImageOpener.of(data, adapters)
    read_before: list[int] = []  # numbers of images whose portions are read from files
    with Loader(opener) as loader:
        images = loader.stream([i for own in portions if own.start not in finished for i in own])
        for own, path in zip(portions, paths, strict=True):
            # A folder must not be continued with other images or methods.
            facts = {
                "sources": hash_strings(str(data.samples[i].source) for i in own),
                "labels": sorted(adapters),
            }
            if path is not None and own.start in finished:
                portion = _read(path, facts, collectors)
                bad = {own[row] for row in portion.refused}
                read_before += [number for number in own if number not in bad]
                if state is not None and own.stop == state.done:
                    state.restore(adapters)
            else:
                _open_waiting(collectors, opener, read_before)
                read_before = []
                portion = _adapt(collectors, list(islice(images, len(own))), encoded, own.stop == len(data))
                if portion.refused and on_bad_image == "error":
                    named = ", ".join(str(data.samples[own[row]].source) for row in portion.refused)
                    raise NonFiniteError(f"{data.name}: the embedding of {named} is NaN or infinite.")
                if path is not None:
                    portion.write(path, facts)
                if state is not None:
                    state.write(own.stop, adapters)

            refused += [own[row] - rows.start for row in portion.refused]
            for label, predictions in portion.predictions.items():
                parts[label] += predictions
            if progress is not None:
                progress(own.stop, len(data))

    return {label: _with_refused(part, refused, adapters[label], len(rows)) for label, part in parts.items()}


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
        exact = self.data.reader.exact(self.data.samples[index].source)
        first = self.preprocess(image) if exact is None else self._prepared(exact)
        crops = {
            plan: plan.cut(image, key, self.size)
            for plan in self.plans
            if plan.kind == "crop_flip" and plan.count > 1
        }
        return OpenedImage(key, image, first=first, crops=crops)

    def _prepared(self, exact: Tensor) -> Tensor:
        """Return what preprocessing makes of pixels in [0, 1] that bytes can't hold; crops are cut from the bytes."""
        affine = affine_of(self.preprocess, self.size)
        if affine is None:
            raise DataError(f"{self.data.name}: this preprocessing takes bytes alone.")
        return affine(255 * exact[None])[0]


class _Portion:
    """What came of some images.

    Args:
        predictions: By label; a method of batches may give none, or more than there are images.
        refused: Numbers of images, from the first of the portion, whose embedding isn't finite.
        waiting: Embeddings of methods that see many images together, by label.
    """

    def __init__(
        self,
        predictions: Mapping[str, list[Predictions]],
        refused: list[int],
        waiting: Mapping[str, EncodedViews],
    ) -> None:
        self.predictions = predictions
        self.refused = refused
        self.waiting = waiting

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        tensors = {_REFUSED: torch.tensor(self.refused, dtype=torch.long)}
        for label, parts in self.predictions.items():
            if parts:
                joined = Predictions.cat(parts).tensors()
                tensors |= {f"{label}/{name}": tensor.contiguous() for name, tensor in joined.items()}
        for label, views in self.waiting.items():
            tensors[f"{label}/{_WAITING}/embeddings"] = views.embeddings.cpu().clone()
            tensors[f"{label}/{_WAITING}/seconds"] = views.seconds.clone()
        write_tensors(path, tensors, facts)


class _State:
    """What methods have learned behind the last portion: one file, replaced whole."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _STATE
        self.tensors: dict[str, Tensor] = {}
        self.done = 0
        if self.path.is_file():
            self.tensors, facts = read_tensors(self.path)
            self.done = int(facts["done"])

    def write(self, done: int, adapters: Mapping[str, Adapter]) -> None:
        tensors = {"done": torch.tensor([done])}
        for label, adapter in adapters.items():
            tensors |= {f"{label}/{name}": tensor.contiguous() for name, tensor in adapter.state().items()}
        write_tensors(self.path, tensors, {"done": done})
        self.done = done

    def restore(self, adapters: Mapping[str, Adapter]) -> None:
        for label, adapter in adapters.items():
            prefix = f"{label}/"
            state = {
                name.removeprefix(prefix): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(prefix)
            }
            adapter.load_state(state)


def _adapt(
    collectors: Mapping[str, Collector],
    images: Sequence[OpenedImage],
    encoded: EncodedStream | None,
    is_last: bool,
) -> _Portion:
    """Run all methods on one portion."""
    adapters = {label: collector.adapter for label, collector in collectors.items()}
    views = _encode(adapters, images, encoded)

    finite = torch.stack([part.finite.cpu() for part in views.values()]).all(0)
    good = finite.nonzero()[:, 0].tolist()
    refused = (~finite).nonzero()[:, 0].tolist()

    predictions = {}
    waiting = {}
    for label, collector in collectors.items():
        part = views[label] if not refused else views[label].rows(good)
        predictions[label] = collector.add(part)
        if is_last:
            predictions[label] += collector.close()
        if collector.adapter.granularity in ("batch", "dataset"):
            waiting[label] = part
    return _Portion(predictions, refused, waiting)


def _encode(
    adapters: Mapping[str, Adapter], opened: Sequence[OpenedImage], encoded: EncodedStream | None
) -> dict[str, EncodedViews]:
    """Return the views of every method; standard views are encoded once for all that share them."""
    shared: dict[tuple[object, ...], EncodedViews] = {}
    views = {}
    # The largest plan first: the others are its beginning.
    for label in sorted(adapters, key=lambda label: -adapters[label].plan.count):
        adapter = adapters[label]
        identity = _shared_by(label, adapters)
        standard = shared.get(identity)
        if standard is None and encoded is not None:
            standard = encoded.get(identity, opened)
        if standard is None:
            standard = adapter.encode_standard(opened)
            if encoded is not None:
                encoded.put(identity, opened, standard)
        shared[identity] = standard
        views[label] = adapter.encode(opened, standard.first(adapter.plan.count))
    return {label: views[label] for label in adapters}


def _shared_by(label: str, adapters: Mapping[str, Adapter]) -> tuple[object, ...]:
    """Return the identity of the views that a method takes.

    The image itself is view 0 of every plan, so a plan of 1 view takes it from the largest plan of the same tower.
    """
    adapter = adapters[label]
    identity = adapter.view_identity()
    if adapter.plan.count > 1:
        return identity

    tower = identity[2:]
    same_tower = [other for other in adapters.values() if other.view_identity()[2:] == tower]
    return max(same_tower, key=lambda other: other.plan.count).view_identity()


def _read(path: Path, facts: Mapping[str, Any], collectors: Mapping[str, Collector]) -> _Portion:
    """Return a portion that was written before; what still waits for its batch waits again."""
    tensors, metadata = read_tensors(path)
    if metadata != facts:
        raise CheckpointError(
            f"{path} holds results of other images or methods. Name another folder, or delete this one."
        )

    predictions = {}
    waiting = {}
    for label, collector in collectors.items():
        part = _predictions(tensors, label, collector.adapter.classnames)
        predictions[label] = [] if part is None else [part]

        embeddings = tensors.get(f"{label}/{_WAITING}/embeddings")
        if embeddings is not None:
            seconds = tensors[f"{label}/{_WAITING}/seconds"]
            views = EncodedViews(embeddings.to(collector.adapter.backbone.device), 0, (), seconds)
            collector.skip(views)
            waiting[label] = views

    return _Portion(predictions, tensors[_REFUSED].tolist(), waiting)


def _open_waiting(
    collectors: Mapping[str, Collector], opener: Callable[[int], OpenedImage], numbers: Sequence[int]
) -> None:
    """Make the pixels of images again that wait for their batch, for methods that run the image tower.

    Args:
        collectors: Those of a stream that goes on where it was.
        opener: Opens an image by its number.
        numbers: Of the images whose portions are read from files, in order.
    """
    for collector in collectors.values():
        adapter = collector.adapter
        count = min(collector.waiting, len(numbers))
        if count and adapter.needs_pixels:
            opened = [opener(number) for number in numbers[-count:]]
            collector.replace(adapter.encode(opened))


def _predictions(
    tensors: Mapping[str, Tensor], label: str, classnames: tuple[str, ...]
) -> Predictions | None:
    prefix = f"{label}/"
    parts = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Predictions.of_tensors(classnames, parts) if "probs" in parts else None


def _with_refused(
    parts: Sequence[Predictions], refused: list[int], adapter: Adapter, count: int
) -> Predictions:
    """Return the predictions with rows of NaN where images were refused."""
    if len(refused) == count:
        raise NonFiniteError(f"{adapter.method}: the embeddings of all {count} images are NaN or infinite.")
    predictions = Predictions.cat(parts)
    if not refused:
        return predictions

    good = torch.ones(count, dtype=torch.bool)
    good[refused] = False
    tensors = {}
    for name, tensor in predictions.tensors().items():
        fill: Any = float("nan") if tensor.is_floating_point() else False
        rows = torch.full((count, *tensor.shape[1:]), fill, dtype=tensor.dtype)
        rows[good] = tensor
        tensors[name] = rows
    return Predictions.of_tensors(predictions.classnames, tensors)


def _check(adapters: Mapping[str, Adapter], data: ImageDataset) -> None:
    if not len(data) or not adapters:
        raise DataError(f"{data.name}: nothing to adapt to, {len(data)} images and {len(adapters)} adapters.")

    for label, adapter in adapters.items():
        if adapter.classnames != data.classnames:
            raise DataError(
                f"{data.name} has other class names than the adapter {label!r}. Build it with "
                "classnames=data.classnames."
            )
