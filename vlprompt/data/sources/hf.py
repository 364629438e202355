"""hf: data sets of the package datasets, from the Hugging Face Hub, its cache, or a folder of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.names import printable
from vlprompt.core.paths import user_path
from vlprompt.data.base import ImageDataset
from vlprompt.data.objects import dataset_of
from vlprompt.data.sources import AbsentError, Request, sources
from vlprompt.data.splits import cut_validation, cut_whole, normal_split

__all__ = ["build"]


@sources.register(
    "hf",
    summary="data sets of the package datasets, on the Hugging Face Hub or in a folder",
    grammar="hf:NAME",
)
def build(
    request: Request,
    *,
    config: str | None = None,
    revision: str | None = None,
    split_names: Mapping[str, str] | None = None,
    image: str | None = None,
    label: str | None = None,
) -> ImageDataset:
    """Return a split of a data set that the package datasets reads; no code of a repository is run.

    Args:
        request: Its argument is ``org/name``, or a folder.
        config: Which of the data set's configurations.
        revision: A branch, a tag or a commit on the Hub.
        split_names: The data set's own names of ``train``, ``val`` and ``test``; None goes by what they are called.
        image: Column of the images; None finds it.
        label: Column of the labels; None finds it.

    Raises:
        AbsentError: If it can't be fetched and is not in the cache.
        DataError: If the package is missing, or there are no images with labels.
        UnknownNameError: If it has no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{printable(request.name)} is read by the package datasets ({error}): pip install 'vlprompt[hf]'."
        ) from error

    place = user_path(request.argument)
    name = str(place) if place.is_dir() else request.argument
    try:
        parts = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # connections, servers, disks and wrong names raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AbsentError(
            f"{printable(request.name)}: the package datasets can't load it: {reason[:500]}"
        ) from error

    own = _splits(request, list(parts), split_names or {})
    is_whole = len(parts) == 1 and not split_names and not own.keys() & {"val", "test"}
    if not is_whole:
        return _with_validation(request, parts, own, image, label)

    # The only part, which most data sets without splits call train: train, val and test are cut from it.
    (only,) = parts.values()
    return _cut(_dataset(request, only, image, label), request, cut_whole)


def _splits(request: Request, names: list[str], asked: Mapping[str, str]) -> dict[str, str]:
    """Return the data set's own name of each of our splits that it has.

    Raises:
        UnknownNameError: If an asked name does not exist.
        DataError: If two of its parts mean the same split, or none means any.
    """
    own: dict[str, str] = {}
    for split, name in asked.items():
        if name not in names:
            raise UnknownNameError(f"split of {printable(request.name)}", str(name), names)
        own[normal_split(split) or split] = name

    for name in names:
        meaning = normal_split(name)
        if meaning is None or name in own.values():
            continue
        if meaning in own and meaning not in asked:
            raise DataError(
                f"{printable(request.name)}: {own[meaning]!r} and {name!r} may both be its {meaning} split. Say "
                f"which: split_names={{{meaning!r}: {name!r}}}."
            )
        own.setdefault(meaning, name)

    if not own and len(names) > 1:
        raise DataError(
            f"{printable(request.name)} has the splits {', '.join(names)}. Say which is which: "
            f"split_names={{'train': {names[0]!r}}}."
        )
    return own


def _with_validation(
    request: Request, parts: Mapping[str, Any], own: Mapping[str, str], image: str | None, label: str | None
) -> ImageDataset:
    """Return a split of a data set that has several; val comes from train where there is none."""
    wanted = request.split
    if wanted in own and (wanted != "train" or "val" in own):
        return _dataset(request, parts[own[wanted]], image, label)
    if wanted == "test" or "train" not in own:
        raise UnknownNameError(f"split of {printable(request.name)}", wanted, own)
    return _cut(_dataset(request, parts[own["train"]], image, label), request, cut_validation)


def _dataset(request: Request, part: Any, image: str | None, label: str | None) -> ImageDataset:
    dataset = dataset_of(part, request.split, image=image, label=label, name=request.name)
    facts = {"source": "hf", "fingerprint": str(part._fingerprint)}
    return replace(dataset, info={**dataset.info, **facts})


def _cut(whole: ImageDataset, request: Request, cut: Callable[..., Mapping[str, Any]]) -> ImageDataset:
    """Return the part of a data set that a split is."""
    places: dict[int, list[str]] = {}
    for i, number in enumerate(whole.labels):
        places.setdefault(number, []).append(f"{i:09d}")

    parts = cut(places, "hf", whole.classnames, 0, request.validation)
    return whole.subset(int(sample.source) for sample in parts[request.split])
