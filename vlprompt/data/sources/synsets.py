"""synsets: ImageNet and its variants, class folders named by WordNet ids (or, in V2, by label).

Lists of a train and a test part of all class folders may be read from files that the user brings (ImageNet-R as
class-incremental learning uses it).

Differs from the reference code: there, the validation list is the test list, so choosing a model by it uses test
images. Here val is cut from train. The variants are for testing only and have no other split.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from vlprompt.core.errors import DataError
from vlprompt.core.pixels import check_value_range
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.checksums import checksum
from vlprompt.data.decoding import Decoding
from vlprompt.data.imagenet import synset_ids
from vlprompt.data.images import EXTENSIONS, FileReader
from vlprompt.data.listing import is_hidden
from vlprompt.data.sources import Request, read_text, sources
from vlprompt.data.sources._layout import Layout, Parts, absent, check_present, dataset_from, parse_options
from vlprompt.data.splits import cut, is_inside

__all__ = ["build", "read_image_list"]

# 24,000 lines take a second with the parser in C and ten without; both read plain data only.
_FastLoader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class _Options(Layout):
    """Source options of a card.

    Attributes:
        parts: Folder of each part below ``images``, ``""`` for that folder itself.
        numbered: Whether class folders are labels (``0`` ... ``999``) instead of WordNet ids.
        shares: Shares of the train folder that become val and train.
        lists: File of each part, beside ``images`` or below it, that lists images of the class folders in ``images``.
        lists_from: Where people get these files.
    """

    parts: dict[Literal["train", "test"], str] = Field(default_factory=dict)
    numbered: bool = False
    shares: dict[Literal["val", "train"], float] = Field(default_factory=dict)
    lists: dict[Literal["train", "test"], str] = Field(default_factory=dict)
    lists_from: str = ""

    @model_validator(mode="after")
    def _one_way(self) -> _Options:
        if bool(self.parts) == bool(self.lists):
            raise ValueError("give either parts, folders of images, or lists, files that list images")
        return self


@sources.register("synsets", summary="ImageNet and its variants: folders named by WordNet ids")
def build(request: Request, *, value_range: Sequence[float] | None = None) -> ImageDataset:
    """Build one split of a card's data set.

    Args:
        request: What is asked for.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        AbsentError: If it isn't there.
        DataError: If class folders are missing or empty.
    """
    card = request.need_card
    options = parse_options(request, _Options)
    if options.lists:
        return _listed(request, options, value_range)
    splits: list[str] = [*options.parts, *(["val"] if options.shares else [])]
    if request.split not in splits:
        raise DataError(
            f"{card.name} is for testing only: it has no split {request.split!r}, only {', '.join(splits)}."
        )

    part = options.parts["test" if request.split == "test" else "train"]
    root = _folder(request, options, part)
    ids = synset_ids(str(card.synsets))
    folders = [str(label) for label in range(len(ids))] if options.numbered else list(ids)
    groups = _listing(card.name, root, tuple(folders), os.stat(root).st_mtime_ns)
    whole = tuple(Sample(p, label) for label, images in enumerate(groups) for p in images)
    parts: Parts = {request.split: whole}  # the variants are used whole
    how = f"class folders of {part or options.images}"

    if options.shares and request.split != "test":
        parts = _cut(card.name, card.classnames, tuple(options.shares.items()), groups)
        how = f"{how}; {card.splits.otherwise}"

    reader = FileReader(root, Decoding(value_range=check_value_range(value_range, request.name)))
    return dataset_from(request, parts, card.classnames, how, reader)


def _listed(request: Request, options: _Options, value_range: Sequence[float] | None) -> ImageDataset:
    """Return a split whose images a file names.

    Raises:
        AbsentError: If the images aren't there.
        DataError: If the file is missing or damaged, or images that it names are missing; says where to get it.
    """
    card = request.need_card
    parts: Parts = dict.fromkeys(options.lists, ())
    root = _folder(request, options, "")
    how = ""
    if request.split in options.lists:
        name = options.lists[request.split]
        places = [folder / name for folder in (root, root.parent)]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise DataError(
                f"{card.name}: the images are in {root}, but the list {name} is not (looked for "
                f"{' and '.join(map(str, places))}). {options.lists_from}"
            )
        parts[request.split] = read_image_list(path, synset_ids(str(card.synsets)))
        check_present(card.name, name, root, parts)
        how = f"{name} sha256 {checksum(path, 'sha256').partition(':')[2]}"

    reader = FileReader(root, Decoding(value_range=check_value_range(value_range, request.name)))
    return dataset_from(request, parts, card.classnames, how, reader)


def read_image_list(path: Path, folders: Sequence[str]) -> tuple[Sample, ...]:
    """Read a list of images in class folders: YAML with ``data``, paths that end in ``FOLDER/FILE``, and ``targets``.

    What stands before the folder is the place on its author's disk and is not read. A label is the folder's; targets,
    if there are any, must be one number for each folder.

    Args:
        path: The file.
        folders: Class folders by label.

    Raises:
        DataError: If it is no such file; names the entry.
    """
    try:
        content = yaml.load(read_text(path), Loader=_FastLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(
            f"{path} is no list of images in YAML: {' '.join(str(error).split())[:200]}."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise DataError(f"{path} is no list of images: it needs 'data', a list of paths, and 'targets'.")

    targets = content.get("targets", [])
    if not isinstance(targets, list) or (targets and len(targets) != len(content["data"])):
        raise DataError(f"{path}: 'targets' must be a list as long as 'data' ({len(content['data'])}).")

    labels = {folder: label for label, folder in enumerate(folders)}
    target_of: dict[str, object] = {}
    seen: set[str] = set()
    samples = []
    for number, entry in enumerate(content["data"], 1):
        where = f"{path}, data entry {number}"
        source = "/".join(entry.replace("\\", "/").split("/")[-2:]) if isinstance(entry, str) else ""
        folder = source.partition("/")[0]
        if folder not in labels or not is_inside(source):
            raise DataError(
                f"{where}: expected a path that ends in CLASS_FOLDER/FILE, got {str(entry)[:80]!r}."
            )
        if source in seen:
            raise DataError(f"{where}: {source} is listed twice.")
        if targets and target_of.setdefault(folder, targets[number - 1]) != targets[number - 1]:
            raise DataError(
                f"{where}: its target is {targets[number - 1]!r}, and images of {folder} before it have "
                f"{target_of[folder]!r}."
            )
        seen.add(source)
        samples.append(Sample(source, labels[folder]))
    return tuple(samples)


def _folder(request: Request, options: _Options, part: str) -> Path:
    candidates = [Path(f) / options.images / part for f in options.folders]
    for candidate in candidates:
        if (request.root / candidate).is_dir():
            return request.root / candidate
    raise absent(request, [p.as_posix() for p in candidates])


@lru_cache(maxsize=8)
def _listing(name: str, root: Path, folders: tuple[str, ...], changed: int) -> tuple[tuple[str, ...], ...]:
    """Return the images of every class, sorted, as paths relative to ``root``.

    ImageNet has 1.3 million of them, so they are listed once per process and without a look at each.

    Raises:
        DataError: If class folders are missing or empty; names the first ones.
    """
    images_of = []
    for folder in folders:
        try:
            with os.scandir(root / folder) as entries:
                names = sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS))
        except FileNotFoundError:
            names = []
        images_of.append(tuple(f"{folder}/{n}" for n in names if not is_hidden(n)))

    bad = [f for f, images in zip(folders, images_of, strict=True) if not images]
    if bad:
        raise DataError(
            f"{name}: {len(bad)} of the {len(folders)} class folders in {root} are missing or empty, for example "
            f"{', '.join(bad[:5])}."
        )
    return tuple(images_of)


@lru_cache(maxsize=2)
def _cut(
    name: str,
    classnames: Sequence[str],
    shares: tuple[tuple[str, float], ...],
    groups: tuple[tuple[str, ...], ...],
) -> Parts:
    return cut(dict(enumerate(groups)), dict(shares), name, classnames)
