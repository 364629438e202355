"""tar:PATTERN: archives as webdataset writes them, read where they lie: nothing is unpacked, no image is copied.

``KEY.jpg`` (or another image) beside ``KEY.cls`` (a number from 0, or a class name) or ``KEY.json``. Archives whose
names, or whose folders' names, say train, val or test are these splits; without any such name each class is cut
60/20/20 by a hash of the members' names, as in tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.names import clean_classname, printable
from vlprompt.core.pixels import check_value_range
from vlprompt.data.archives import find_archives
from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.data.decoding import (
    DEFAULT_DECODING,
    MAX_PIXELS,
    Decoding,
    UndecodableError,
    decode,
    walk_bytes,
)
from vlprompt.data.images import file_key, file_stamp
from vlprompt.data.sources import Request, read_text, sources
from vlprompt.data.sources._packed_labels import LISTS, LabelledImage, Shard, listed_names_of, read_shard
from vlprompt.data.sources.folder import DEFAULT_TEMPLATES, check_max_pixels
from vlprompt.data.splits import SPLITS, cut_validation, cut_whole, normal_split
from vlprompt.data.webdataset import LeftOut, PackedImage

__all__ = ["TarReader", "build"]

_WORDS = re.compile(r"[-_ ]+|(?<=[a-z])(?=\d)", re.I)


@dataclass(frozen=True)
class TarReader(Reader):
    """Reads images from archives, each at its place.

    Attributes:
        decoding: See :func:`vlprompt.data.decoding.read_image`.
    """

    decoding: Decoding = DEFAULT_DECODING
    _verdicts: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict, compare=False, repr=False)

    def read(self, source: PackedImage) -> Image.Image:
        """Return the image as RGB."""
        return decode(source.read(), str(source), self.decoding)

    def with_jpeg_side(self, side: int) -> TarReader:
        """See :meth:`Reader.with_jpeg_side`."""
        return replace(self, decoding=replace(self.decoding, jpeg_side=side))

    def check(self, source: PackedImage) -> str:
        """Return why an image can't be decoded, empty if it can."""
        return self._verdict(source)[0]

    def note(self, source: PackedImage) -> str:
        """See :meth:`Reader.note`."""
        return self._verdict(source)[1]

    def key(self, source: PackedImage) -> str:
        """Return ``file:`` and the sha256 of the image's bytes, as if it lay unpacked."""
        return file_key(source.read(), self.decoding)

    def stamp(self, source: PackedImage) -> str:
        """See :meth:`Reader.stamp`: the archive's, and the name inside it."""
        return f"{file_stamp(source.archive.path)}@{source.name}"

    def _verdict(self, source: PackedImage) -> tuple[str, str]:
        """Return why an image can't be decoded, empty if it can, and what decoding changes; remembered."""
        key = (str(source.archive.path), self.stamp(source))
        if key not in self._verdicts:
            try:
                note = walk_bytes(source.read(), source.name, self.decoding)
                self._verdicts[key] = "", note
            except UndecodableError as error:
                self._verdicts[key] = error.reason, ""
        return self._verdicts[key]


@dataclass(frozen=True)
class _Classes:
    """What the data call their classes, by label.

    Attributes:
        origins: Names, or numbers where there are no names.
        named: Whether they are names.
        label_of: Name to label, where labels are names.
    """

    origins: list[str]
    named: bool
    label_of: dict[str, int]

    def label(self, image: LabelledImage) -> int:
        """Return an image's label."""
        return self.label_of[str(image.name)] if image.number is None else image.number


@sources.register(
    "tar",
    summary="webdataset archives, KEY.jpg beside KEY.cls or KEY.json: tar:PATTERN",
    grammar="tar:PATTERN",
)
def build(
    request: Request,
    *,
    label_key: str | None = None,
    splits: Literal["auto", "cut"] = "auto",
    split_seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    value_range: Sequence[float] | None = None,
) -> ImageDataset:
    """Build one split of the archives.

    Args:
        request: ``argument`` is a path, a pattern such as ``shards/*.tar`` or ``shards/{000..012}.tar``, or ``file:``
            and a path. An archive that is compressed by gzip, bzip2 or xz is unpacked into a temporary file.
        label_key: The key of the label in JSON files; None takes label, cls, class or target, if one of them is there.
        splits: ``"cut"`` cuts each class, whatever the archives are called.
        split_seed: Another cut.
        max_pixels: Largest width x height of an image, up to 178,956,970.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        AbsentError: If no archive matches.
        DataError: If an archive is damaged, labels contradict each other, or there is no labelled image; says where.
        UnknownNameError: If the archives' names say splits, and this one is not among them.
    """
    if splits not in ("auto", "cut"):
        raise UnknownNameError("splits", str(splits), ("auto", "cut"))
    title = printable(request.name)
    paths = find_archives(request.argument, title)
    shards = [read_shard(str(path), file_stamp(path), label_key) for path in paths]
    classes = _classes(title, shards)

    left_out = LeftOut()
    for shard in shards:
        left_out.merge(shard.left_out)
    left_out.warn(title, stacklevel=6)

    samples, how = _samples(request, shards, classes, splits == "cut", split_seed)
    info: dict[str, Any] = {
        "source": "tar",
        "archives": len(shards),
        "split_source": how,
        "origins": classes.origins,
        "fewshot_key": "tar",
        "unnamed": not classes.named,
    }
    if left_out.counts:
        info["left_out"] = dict(left_out.counts)

    limits = check_value_range(value_range, request.name)
    reader = TarReader(Decoding(check_max_pixels(max_pixels, request.name), limits))
    names = tuple(map(clean_classname, classes.origins))
    return ImageDataset(request.name, request.split, samples, names, DEFAULT_TEMPLATES, reader, info)


def _classes(title: str, shards: Sequence[Shard]) -> _Classes:
    """Return what the classes are called.

    Raises:
        DataError: If there is no labelled image, some labels are numbers and others names, or numbers and names don't
            fit together.
    """
    images = [image for shard in shards for image in shard.images]
    if not images:
        reasons = [f"{count} {reason}" for shard in shards for reason, count in shard.left_out.counts.items()]
        raise DataError(f"{title}: there is no image with a label. {'; '.join(reasons[:3])}".rstrip())

    listed = _common_list(title, shards)
    numbered = [image for image in images if image.number is not None]
    if not numbered:
        origins = list(listed) if listed else sorted({str(image.name) for image in images})
        label_of = {name: label for label, name in enumerate(origins)}
        strange = next((image for image in images if str(image.name) not in label_of), None)
        if strange is not None:
            raise DataError(
                f"{title}: {strange.image} has the label {strange.name!r}, which the list of class names lacks."
            )
        return _Classes(origins, True, label_of)

    if len(numbered) < len(images):
        other = next(image for image in images if image.number is None)
        raise DataError(
            f"{title}: labels are all numbers or all names; {numbered[0].image} has {numbered[0].number}, "
            f"{other.image} {other.name!r}."
        )
    count = max(image.number for image in numbered if image.number is not None) + 1
    names = _names_of_numbers(title, numbered)
    if listed is None:
        named = len(names) == count
        return _Classes([names.get(c, str(c)) if named else str(c) for c in range(count)], named, {})

    if len(listed) < count:
        raise DataError(f"{title}: the list has {len(listed)} class names, but labels go up to {count - 1}.")
    wrong = [number for number, name in names.items() if listed[number] != name]
    if wrong:
        raise DataError(
            f"{title}: class {wrong[0]} is {listed[wrong[0]]!r} in the list and {names[wrong[0]]!r} in labels."
        )
    return _Classes(list(listed), True, {})


def _common_list(title: str, shards: Sequence[Shard]) -> tuple[str, ...] | None:
    """Return the list of class names, inside archives or beside them; all that there are must agree."""
    lists = {str(shard.path): shard.classnames for shard in shards if shard.classnames is not None}
    for folder in dict.fromkeys(shard.path.parent for shard in shards):
        for path in (folder / name for name in LISTS):
            if path.is_file():
                lists[str(path)] = listed_names_of(read_text(path), printable(str(path)))

    places = list(lists)
    for place in places[1:]:
        if lists[place] != lists[places[0]]:
            raise DataError(f"{title}: {places[0]} and {place} hold different lists of class names.")
    return lists[places[0]] if places else None


def _names_of_numbers(title: str, images: Sequence[LabelledImage]) -> dict[int, str]:
    """Return number to name, where labels have both."""
    names: dict[int, str] = {}
    for image in images:
        if image.number is None or image.name is None:
            continue
        if names.setdefault(image.number, image.name) != image.name:
            raise DataError(
                f"{title}: class {image.number} is {image.name!r} at {image.image} and {names[image.number]!r} before."
            )
    return names


def _samples(
    request: Request, shards: Sequence[Shard], classes: _Classes, cut: bool, seed: int
) -> tuple[tuple[Sample, ...], str]:
    """Return the samples of a split, and where it comes from."""
    if request.split == "all":
        return _listed(shards, classes), "everything in the archives"

    by_split = {} if cut else _by_split(request, shards)
    if not by_split:
        parts = cut_whole(_grouped(shards, classes), "tar", classes.origins, seed, request.validation)
        how = "60/20/20" if request.validation else "80/20, without validation,"
        return _found(shards, parts[request.split]), f"cut {how} per class by name, seed {seed}"

    if request.split in by_split and (request.split != "train" or "val" in by_split):
        return _listed(by_split[request.split], classes), "names of the archives"
    if request.split == "test" or "train" not in by_split:
        raise UnknownNameError(
            f"split of {printable(request.name)}",
            request.split,
            by_split,
            "The archives' names say these splits; splits='cut' cuts all of them, and the split 'all' is everything.",
        )
    train = by_split["train"]
    parts = cut_validation(_grouped(train, classes), "tar", classes.origins, seed, request.validation)
    how = f"names of the archives; val is 20 % of train per class, seed {seed}"
    return _found(train, parts[request.split]), how


def _by_split(request: Request, shards: Sequence[Shard]) -> dict[str, list[Shard]]:
    """Return the archives of each split that their names say; none if no name says one.

    Raises:
        DataError: If a name says two splits, or only some names say one.
    """
    by_split: dict[str, list[Shard]] = {}
    without: list[Path] = []
    for shard in shards:
        meant = _splits_of(shard.path)
        if len(meant) > 1:
            raise DataError(
                f"{printable(request.name)}: the name of {shard.path.name} says {' and '.join(sorted(meant))}. Rename "
                "it, or pass splits='cut'."
            )
        if meant:
            by_split.setdefault(meant.pop(), []).append(shard)
        else:
            without.append(shard.path)

    if by_split and without:
        split, (named, *_) = next(iter(by_split.items()))
        raise DataError(
            f"{printable(request.name)}: the name of {named.path.name} says {split}, that of {without[0].name} says no "
            f"split. Rename it ({', '.join(SPLITS)}), or pass splits='cut'."
        )
    return by_split


def _splits_of(path: Path) -> set[str]:
    """Return the splits that words of an archive's name say; without any, the one that its folder is called."""
    words = _WORDS.split(path.name.partition(".")[0])
    meant = {split for word in words if (split := normal_split(word)) is not None}
    folder = normal_split(path.absolute().parent.name)
    return meant or ({folder} if folder is not None else set())


def _listed(shards: Sequence[Shard], classes: _Classes) -> tuple[Sample, ...]:
    return tuple(Sample(image.image, classes.label(image)) for shard in shards for image in shard.images)


def _grouped(shards: Sequence[Shard], classes: _Classes) -> dict[int, list[str]]:
    """Return the places of a class's images, by label."""
    groups: dict[int, list[str]] = {}
    for shard in shards:
        for image in shard.images:
            groups.setdefault(classes.label(image), []).append(_place(shard, image))
    return groups


def _found(shards: Sequence[Shard], part: Sequence[Sample]) -> tuple[Sample, ...]:
    """Return the samples of a part with their images instead of their places."""
    images = {_place(shard, image): image.image for shard in shards for image in shard.images}
    return tuple(Sample(images[sample.source], sample.label) for sample in part)


def _place(shard: Shard, image: LabelledImage) -> str:
    """Return what an image is ranked by in a cut: two archives of one name lie in two folders."""
    return f"{shard.path.parent.name}/{image.image}"
