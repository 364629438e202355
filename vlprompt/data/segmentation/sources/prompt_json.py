"""prompts: images/, masks/ and one JSON file of phrases per split, the format of MedVLSM and TuneVLSeg.

A file holds a list of records; of each, ``img_name``, ``mask_name`` and ``prompts`` are read. ``prompts`` maps ``p0``
(empty: no text), ``p1`` (the class) and ``p2`` ... (richer, made from the true mask) to a phrase or a list of
equivalent ones. A record may name its class in ``class``.

Reference: naamiinepal/medvlsm DATASETS.MD and its annotation files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.files import is_regular_file
from vlprompt.core.names import clean_classname
from vlprompt.data.segmentation.base import MaskDataset, MaskSample
from vlprompt.data.segmentation.reading import MaskFiles, MaskRule, SizePolicy
from vlprompt.data.segmentation.sources import pair_sources
from vlprompt.data.segmentation.sources._common import Missing, choose, own_folder, refuse_missing
from vlprompt.data.sources import AbsentError, Request
from vlprompt.data.sources._layout import Layout, find_folder, parse_options
from vlprompt.data.splits import is_inside

__all__ = ["PromptOptions", "build"]

_EXPECTED = "images/, masks/ and anns/train.json, val.json, test.json"
Split = Literal["train", "val", "test"]


class PromptOptions(Layout):
    """Source options of a card.

    Attributes:
        masks: The mask folder, beside ``images``.
        anns: Where a split's records lie, with ``{}`` for the split.
        inner: Folder inside ``images`` and ``masks`` of each split, if splits have their own: file names may repeat.
        threshold: See :class:`MaskRule`.
    """

    images: str = "images"
    masks: str = "masks"
    anns: str = "anns/{}.json"
    inner: dict[Split, str] = Field(default_factory=dict)
    threshold: float | None = None


@pair_sources.register(
    "prompts", summary="images, masks and a JSON of phrases per split", grammar="prompts:PATH"
)
def build(
    request: Request,
    *,
    prompt: int = 1,
    threshold: float | None = None,
    on_missing: Missing = "error",
    on_size_mismatch: SizePolicy = "error",
) -> MaskDataset:
    """Build one split.

    Args:
        request: What is asked for.
        prompt: Which phrase of a record: its number, or -1 for any but p0, drawn by the record's name. Those from 2 on
            say where and how large the mask is, so they measure something else.
        threshold: See :class:`MaskRule`; the card's if None.
        on_missing: What to do about records whose files aren't there.
        on_size_mismatch: What to do where a mask isn't its image's size.

    Raises:
        AbsentError: If the folder or the records aren't there.
        DataError: If records are damaged; says which.
    """
    if request.card is None:
        options = PromptOptions(folders=("",))
        folder = own_folder(request, _EXPECTED)
    else:
        options = parse_options(request, PromptOptions)
        folder = find_folder(request, options)

    path = folder / options.anns.format(request.split)
    if not path.is_file():
        raise AbsentError(f"{request.name}: the records {path} are missing (expected {_EXPECTED}).")

    records = _records(path)
    classnames = tuple(request.card.classnames) if request.card else _classes(records)
    inner = options.inner.get(_split(request.split), "")
    samples = [_sample(path, i, r, inner, prompt, classnames) for i, r in enumerate(records)]
    files = MaskFiles(
        folder / options.images,
        folder / options.masks,
        MaskRule(options.threshold if threshold is None else threshold),
        on_size_mismatch,
    )
    present = _present(request.name, samples, files, on_missing)
    info = {
        "source": "prompts",
        "split_source": path.name,
        "prompt": prompt,
        "oracle_text": prompt not in (0, 1),
    }

    return MaskDataset(request.name, request.split, present, classnames, files, info)


def _split(split: str) -> Split:
    return "train" if split == "train" else "val" if split == "val" else "test"


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise DataError(f"{path} is no valid JSON: it is nested too deeply.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no valid JSON: {error}.") from None
    if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
        raise DataError(f"{path}: expected a list of records.")
    return content


def _classes(records: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(sorted({clean_classname(str(r.get("class", "object"))) for r in records})) or ("object",)


def _sample(
    path: Path, index: int, record: dict[str, Any], inner: str, prompt: int, classnames: tuple[str, ...]
) -> MaskSample:
    where = f"{path}, record {index + 1}"
    try:
        image = str(record["img_name"])
        mask = str(record["mask_name"])
        prompts = dict(record["prompts"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where}: needs img_name, mask_name and prompts.") from None

    if not (is_inside(image) and is_inside(mask)):
        raise DataError(f"{where}: {image!r} or {mask!r} leaves the folder.")

    source, mask_source = (f"{inner}/{name}" if inner else name for name in (image, mask))
    name = f"{source}|{mask_source}"
    label = _label(where, record, prompts, classnames)

    return MaskSample(source, (mask_source,), _phrase(where, prompts, prompt, name), label, name)


def _phrase(where: str, prompts: dict[str, Any], prompt: int, name: str) -> str:
    """Return the record's phrase of a number; of several equivalent ones, one drawn by the record's name."""
    if prompt == -1:
        richer = [k for k in prompts if k != "p0"]
        key = choose(richer, name, "which prompt") if richer else "p1"
    else:
        key = f"p{prompt}"

    if key not in prompts:
        raise DataError(f"{where}: has no prompt {key!r}, only {', '.join(prompts) or 'none'}.")

    text = prompts[key]
    options = [text] if isinstance(text, str) else text
    if not isinstance(options, list) or not options or not all(isinstance(o, str) for o in options):
        raise DataError(
            f"{where}: prompt {key!r} must be a phrase or a list of phrases, got {str(text)[:80]!r}."
        )
    return choose(options, name, "which wording")


def _label(where: str, record: dict[str, Any], prompts: dict[str, Any], classnames: tuple[str, ...]) -> int:
    """Return the record's class: the one it names, or the longest class name that its plain phrase holds."""
    if len(classnames) == 1:
        return 0

    named = record.get("class")
    if named is not None:
        name = clean_classname(str(named))
        if name not in classnames:
            raise UnknownNameError(f"class ({where})", name, classnames)
        return classnames.index(name)

    plain = prompts.get("p1", "")
    text = (plain if isinstance(plain, str) else " ".join(map(str, plain))).casefold()
    fits = [i for i, name in enumerate(classnames) if name.casefold() in text]
    if not fits:
        raise DataError(f"{where}: p1 {text[:60]!r} names none of the classes {', '.join(classnames)}.")
    return max(fits, key=lambda i: len(classnames[i]))


def _present(
    name: str, samples: list[MaskSample], files: MaskFiles, policy: Missing
) -> tuple[MaskSample, ...]:
    present = []
    problems = []
    for sample in samples:
        lacks = (
            [] if is_regular_file(files.images / str(sample.source)) else [files.images / str(sample.source)]
        )
        lacks += [files.masks / m for m in sample.masks if not is_regular_file(files.masks / m)]
        if lacks:
            problems.append(f"{sample.source} lacks {' and '.join(str(p) for p in lacks)}")
        else:
            present.append(sample)

    refuse_missing(name, problems, policy)
    return tuple(present)
