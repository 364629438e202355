"""folder:PATH: images in class folders.

Either ``PATH/<split>/<class>/...`` or ``PATH/<class>/...``. The structure says which: folders that hold the same class
folders and no images of their own are splits, and their names say which ones (``testing``, ``dev``, ``eval_set`` ...);
what can't be decided is an error. A missing ``val`` is a fifth of each class of ``train``; a folder without splits is
cut 60/20/20 per class by a hash of the images' paths. Class names are folder names with spaces for underscores; a file
``PATH/classnames.txt`` with lines ``folder = class name`` (or ``folder class name``) changes them.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlprompt.core.errors import DataError, UnknownNameError, nearest
from vlprompt.core.names import listed_names, printable
from vlprompt.core.pixels import check_value_range
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.decoding import MAX_PIXELS, Decoding
from vlprompt.data.images import EXTENSIONS, FileReader
from vlprompt.data.listing import LINKS, Links, list_folder, list_folders
from vlprompt.data.sources import AbsentError, Request, local_path, sources
from vlprompt.data.sources._names_file import read_names
from vlprompt.data.sources._structure import Top, find_splits, tops_of
from vlprompt.data.splits import cut_validation, cut_whole

__all__ = ["DEFAULT_TEMPLATES", "build", "check_max_pixels"]

DEFAULT_TEMPLATES = ("a photo of a {}.",)
_LAYOUTS = ("auto", "splits", "classes")
_Groups = dict[str, list[str]]  # class folder -> images


@dataclass(frozen=True)
class _Part:
    """One split as it is read.

    Attributes:
        origins: Class folders, by label.
        samples: Its samples.
        how: Where the split comes from, for the record.
        info: Further facts for the record.
    """

    origins: list[str]
    samples: tuple[Sample, ...]
    how: str
    info: dict[str, Any] = field(default_factory=dict)


@sources.register("folder", summary="your own class folders: folder:PATH", grammar="folder:PATH")
def build(
    request: Request,
    *,
    layout: Literal["auto", "splits", "classes"] = "auto",
    split_folders: Mapping[str, str] | None = None,
    extensions: Sequence[str] = EXTENSIONS,
    empty_class: Literal["error", "skip"] = "error",
    split_seed: int = 0,
    links: Links = "follow",
    max_pixels: int = MAX_PIXELS,
    value_range: Sequence[float] | None = None,
) -> ImageDataset:
    """Build one split of a folder.

    Args:
        request: ``argument`` is the folder.
        layout: Whether PATH holds splits or classes; ``"auto"`` looks at the structure, then at the names.
        split_folders: Which folder is which split, for example ``{"train": "2019", "test": "2020"}``.
        extensions: Endings that count as images.
        empty_class: What to do about a class folder without images.
        split_seed: Another cut of the same folder, where the folder holds no splits.
        links: Whether symbolic links are followed.
        max_pixels: Largest width x height of an image, up to 178,956,970.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        DataError: Says which folder or file is wrong, and what is expected.
    """
    for what, value, known in (
        ("layout of a folder", layout, _LAYOUTS),
        ("empty_class policy", empty_class, ("error", "skip")),
        ("links policy", links, LINKS),
    ):
        if value not in known:
            raise UnknownNameError(what, str(value), known)

    root = local_path(request)
    if not request.argument or not root.is_dir():
        raise AbsentError(
            f"{printable(request.name)}: there is no folder {printable(str(root))!r}. Write folder:PATH, with class "
            "folders in it."
        )

    content = _Content(request, root, _endings(extensions), empty_class, split_seed, links)
    folders = find_splits(root, content.tops, layout, split_folders)
    part = content.from_splits(folders) if folders else content.from_classes()
    content.warn_left_out(folders)

    limits = check_value_range(value_range, request.name)
    reader = FileReader(root, Decoding(check_max_pixels(max_pixels, request.name), limits))
    names = read_names(root, part.origins)
    info = {"source": "folder", "split_source": part.how, "origins": part.origins, **part.info}
    info["fewshot_key"] = f"folder:{root.resolve().name}"  # the same draw wherever the folder lies

    return ImageDataset(request.name, request.split, part.samples, names, DEFAULT_TEMPLATES, reader, info)


def check_max_pixels(max_pixels: int, where: str) -> int:
    """Return a limit on pixels. Raises DataError if it is above Pillow's own."""
    if not 1 <= max_pixels <= MAX_PIXELS:
        raise DataError(
            f"{where}: max_pixels must be 1 to {MAX_PIXELS:,} (Pillow's own limit); got {max_pixels!r}."
        )
    return max_pixels


def _endings(extensions: Sequence[str]) -> tuple[str, ...]:
    return tuple(e.lower() if e.startswith(".") else f".{e.lower()}" for e in extensions)


class _Content:
    """What lies in the folder, and how its splits are made of it."""

    def __init__(
        self,
        request: Request,
        root: Path,
        endings: tuple[str, ...],
        empty_class: str,
        seed: int,
        links: Links,
    ) -> None:
        self.request = request
        self.root = root
        self.endings = endings
        self.empty_class = empty_class
        self.seed = seed
        self.links: Links = links
        self.listing = list_folder(root, root, endings, links)
        self.tops = tops_of(self.listing.images, (f.name for f in list_folders(root, root, links)))

    def from_classes(self) -> _Part:
        """Return the part of a folder of classes."""
        groups = {name: [*top.loose, *_all_images(top)] for name, top in self.tops.items()}
        filled = self._without_empty(self.root, groups)
        self._refuse_wrapper(filled)
        origins = list(filled)
        labelled = dict(enumerate(filled.values()))

        if self.request.split == "all":
            return _Part(origins, _samples(labelled), "everything in the folder")

        parts = cut_whole(labelled, "folder", origins, self.seed, self.request.validation)
        how = "60/20/20" if self.request.validation else "80/20, without validation,"
        return _Part(origins, parts[self.request.split], f"cut {how} per class by path, seed {self.seed}")

    def from_splits(self, folders: Mapping[str, str]) -> _Part:
        """Return the part of a folder of splits."""
        groups_of = {split: self._classes_of(name) for split, name in folders.items()}
        self._refuse_inner_wrapper(folders, groups_of)
        origins = _origins(self.root, folders, groups_of)
        listing = f"folders {sorted(folders)}"
        split = self.request.split

        if split == "all":
            everything = {
                label: [image for groups in groups_of.values() for image in groups.get(name, [])]
                for label, name in enumerate(origins)
            }
            return _Part(origins, _samples(everything), f"everything in the {listing}")

        if "val" not in folders and "train" in folders and split in ("train", "val"):
            return self._cut_train(origins, groups_of["train"], listing)
        if split not in folders:
            raise DataError(
                f"{printable(self.request.name)}: there is no folder for the split {split!r}; found {sorted(folders)}."
            )

        labelled = {label: groups_of[split].get(name, []) for label, name in enumerate(origins)}
        return _Part(origins, _samples(labelled), listing)

    def warn_left_out(self, folders: Mapping[str, str]) -> None:
        """Name and count what is not read."""
        self.listing.warn(self.root)
        where = printable(str(self.root))

        directly = [image for image in self.listing.images if "/" not in image]
        if directly:
            _warn(f"{where}: {_counted(directly)} directly in it, in no class folder: left out.")

        if not folders:
            return
        beside = [top for name, top in self.tops.items() if name not in folders.values()]
        for top in beside:
            _warn(
                f"{where}: {printable(top.name)!r} ({top.count} images) beside {', '.join(folders.values())}: left out."
            )
        for name in folders.values():
            if loose := self.tops[name].loose:
                _warn(f"{where}: {_counted(loose)} directly in {name!r}, in no class folder: left out.")

    def _classes_of(self, name: str) -> _Groups:
        """Return the images of every class folder of a split, by the class folder's composed name."""
        base = self.root / name
        folders = [f.name for f in list_folders(base, self.root, self.links)]
        images = self.tops[name].classes
        groups = self._without_empty(base, {folder: images.get(folder, []) for folder in folders})

        # macOS decomposes accented letters in names: the same class may be spelled in two ways in two splits.
        composed: _Groups = {}
        for folder, paths in groups.items():
            composed.setdefault(unicodedata.normalize("NFC", folder), []).extend(paths)
        return composed

    def _without_empty(self, base: Path, groups: _Groups) -> _Groups:
        """Return the class folders that hold images; refuses or drops empty ones."""
        where = printable(str(base))
        if not any(groups.values()):
            prefix = base.relative_to(self.root).as_posix()
            loose = [i for i in self.listing.images if prefix == "." or i.startswith(f"{prefix}/")]
            missed = [entry.name for entry in self.listing.skipped if not entry.is_expected]
            hint = ""
            if loose:
                hint = f"{len(loose)} images lie directly in it; put them into one folder per class. "
            elif missed:
                hint = (
                    f"It holds {listed_names(missed, 3)}, which can't be read here: unpack archives first. "
                )
            raise DataError(
                f"{where}: no images in class folders ({len(groups)} folders). {hint}"
                f"Expected {base.name}/<class>/<image>, endings {' '.join(self.endings)}."
            )

        empty = [name for name, images in groups.items() if not images]
        if empty and self.empty_class == "error":
            if detection := _detection_layout(base, groups):
                raise DataError(f"{where}: {detection}")
            raise DataError(
                f"{where}: no images in the class folder{'s' * (len(empty) > 1)} {listed_names(empty)} (endings "
                f"{' '.join(self.endings)}). Fill or remove it, or pass empty_class='skip'."
            )
        if empty:
            _warn(f"{where}: class folders without images are left out: {listed_names(empty)}.")
        return {name: images for name, images in groups.items() if images}

    def _refuse_wrapper(self, filled: _Groups) -> None:
        """Refuse a folder whose only folder holds the data set."""
        if len(filled) != 1:
            return
        name = next(iter(filled))
        inner = self.tops[name].classes
        if len(inner) > 1 and not self.tops[name].loose:
            raise DataError(
                f"{printable(str(self.root))}: its only folder, {name!r}, would be the one class. It holds the folders "
                f"{listed_names(inner, 5)}: write {printable(self.request.name)}/{printable(name)}."
            )

    def _refuse_inner_wrapper(self, folders: Mapping[str, str], groups_of: Mapping[str, _Groups]) -> None:
        """Refuse splits whose only class folder holds the class folders, such as train/images/<class>."""
        names = {name for groups in groups_of.values() for name in groups}
        images = [image for groups in groups_of.values() for paths in groups.values() for image in paths]
        parts = [image.split("/") for image in images]
        inner = {part[2] for part in parts if len(part) > 3}
        if len(names) != 1 or len(inner) < 2 or not all(len(part) > 3 for part in parts):
            return
        name = names.pop()
        where = [f"{folder}/{name}" for folder in folders.values()]
        raise DataError(
            f"{printable(str(self.root))}: {listed_names(where)} can be read in two ways. As the one class {name!r}, "
            f"which is no data set. Or as splits with the classes {listed_names(sorted(inner), 5)}, one folder deeper: "
            f"move the folders of {name!r} up by one, or write a table of the images (csv:PATH)."
        )

    def _cut_train(self, origins: list[str], train: _Groups, listing: str) -> _Part:
        """Return train or val where there is no folder for val."""
        groups = {label: train[name] for label, name in enumerate(origins)}
        total = sum(map(len, groups.values()))
        parts = cut_validation(groups, "folder", origins, self.seed, self.request.validation)
        count = len(parts["val"])

        if self.request.split == "val" and not count:
            why = "every class has a single image" if self.request.validation else "validation=False"
            raise DataError(
                f"{printable(self.request.name)}: there is no folder for val, and none is cut from train: {why}. Train "
                "without validation: data.validate_on=none."
            )
        how = f"{listing}; val is 20 % of train per class, {count} of its {total} images, seed {self.seed}"
        if not self.request.validation:
            how = f"{listing}; train is whole"
        info = {"cut_for_validation": [count, total]} if count else {}
        return _Part(origins, parts[self.request.split], how, info)


def _origins(root: Path, folders: Mapping[str, str], groups_of: Mapping[str, _Groups]) -> list[str]:
    """Return the class folders by label: those of train, which no other split may exceed, or else of all splits."""
    if "train" not in folders:
        return sorted(
            {name for groups in groups_of.values() for name in groups},
            key=lambda name: name.encode("utf-8", "surrogatepass"),
        )

    origins = list(groups_of["train"])
    for split, groups in groups_of.items():
        strange = [name for name in groups if name not in groups_of["train"]]
        if strange:
            close = nearest(strange[0], origins, 1)
            hint = f" Is it {close[0]!r}?" if close else ""
            raise DataError(
                f"{printable(str(root / folders[split]))}: class folder {printable(strange[0])!r} has no images in "
                f"{printable(str(root / folders['train']))}.{hint}"
            )
    return origins


def _detection_layout(base: Path, groups: _Groups) -> str:
    """Return what is wrong with YOLO's layout, images beside labels in text files; empty if it is none."""
    names = {name.lower(): name for name in groups}
    if set(names) - {"images", "labels"} or not groups.get(names.get("images", "")):
        return ""
    labels = base / names.get("labels", "labels")
    if groups.get(labels.name) or not any(labels.rglob("*.txt")):
        return ""
    return (
        "the folders 'images' and 'labels' are YOLO's layout, with boxes in text files, and no class folders. To name "
        "whole images, put them into one folder per class; for boxes, convert the labels to COCO's JSON."
    )


def _all_images(top: Top) -> list[str]:
    return [image for images in top.classes.values() for image in images]


def _samples(groups: Mapping[int, Sequence[str]]) -> tuple[Sample, ...]:
    return tuple(Sample(image, label) for label, images in groups.items() for image in images)


def _counted(images: Sequence[str]) -> str:
    return f"{len(images)} image{'s lie' if len(images) > 1 else ' lies'}"


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=6)
