"""What the folders below a folder are: splits of the same classes, or classes. Their structure decides, then names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.names import listed_names, printable
from vlprompt.data.splits import SPLITS, normal_split

__all__ = ["Top", "find_splits", "tops_of"]


@dataclass
class Top:
    """A folder directly below the data set's.

    Attributes:
        name: Its name.
        loose: Images that lie directly in it.
        classes: Images of each folder in it, at any depth; only folders that hold some.
    """

    name: str
    loose: list[str] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Images in it, at any depth."""
        return len(self.loose) + sum(map(len, self.classes.values()))


def tops_of(images: Iterable[str], names: Iterable[str]) -> dict[str, Top]:
    """Return the folders of these names with the images below them.

    Args:
        images: Paths relative to the data set's folder, with ``/``.
        names: All folders directly below it, also those without images.
    """
    tops = {name: Top(name) for name in names}
    for image in images:
        first, *rest = image.split("/")
        if not rest or first not in tops:
            continue
        if len(rest) == 1:
            tops[first].loose.append(image)
        else:
            tops[first].classes.setdefault(rest[0], []).append(image)
    return tops


def find_splits(
    root: Path, tops: Mapping[str, Top], layout: str, split_folders: Mapping[str, str] | None
) -> dict[str, str]:
    """Return split to the folder that holds it, empty if the folders are classes.

    Args:
        root: For messages.
        tops: See :func:`tops_of`.
        layout: ``"splits"``, ``"classes"``, or ``"auto"``: the structure decides, then the names.
        split_folders: What the user says: split to folder.

    Raises:
        DataError: If it can't be decided; names both readings and the option that decides.
    """
    where = printable(str(root))
    if split_folders:
        return _said(where, tops, split_folders)
    if layout == "classes":
        return {}

    named = {name: split for name in tops if (split := normal_split(name)) is not None}
    if layout == "auto" and not _are_splits(where, tops, named):
        return {}
    if not named:
        raise DataError(
            f"{where}: layout='splits', but no folder is called train, val or test; found {listed_names(tops)}. Say "
            f"which is which, for example split_folders={_example(tops)}."
        )

    folder_of: dict[str, str] = {}
    for name, split in named.items():
        if split in folder_of:
            raise DataError(
                f"{where}: both {folder_of[split]!r} and {name!r} mean the split {split!r}. Keep one, or say which is "
                f"which, for example split_folders={_example((folder_of[split], name))}."
            )
        folder_of[split] = name
    return folder_of


def _said(where: str, tops: Mapping[str, Top], split_folders: Mapping[str, str]) -> dict[str, str]:
    """Check what the user says."""
    for split, name in split_folders.items():
        if split not in SPLITS:
            raise UnknownNameError(f"split in split_folders of {where}", str(split), SPLITS)
        if name not in tops:
            raise UnknownNameError(f"folder in split_folders of {where}", str(name), tops)
    if len(set(split_folders.values())) < len(split_folders):
        raise DataError(f"{where}: split_folders names one folder for two splits: {dict(split_folders)}.")
    return dict(split_folders)


def _are_splits(where: str, tops: Mapping[str, Top], named: Mapping[str, str]) -> bool:
    """Return whether the folders are splits."""
    filled = [top for top in tops.values() if top.count]
    deep = [top for top in filled if top.name in named and top.classes]
    others = [top for top in filled if top.name not in named]

    if not named:
        if _hold_the_same(filled):
            raise _two_readings(where, filled, f"split_folders={_example(tops)}")
        return False

    if not deep:
        flat = [top for top in filled if top.name in named]
        if flat and not others:
            names = listed_names(top.name for top in flat)
            raise DataError(
                f"{where}: {names} hold images, but no class folders. If they are classes, pass layout='classes'; if "
                f"they are splits, put the images of each into class folders, {flat[0].name}/<class>/<image>."
            )
        return False

    classes = set().union(*(top.classes for top in deep))
    relatives = [top for top in others if top.classes.keys() & classes]
    if relatives:
        raise _two_readings(
            where, [*deep, *relatives], f"split_folders={_example([*named, *(t.name for t in relatives)])}"
        )

    if others and not _share_classes(deep):
        raise _two_readings(where, [*deep, *others], "layout='splits'")
    return True


def _hold_the_same(tops: list[Top]) -> bool:
    """Return whether all folders hold class folders that another one holds too, and no images of their own."""
    if len(tops) < 2 or any(top.loose for top in tops):
        return False
    if len(set().union(*(top.classes for top in tops))) < 2:
        return False  # one class would be no data set: cat/images beside dog/images
    return all(
        any(top.classes.keys() & other.classes.keys() for other in tops if other is not top) for top in tops
    )


def _share_classes(tops: list[Top]) -> bool:
    return any(
        first.classes.keys() & second.classes.keys()
        for position, first in enumerate(tops)
        for second in tops[position + 1 :]
    )


def _two_readings(where: str, tops: list[Top], option: str) -> DataError:
    inner = sorted(set().union(*(top.classes for top in tops)))
    names = listed_names(top.name for top in tops)
    return DataError(
        f"{where}: the folders {names} can be read in two ways. As splits, with the classes {listed_names(inner, 5)}: "
        f"pass {option}. Or as classes of these names, with all images below them: pass layout='classes'."
    )


def _example(names: Iterable[str]) -> str:
    """Return what ``split_folders`` could be, with folders that are there."""
    listed = list(names)
    guess = {split: name for name in listed if (split := normal_split(name)) is not None}
    for name in listed:
        free = [split for split in ("train", "test", "val") if split not in guess]
        if name not in guess.values() and free:
            guess[free[0]] = name
    return str(guess)
