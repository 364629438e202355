"""Data sets of other libraries: a torch ``Dataset``, one of torchvision, one of Hugging Face, or a list of pairs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from vlprompt.core.errors import DataError
from vlprompt.core.names import check_classnames, clean_classname, listed_names
from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.data.inputs import image_inputs

__all__ = ["dataset_of", "is_foreign"]

log = logging.getLogger(__name__)

_TEMPLATES = ("a photo of a {}.",)
_IMAGE_KEYS = ("image", "img", "images", "pixel_values")
_LABEL_KEYS = ("label", "labels", "target", "class", "fine_label")
_LABEL_LISTS = ("targets", "labels", "_labels")  # of torchvision's data sets


@dataclass(frozen=True)
class _ObjectReader(Reader):
    """Reads item number ``source`` of a foreign data set.

    Attributes:
        data: The data set.
        image: Where the image is in an item: a position, or a key.
    """

    data: Any = field(repr=False)
    image: int | str

    def read(self, source: int) -> Image.Image:
        """Return the image as RGB."""
        value = _part(_item(self.data, source), self.image, source)
        if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:  # datasets.Image(decode=False)
            value = value["path"] if value["bytes"] is None else value["bytes"]

        try:
            (image,) = image_inputs([value])
        except ValueError as error:
            raise DataError(f"image {source}: {error}{_hint(self.data)}") from None
        return image.open()

    def key(self, source: int) -> str:
        """Return ``pixels:`` and the sha256 of size and pixels."""
        image = self.read(source)
        return f"pixels:{hashlib.sha256(str(image.size).encode() + image.tobytes()).hexdigest()}"

    def check(self, source: int) -> str:
        """See :meth:`Reader.check`."""
        try:
            self.read(source)
        except DataError as error:
            return str(error)
        return ""


def is_foreign(data: Any) -> bool:
    """Return whether something may be a data set of another library: it has items, and is no text or pixels."""
    if isinstance(data, (str, bytes, Mapping, torch.Tensor, np.ndarray, ImageDataset)):
        return False
    return hasattr(data, "__getitem__") or hasattr(data, "__iter__")


def dataset_of(
    data: Any,
    split: str = "train",
    *,
    classnames: Sequence[str] | None = None,
    fallback: Sequence[str] | None = None,
    templates: Sequence[str] = _TEMPLATES,
    image: str | None = None,
    label: str | None = None,
    name: str | None = None,
) -> ImageDataset:
    """Return a data set of another library as one of ours; one of ours stays as it is.

    Its items are ``(image, label)``, or mappings with an image and a label. Images are PIL images, pixels (bytes, or
    floats in [0, 1]), encoded bytes, files, or what ``datasets.Image(decode=False)`` gives. Labels are whole numbers
    from 0, or names.

    Args:
        data: Anything with a length and items: a torch ``Dataset``, one of torchvision, one of the package datasets, a
            list.
        split: What it is, for messages and records.
        classnames: C names, in the order of the numbers; None takes the data set's own (``classes``, or the names of
            its feature).
        fallback: C names for a data set that brings none.
        templates: Sentences with one ``{}``.
        image: The key of the image in an item; None finds it.
        label: The key of the label in an item; None finds it.
        name: For records; None is the name of its class.

    Raises:
        DataError: If it has no length, its items are something else, its labels are not among the names, or an image
            differs when it is read twice (it is augmented at random).
    """
    if isinstance(data, ImageDataset):
        return data

    title = name or type(data).__name__
    _check_length(data, title)
    image_place, label_place = _places(data, title, image, label)
    reader = _ObjectReader(data, image_place)
    _check_repeatable(reader, title)

    raw = _labels(data, label_place, title)
    own = _own_names(data, label_place)
    texts = [value for value in raw if isinstance(value, str)]
    if texts and len(texts) < len(raw):
        raise DataError(f"{title}: labels are all numbers or all names; this data set has both.")

    names = list(classnames) if classnames is not None else own
    names = list(fallback) if names is None and fallback is not None else names
    if texts:
        names = names or sorted(set(texts))
        labels = [_number_of(value, names, title, i) for i, value in enumerate(texts)]
    else:
        labels = [_whole_number(value, title, i) for i, value in enumerate(raw)]
        if names is None:
            raise DataError(
                f"{title} doesn't say what its classes are called. Pass classnames=[...], one name for each of the "
                f"labels 0 to {max(labels)}."
            )

    checked = check_classnames(
        tuple(clean_classname(str(text)) for text in names), title, [str(n) for n in names]
    )
    for i, number in enumerate(labels):
        if not 0 <= number < len(checked):
            raise DataError(
                f"{title}: item {i} has the label {number}; its {len(checked)} classes have the labels 0 to "
                f"{len(checked) - 1}."
            )

    samples = tuple(Sample(i, number) for i, number in enumerate(labels))
    return ImageDataset(title, split, samples, checked, tuple(templates), reader, {"source": "object"})


def _check_length(data: Any, title: str) -> None:
    """Refuse what can't be read at any place."""
    if isinstance(data, Path):
        data = str(data)
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DataError(
            f"{title} is no data set that can be read at any place: it needs a length and data[i]. Of a stream, make a "
            "list: list(data)."
        )
    if isinstance(data, str):
        raise DataError(
            f"a data set has items (image, label); got the text {data[:80]!r}. vlprompt.load_dataset(...) reads a data "
            "set by its name."
        )
    if isinstance(data, Mapping) and data:
        parts = listed_names([str(key) for key in data])
        raise DataError(
            f"a data set has items (image, label); got a {title} with {parts}. Pass one of its parts: "
            f"data[{next(iter(data))!r}]."
        )
    if isinstance(data, (bytes, Mapping, torch.Tensor, np.ndarray)):
        raise DataError(f"a data set has items (image, label); got {title}.")
    if not len(data):
        raise DataError(f"{title} is empty.")


def _places(data: Any, title: str, image: str | None, label: str | None) -> tuple[int | str, int | str]:
    """Return where image and label are in an item."""
    item = _item(data, 0)
    if isinstance(item, Mapping):
        return (
            _key(item, image, _IMAGE_KEYS, "image", title),
            _key(item, label, _LABEL_KEYS, "label", title),
        )

    for asked, what in ((image, "image"), (label, "label")):
        if asked is not None:
            raise DataError(f"{title}: items are no mappings, so there is no key {asked!r} of the {what}.")
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = (
            f"{type(item).__name__} of {len(item)}"
            if isinstance(item, (tuple, list))
            else type(item).__name__
        )
        raise DataError(f"{title}: an item is (image, label), or a mapping with both; item 0 is a {got}.")
    return 0, 1


def _key(item: Mapping[str, Any], asked: str | None, usual: tuple[str, ...], what: str, title: str) -> str:
    keys = ", ".join(map(str, item))
    if asked is not None:
        if asked not in item:
            raise DataError(f"{title}: items have no key {asked!r}; they have: {keys}.")
        return asked

    there = [key for key in usual if key in item]
    if len(there) > 1:
        raise DataError(
            f"{title}: the {what} may be {' or '.join(map(repr, there))}; say which: {what}={there[0]!r}."
        )
    if not there:
        raise DataError(f"{title}: which key is the {what}? Say {what}=KEY; items have: {keys}.")
    return there[0]


def _check_repeatable(reader: _ObjectReader, title: str) -> None:
    """Refuse random augmentation inside a data set: caches, and the same seed, rely on images that stay the same."""
    if reader.check(0):
        return  # it is counted with all others that can't be read
    if reader.key(0) != reader.key(0):
        raise DataError(
            f"{title}: item 0 differs when it is read twice, so the data set augments at random. Take its transform "
            "away (data.transform = None) and pass augmentation='crop_flip' to fit."
        )


def _labels(data: Any, place: int | str, title: str) -> list[Any]:
    """Return all labels, without opening images where the data set lists them."""
    listed = _listed_labels(data, place)
    if listed is not None and len(listed) == len(data):
        first = _part(_item(data, 0), place, 0)
        if _plain(listed[0]) == _plain(first):
            return [_plain(value) for value in listed]

    log.info("%s does not list its labels: all of its %d items are read for them", title, len(data))
    return [_plain(_part(_item(data, i), place, i)) for i in range(len(data))]


def _listed_labels(data: Any, place: int | str) -> list[Any] | None:
    """Return the labels that a known kind of data set lists; None where it lists none."""
    if isinstance(data, Subset):
        inner = _listed_labels(data.dataset, place)
        return None if inner is None else [inner[i] for i in data.indices]
    if isinstance(data, ConcatDataset):
        parts = [_listed_labels(part, place) for part in data.datasets]
        return (
            None
            if any(part is None for part in parts)
            else [x for part in parts if part is not None for x in part]
        )

    if isinstance(place, str):
        # A column of Hugging Face's table; other mappings by item have none.
        return list(data[place]) if place in (getattr(data, "column_names", None) or ()) else None
    if getattr(data, "target_transform", None) is not None:
        return None
    for attribute in _LABEL_LISTS:
        values = getattr(data, attribute, None)
        if isinstance(values, (list, tuple, np.ndarray, torch.Tensor)):
            return list(values)
    return None


def _own_names(data: Any, place: int | str) -> list[str] | None:
    """Return the class names that a data set brings, in the order of its numbers."""
    if isinstance(data, Subset):
        return _own_names(data.dataset, place)
    if isinstance(data, ConcatDataset):
        names = [_own_names(part, place) for part in data.datasets]
        return names[0] if all(part == names[0] for part in names) else None

    features = getattr(data, "features", None)
    if isinstance(place, str) and isinstance(features, Mapping):
        names_of_feature = getattr(features.get(place), "names", None)
        return None if names_of_feature is None else list(names_of_feature)

    classes = getattr(data, "classes", None)
    if not isinstance(classes, (list, tuple)) or not classes:
        return None
    # ImageNet's are tuples of synonyms, the first of which is the usual name.
    return [str(entry[0]) if isinstance(entry, (tuple, list)) else str(entry) for entry in classes]


def _item(data: Any, index: int) -> Any:
    try:
        return data[index]
    except Exception as error:  # foreign code raises what it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{type(data).__name__}: item {index} can't be read: {reason}") from error


def _part(item: Any, place: int | str, index: int) -> Any:
    try:
        return item[place]
    except (KeyError, IndexError, TypeError):
        raise DataError(f"item {index} has no {place!r}; the items before it have.") from None


def _plain(value: Any) -> Any:
    """Return a number of numpy or torch as one of Python; all else stays as it is."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value
    if isinstance(value, (np.generic, np.ndarray)):
        return value.item() if value.size == 1 else value
    return value


def _whole_number(value: Any, title: str, index: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(
            f"{title}: a label is a whole number or a name; item {index} has {type(value).__name__} "
            f"{str(value)[:60]!r}."
        )
    return value


def _number_of(text: str, names: Sequence[str], title: str, index: int) -> int:
    if text not in names:
        raise DataError(f"{title}: item {index} has the label {text!r}, which is none of the class names.")
    return list(names).index(text)


def _hint(data: Any) -> str:
    """Return what to do where a transform has made of images what is none any more."""
    has_transform = getattr(data, "transform", None) is not None
    return " Take its transform away: data.transform = None." if has_transform else ""
