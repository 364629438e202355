"""Ways to read a data set: the sources that may have it, tried in order, and fetched if none has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_origin, get_type_hints

from vlprompt.core.errors import ConfigError, DataError, nearest
from vlprompt.core.names import printable
from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.data.base import ImageDataset
from vlprompt.data.cards import Card, SourceSpec
from vlprompt.data.fetch import advice, fetch_files
from vlprompt.data.names import DataName
from vlprompt.data.segmentation.base import MaskDataset
from vlprompt.data.segmentation.sources import pair_sources
from vlprompt.data.sources import AbsentError, Request, sources

__all__ = ["Way", "Ways", "image_ways", "mask_ways"]

Data = TypeVar("Data", bound=ImageDataset | MaskDataset)


@dataclass(frozen=True)
class Way(Generic[Data]):
    """A source, and what it is asked for."""

    build: Callable[..., Data]
    request: Request

    @property
    def options(self) -> list[str]:
        """The options of the source: its keyword-only parameters."""
        parameters = inspect.signature(self.build).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


@dataclass(frozen=True)
class Ways(Generic[Data]):
    """The ways to read one split of a data set, best first.

    Attributes:
        ways: At least one.
    """

    ways: tuple[Way[Data], ...]

    @property
    def request(self) -> Request:
        """What the best source is asked for."""
        return self.ways[0].request

    @property
    def card(self) -> Card | None:
        """The card, for a data set that has one."""
        return self.request.card

    def of_split(self, split: str) -> Ways[Data]:
        """Return the ways to read another split."""
        return Ways(tuple(replace(way, request=replace(way.request, split=split)) for way in self.ways))

    def check_options(self, options: Mapping[str, Any], loader: Callable[..., Data]) -> None:
        """Refuse options that no source has.

        Args:
            options: What the user passed beside the loader's own parameters.
            loader: The public function; its parameters are offered too where an option is misspelt.

        Raises:
            DataError: Names all unknown options at once, each with the nearest valid one.
        """
        valid = list(dict.fromkeys(option for way in self.ways for option in way.options))
        parameters = inspect.signature(loader).parameters.values()
        general = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]

        problems = []
        for option in options:
            if option not in valid:
                close = nearest(option, [*valid, *general], 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                problems.append(f"unknown option {option!r}.{hint}")
        if problems:
            allowed = ", ".join(valid) or "none"
            raise DataError(f"{self.request.name}: {' '.join(problems)} Options of this data set: {allowed}.")

    def build(self, options: Mapping[str, Any], download: bool) -> Data:
        """Return the split from the first source that finds its files.

        Args:
            options: Options of the sources; each gets those that it has.
            download: Fetch the files if no source finds them.

        Raises:
            AbsentError: If no source finds the files: where they were looked for, and how to get them.
            DataError: If the files are incomplete or damaged, or are of a source that lacks one of the options.
        """
        missing = []
        for way in self.ways:
            valid = way.options
            own = {name: value for name, value in options.items() if name in valid}
            try:
                data = way.build(way.request, **_checked(way, own))
            except AbsentError as error:
                missing.append(str(error))  # another way may find them
                continue

            idle = sorted(options.keys() - own.keys())
            if idle:
                raise DataError(
                    f"{self.request.name}: the files here are read in a way without the option {idle[0]!r}; its "
                    f"options are {', '.join(valid) or 'none'}. Leave {idle[0]!r} out, or name another root."
                )
            return data

        if self.card is None:
            raise AbsentError(" ".join(missing))
        root = self.request.root
        if not download:
            raise AbsentError(f"{' '.join(missing)} {advice(self.card, root)}")
        fetch_files(self.card, root, archives=True)
        return self.build(options, download=False)


def image_ways(name: DataName, split: str, root: Path, validation: bool = True) -> Ways[ImageDataset]:
    """Return the ways to read a split of a classification data set; arguments as :class:`Request` has them."""
    return Ways(tuple(_ways(sources, name, split, root, validation)))


def mask_ways(name: DataName, split: str, root: Path) -> Ways[MaskDataset]:
    """Return the ways to read a split of a segmentation data set."""
    return Ways(tuple(_ways(pair_sources, name, split, root)))


def _ways(
    registry: Registry[Callable[..., Data]], name: DataName, split: str, root: Path, validation: bool = True
) -> Iterator[Way[Data]]:
    if name.card is None:
        request = Request(name.text, name.argument, split, root, validation=validation)
        yield Way(registry.get(name.kind).target, request)
        return
    source: SourceSpec | None = name.card.source
    while source is not None:
        request = Request(name.text, "", split, root, name.card, source, validation)
        yield Way(registry.get(source.kind).target, request)
        source = source.otherwise


def _checked(way: Way[Data], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of the types that a source declares; those with a list of choices it checks itself.

    Raises:
        DataError: Names all wrong values at once.
    """
    hints = get_type_hints(way.build)
    free = {key: value for key, value in options.items() if get_origin(hints.get(key)) is not Literal}
    try:
        return {**options, **check_options(way.build, free, way.request.name)}
    except ConfigError as error:
        raise DataError(f"{printable(way.request.name)}: {' '.join(error.problems)}") from None
