"""voc: PASCAL VOC's classification task by its official lists, with objects marked difficult as a state of their own.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section 3.4: objects that are hard to
see are marked difficult, and the programs that score leave them out, as neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.pixels import check_value_range
from vlprompt.data.base import ImageDataset
from vlprompt.data.decoding import Decoding
from vlprompt.data.images import FileReader
from vlprompt.data.sources import Request, sources
from vlprompt.data.sources._layout import (
    Layout,
    Parts,
    check_present,
    dataset_from,
    find_folder,
    labelled,
    parse_options,
)
from vlprompt.data.sources._parts import Difficult, VocPart

__all__ = ["build"]


class _Options(Layout):
    """Source options of a card.

    Attributes:
        lists: Folder of the lists, one file for each class and part.
        parts: VOC's part for each split.
        own_names: What the lists call each class, by label.
    """

    lists: str = "ImageSets/Main"
    parts: dict[Literal["train", "val", "test"], Literal["train", "val", "trainval", "test"]]
    own_names: tuple[str, ...]


@sources.register("voc", summary="PASCAL VOC's lists of classes, with what is marked difficult")
def build(
    request: Request,
    *,
    difficult: Difficult = "ignore",
    value_range: Sequence[float] | None = None,
) -> ImageDataset:
    """Build one split of a card's data set.

    Images to train on or to choose on show a class for certain; those that don't are left out and counted in
    ``info["without_label"]``. The test part keeps all: such an image is a negative of the other classes.

    Args:
        request: What is asked for.
        difficult: What a class is of which an image shows difficult objects only: ``"ignore"``, neither positive nor
            negative, as in VOC's own measure; ``"present"`` or ``"negative"``.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        AbsentError: If it isn't there.
        DataError: If lists or images are missing, or a list is damaged; says which and where.
    """
    card = request.need_card
    options = parse_options(request, _Options)
    if difficult not in get_args(Difficult):
        raise UnknownNameError("difficult", str(difficult), get_args(Difficult))

    folder = find_folder(request, options)
    parts: Parts = dict.fromkeys(options.parts, ())
    part = options.parts.get(request.split)  # type: ignore[call-overload]  # a split's name
    if part is not None:
        # Of the asked part alone: test lists come in an archive of their own, which who trains may not have.
        official = VocPart(format="voc", path=options.lists, part=part, suffix=".jpg", difficult=difficult)
        try:
            samples = official.read(folder, folder / options.images, options.own_names)
        except DataError as error:
            raise DataError(f"{card.name}: {error}") from None
        parts[request.split] = tuple(samples)
        check_present(card.name, f"{options.lists} ({part})", folder / options.images, parts)

    how = f"official lists {part}; difficult objects: {difficult}"
    limits = check_value_range(value_range, request.name)
    reader = FileReader(folder / options.images, Decoding(value_range=limits))
    return labelled(dataset_from(request, parts, card.classnames, how, reader))
