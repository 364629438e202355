"""folder:PATH: images in class folders.

Either ``PATH/<train|val|test>/<class>/...`` (``valid`` and ``validation`` mean ``val``; a missing ``val`` is
a fifth of each class of ``train``) or ``PATH/<class>/...``, which is cut 60/20/20 per class, at least one
image each, by a hash of the images' paths. Class names are folder names with spaces for underscores; a
file ``PATH/classnames.txt`` with lines ``folder = class name`` (or ``folder class name``) changes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.names import clean_classname
from vlprompt.core.paths import user_path
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.images import EXTENSIONS, FileReader
from vlprompt.data.listing import list_folders, list_images
from vlprompt.data.sources import AbsentError, Request, sources
from vlprompt.data.splits import cut, normal_split

__all__ = ["DEFAULT_TEMPLATES", "build"]

DEFAULT_TEMPLATES = ("a photo of a {}.",)
_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
_VAL_OF_TRAIN = {"val": 0.2, "train": 0.8}
_LAYOUTS = ("auto", "splits", "classes")
_Groups = dict[str, list[str]]  # class folder -> images


@dataclass(frozen=True)
class _Part:
    """One split as it is read.

    Attributes:
        origins: Class folders, by label.
        samples: Its samples.
        how: Where the split comes from, for the record.
    """

    origins: list[str]
    samples: tuple[Sample, ...]
    how: str


@sources.register("folder", summary="your own class folders: folder:PATH", grammar="folder:PATH")
def build(
    request: Request,
    *,
    layout: Literal["auto", "splits", "classes"] = "auto",
    extensions: Sequence[str] = EXTENSIONS,
    empty_class: Literal["error", "skip"] = "error",
    split_seed: int = 0,
) -> ImageDataset:
    """Build one split of a folder.

    Args:
        request: ``argument`` is the folder.
        layout: Whether PATH holds splits or classes; ``"auto"`` looks at the names of the folders.
        extensions: Endings that count as images.
        empty_class: What to do about a class folder without images.
        split_seed: Another cut of the same folder, where the folder holds no splits.

    Raises:
        DataError: Says which folder or file is wrong, and what is expected.
    """
    if layout not in _LAYOUTS:
        raise UnknownNameError("layout of a folder", str(layout), _LAYOUTS)
    if empty_class not in ("error", "skip"):
        raise UnknownNameError("empty_class policy", str(empty_class), ("error", "skip"))

    root = user_path(request.argument)
    if not request.argument or not root.is_dir():
        raise AbsentError(
            f"{request.name}: there is no folder {str(root)!r}. Write folder:PATH, with class folders in it."
        )

    endings = tuple(e.lower() if e.startswith(".") else f".{e.lower()}" for e in extensions)
    split_folders = _split_folders(root, layout)
    if split_folders:
        part = _from_splits(request, root, split_folders, endings, empty_class, split_seed)
    else:
        listing = _listing(root, root, list_folders(root, root), endings, empty_class)
        part = _cut_classes(request, listing, split_seed)

    names = _classnames(root, part.origins)
    info = {"source": "folder", "split_source": part.how, "origins": part.origins}
    info["fewshot_key"] = f"folder:{root.resolve().name}"  # the same draw wherever the folder lies

    return ImageDataset(
        request.name, request.split, part.samples, names, DEFAULT_TEMPLATES, FileReader(root), info
    )


def _split_folders(root: Path, layout: str) -> dict[str, Path]:
    """Return the folder of each split, empty if the folder holds classes."""
    if layout == "classes":
        return {}

    folder_of: dict[str, Path] = {}
    others = []
    for folder in list_folders(root, root):
        split = normal_split(folder.name)
        if split is None:
            others.append(folder.name)
        elif split in folder_of:
            raise DataError(
                f"{root}: both {folder_of[split].name!r} and {folder.name!r} mean the split {split!r}. Keep one."
            )
        else:
            folder_of[split] = folder

    holds_classes = "train" in folder_of and bool(list_folders(folder_of["train"], root))
    if layout == "auto" and not (holds_classes and (len(folder_of) > 1 or not others)):
        return {}
    if "train" not in folder_of:
        raise DataError(
            f"{root}: layout='splits' needs a folder 'train'; found {sorted(folder_of) + others or 'none'}."
        )

    if others:
        warnings.warn(f"{root}: {', '.join(others)} beside {', '.join(folder_of)}: ignored.", stacklevel=5)

    return folder_of


def _listing(
    base: Path, root: Path, folders: list[Path], endings: Sequence[str], empty_class: str
) -> _Groups:
    """Return the images of every class folder; refuses or drops empty ones."""
    groups = {f.relative_to(base).as_posix(): list_images(f, root, endings) for f in folders}
    if not any(groups.values()):
        loose = len(list_images(base, root, endings))
        hint = f"{loose} images lie directly in it; put them into one folder per class. " if loose else ""
        raise DataError(
            f"{base}: no images in class folders ({len(folders)} folders). {hint}"
            f"Expected {base.name}/<class>/<image>, endings {' '.join(endings)}."
        )

    empty = [name for name, images in groups.items() if not images]
    if empty:
        examples = ", ".join(repr(e) for e in empty[:10])
        if empty_class == "error":
            raise DataError(
                f"{base}: no images in the class folder{'s' * (len(empty) > 1)} {examples} (endings "
                f"{' '.join(endings)}). Fill or remove it, or pass empty_class='skip'."
            )
        warnings.warn(f"{base}: class folders without images are left out: {examples}.", stacklevel=5)

    return {name: images for name, images in groups.items() if images}


def _cut_classes(request: Request, listing: _Groups, seed: int) -> _Part:
    origins = list(listing)
    groups = {label: listing[name] for label, name in enumerate(origins)}
    parts = cut(groups, _SHARES, "folder", origins, seed)
    return _Part(origins, parts[request.split], f"cut 60/20/20 per class by path, seed {seed}")


def _from_splits(
    request: Request,
    root: Path,
    split_folders: dict[str, Path],
    endings: Sequence[str],
    empty_class: str,
    seed: int,
) -> _Part:
    train_folder = split_folders["train"]
    train = _listing(train_folder, root, list_folders(train_folder, root), endings, empty_class)
    origins = list(train)
    groups = {label: train[name] for label, name in enumerate(origins)}

    if "val" not in split_folders and request.split in ("train", "val"):
        parts = cut(groups, _VAL_OF_TRAIN, "folder", origins, seed)
        how = f"folders {sorted(split_folders)}; val is 20 % of train per class, seed {seed}"
        return _Part(origins, parts[request.split], how)

    if request.split not in split_folders:
        raise DataError(
            f"{request.name}: there is no folder for the split {request.split!r}; found {sorted(split_folders)}."
        )

    if request.split != "train":
        base = split_folders[request.split]
        listing = _listing(base, root, list_folders(base, root), endings, empty_class)
        strange = sorted(set(listing) - set(origins))
        if strange:
            raise DataError(f"{base}: class folder {strange[0]!r} has no images in {split_folders['train']}.")
        groups = {label: listing.get(name, []) for label, name in enumerate(origins)}

    samples = tuple(Sample(image, label) for label in groups for image in groups[label])
    return _Part(origins, samples, f"folders {sorted(split_folders)}")


def _classnames(root: Path, origins: list[str]) -> tuple[str, ...]:
    """Return class names: those of ``classnames.txt`` where it has them, else cleaned folder names."""
    names = {origin: clean_classname(origin) for origin in origins}
    path = root / "classnames.txt"
    if not path.is_file():
        return tuple(names.values())

    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fits = [
            o for o in origins if line.startswith(o) and line[len(o) : len(o) + 1] in ("", " ", "\t", "=")
        ]
        if not fits:
            raise DataError(
                f"{path}, line {number}: no class folder begins {line!r}; folders: {', '.join(origins[:20])}."
            )
        folder = max(fits, key=len)
        names[folder] = clean_classname(line[len(folder) :].strip().removeprefix("="))

    return tuple(names.values())
