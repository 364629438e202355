"""What a run depends on: fingerprints of the data that it reads, and sentences for data that are missing.

With other images, labels, class names or templates a data set has another fingerprint, and a run that reads it is
another run. Images are not read for it: a file's size and modification time stand for its bytes.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.core.files import path_fingerprint
from vlprompt.core.paths import user_path
from vlprompt.data.base import ImageDataset
from vlprompt.data.captions import CAPTION_SOURCES, open_captions
from vlprompt.data.cards import card_path
from vlprompt.data.catalog import open_split
from vlprompt.data.names import DataName, parse_name
from vlprompt.data.segmentation.base import MaskDataset
from vlprompt.data.segmentation.catalog import open_pairs
from vlprompt.data.sources import AbsentError
from vlprompt.data.splits import SPLITS

__all__ = ["captions_fingerprint", "data_fingerprint", "missing_captions", "missing_data"]

Root = str | os.PathLike[str] | None


def data_fingerprint(name: str, root: Root = None) -> str:
    """Return a short string that changes when anything changes that a data set gives to a run.

    It covers all splits: sample names, labels, masks and phrases, the sizes and modification times of their files,
    class names and templates, and the card. Files that no split lists don't count.

    Args:
        name: A data set of classification or segmentation, as the catalogue names it, or ``coco:JSON:FOLDER``.
        root: Folder of downloaded data sets; ``default_root()`` if None.

    Returns:
        12 hex digits; empty for data that are drawn or come with the library; ``"absent"`` if it isn't there.

    Raises:
        UnknownNameError: For a name that the catalogue doesn't know.
        DataError: If there are files, but no split of them can be opened.
    """
    if name.startswith("coco:"):
        return _boxes_fingerprint(name)
    parsed = parse_name(name)
    if parsed.embedded:
        return ""

    digest = hashlib.sha256()
    if parsed.card is not None:
        digest.update(card_path(name).read_bytes())
    try:
        for split, content in _splits(parsed, root):
            digest.update(f"\x1d{split}".encode())
            facts = [content] if isinstance(content, str) else _facts(content)
            for fact in facts:
                digest.update(f"\n{fact}".encode("utf-8", "surrogatepass"))
    except AbsentError:
        return "absent"
    return digest.hexdigest()[:12]


def missing_data(name: str, root: Root = None) -> str | None:
    """Return why a data set can't be read and how to get it; None if it can.

    Args:
        name: See :func:`data_fingerprint`.
        root: See :func:`data_fingerprint`.

    Raises:
        UnknownNameError: For a name that the catalogue doesn't know.
    """
    if name.startswith("coco:"):
        absent = [path for path in _box_paths(name) if not path.exists()]
        return f"{name}: {' and '.join(str(path) for path in absent)} does not exist." if absent else None
    parsed = parse_name(name)
    if parsed.embedded:
        return None
    try:
        next(_splits(parsed, root))
    except DataError as error:
        return str(error)
    return None


def captions_fingerprint(name: str) -> str:
    """Return what :func:`data_fingerprint` does, for images with captions.

    Args:
        name: ``scenes:COUNT``, ``folder:PATH``, ``csv:PATH`` or ``tar:PATTERN``.

    Raises:
        UnknownNameError: For an unknown kind.
        DataError: If there are files, but they can't be read as captions.
    """
    if CAPTION_SOURCES.get(name.partition(":")[0]).extra.get("embedded"):
        return ""
    try:
        captions = open_captions(name)
    except AbsentError:
        return "absent"

    digest = hashlib.sha256(captions.identity().encode())
    for index in range(len(captions)):
        digest.update(f"\n{captions.stamp(index)}".encode())
    return digest.hexdigest()[:12]


def missing_captions(name: str) -> str | None:
    """Return why images with captions can't be read; None if they can. See :func:`captions_fingerprint`."""
    if CAPTION_SOURCES.get(name.partition(":")[0]).extra.get("embedded"):
        return None
    try:
        open_captions(name)
    except DataError as error:
        return str(error)
    return None


def _splits(name: DataName, root: Root) -> Iterator[tuple[str, ImageDataset | MaskDataset | str]]:
    """Yield every split with its data, or with the reason why it can't be opened.

    A data set may have no validation or no training part, so a split that can't be opened is no error by itself.

    Raises:
        AbsentError: If no split is there.
        DataError: If no split can be opened.
    """
    problems: dict[str, DataError] = {}
    for split in SPLITS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the same warnings come when the data are loaded
                data = _open(name, split, root)
        except DataError as error:
            problems[split] = error
        else:
            yield split, data

    if len(problems) == len(SPLITS):
        absent = [error for error in problems.values() if isinstance(error, AbsentError)]
        raise absent[0] if absent else problems[SPLITS[0]]
    for split, problem in problems.items():
        yield split, str(problem)


def _open(name: DataName, split: str, root: Root) -> ImageDataset | MaskDataset:
    if name.task == "segmentation":
        return open_pairs(name.text, split, root)
    return open_split(name.text, split, root)


def _facts(data: ImageDataset | MaskDataset) -> Iterator[str]:
    """Yield a line for the names of a split and one for each of its samples."""
    yield repr(data.classnames)
    if isinstance(data, MaskDataset):
        for pair in data.samples:
            images = data.reader.stamp(pair.source)
            masks = data.reader.mask_stamp(pair)
            yield f"{pair}\x1f{images}\x1f{masks}"
    else:
        yield repr(data.templates)
        for sample in data.samples:
            yield f"{sample}\x1f{data.reader.stamp(sample.source)}"


def _box_paths(name: str) -> list[Path]:
    """Return the file of annotations and the folder of images of ``coco:JSON:FOLDER``."""
    annotations, _, folder = name.removeprefix("coco:").partition(":")
    return [user_path(annotations), user_path(folder or user_path(annotations).parent)]


def _boxes_fingerprint(name: str) -> str:
    parts = [path_fingerprint(path) for path in _box_paths(name)]
    if "absent" in parts:
        return "absent"
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
