"""Official lists of images: one small class per way in which data sets write theirs.

Every class reads one part (train, val, trainval or test) and returns samples whose sources are relative to the data
set's image folder. Class numbers of the data set itself become the card's labels by :meth:`Part.label`.
"""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlprompt.core.errors import DataError
from vlprompt.data.base import Sample
from vlprompt.data.listing import list_images
from vlprompt.data.sources import read_text

__all__ = ["Difficult", "Part", "PartSpec", "VocPart"]

Difficult = Literal["present", "ignore", "negative"]
"""What objects are that PASCAL VOC marks difficult, see :class:`VocPart`."""


class Part(BaseModel):
    """One part's list.

    Attributes:
        path: File or folder, relative to the data set's folder.
        prefix: Put before each image's name.
        suffix: Put behind it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    prefix: str = ""
    suffix: str = ""

    @abstractmethod
    def read(self, folder: Path, images: Path, own_names: tuple[str, ...]) -> list[Sample]:
        """Return the part's samples.

        Args:
            folder: The data set's folder.
            images: Its image folder.
            own_names: The data set's own name of every class (a folder, a number), by label of the card.

        Raises:
            DataError: If the list is missing or damaged; names the place.
        """

    def sample(self, name: str, own_name: str, classes: dict[str, int], where: str) -> Sample:
        """Return one sample. Raises DataError for an unknown class."""
        if own_name not in classes:
            raise DataError(f"{where}: no class {own_name!r}; known: {', '.join(list(classes)[:12])}, ...")
        return Sample(f"{self.prefix}{name}{self.suffix}", classes[own_name])


class FolderPart(Part):
    """``path/<own name of the class>/*.jpg`` below the data set's image folder."""

    format: Literal["folders"]

    def read(self, folder: Path, images: Path, own_names: tuple[str, ...]) -> list[Sample]:
        """See :meth:`Part.read`."""
        base = images / self.path
        missing = [o for o in own_names if not (base / o).is_dir()]
        if missing:
            raise DataError(f"{base}: class folders are missing: {', '.join(missing[:5])}.")
        return [Sample(p, label) for label, o in enumerate(own_names) for p in list_images(base / o, images)]


class TextPart(Part):
    """Lines of a text file: the image's name first.

    Attributes:
        label: ``"folder"``: the class is the name's first folder; ``"column"``: a column holds the class's own name;
            ``"rest"``: the rest of the line is it.
        column: Which column, from 0.
    """

    format: Literal["text"]
    label: Literal["folder", "column", "rest"]
    column: int = 1

    def read(self, folder: Path, images: Path, own_names: tuple[str, ...]) -> list[Sample]:
        """See :meth:`Part.read`."""
        path = need(folder / self.path)
        classes = {o: i for i, o in enumerate(own_names)}

        samples = []
        for number, line in enumerate(read_text(path).splitlines(), 1):
            fields = line.split()
            if not fields or fields[0].startswith("#"):
                continue
            where = f"{path}, line {number}"
            if self.label == "column" and len(fields) <= self.column:
                raise DataError(f"{where}: no class in {line!r}.")
            if self.label == "folder":
                name = fields[0].split("/")[0]
            else:
                name = " ".join(fields[1:]) if self.label == "rest" else fields[self.column]
            samples.append(self.sample(fields[0], name, classes, where))

        return samples


class TablePart(Part):
    """A table with a header, or one JSON object per line, that names an image and its class's own number.

    Attributes:
        image: Column or key of the image's name.
        label: Column or key of the class.
        digits: Class numbers are filled up with zeros to so many digits, as the class folders are.
        delimiter: Of a CSV file; unused for JSON lines.
    """

    format: Literal["csv", "jsonl"]
    image: str
    label: str
    digits: int = 0
    delimiter: str = ","

    def read(self, folder: Path, images: Path, own_names: tuple[str, ...]) -> list[Sample]:
        """See :meth:`Part.read`."""
        path = need(folder / self.path)
        classes = {o: i for i, o in enumerate(own_names)}

        samples = []
        for number, row in enumerate(self._rows(path), 1):
            try:
                name = str(row[self.image])
                label = str(row[self.label]).zfill(self.digits)
            except (KeyError, TypeError):
                raise DataError(f"{path}, entry {number}: needs {self.image!r} and {self.label!r}.") from None
            samples.append(self.sample(name, label, classes, f"{path}, entry {number}"))

        return samples

    def _rows(self, path: Path) -> list[Any]:
        text = read_text(path)
        if self.format == "csv":
            return list(csv.DictReader(text.splitlines(), delimiter=self.delimiter))
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no valid JSON: {error}.") from None


class FlowersPart(Part):
    """Oxford Flowers: ``path`` holds the numbers of a part's images, ``labels`` the class of every image.

    Attributes:
        key: Which part in ``path``.
        labels: The file with all labels.
    """

    format: Literal["flowers"]
    key: Literal["trnid", "valid", "tstid"]
    labels: str = "imagelabels.mat"

    def read(self, folder: Path, images: Path, own_names: tuple[str, ...]) -> list[Sample]:
        """See :meth:`Part.read`."""
        classes = {o: i for i, o in enumerate(own_names)}
        numbers = _mat(need(folder / self.path), self.key)
        labels = _mat(need(folder / self.labels), "labels")
        return [self.sample(f"image_{n:05d}.jpg", str(labels[n - 1]), classes, self.path) for n in numbers]


class CarsPart(Part):
    """Stanford Cars: a structure of file names and class numbers from 1."""

    format: Literal["cars"]

    def read(self, folder: Path, images: Path, own_names: tuple[str, ...]) -> list[Sample]:
        """See :meth:`Part.read`."""
        classes = {o: i for i, o in enumerate(own_names)}
        rows = _mat(need(folder / self.path), "annotations")
        return [self.sample(str(r["fname"]), str(int(r["class"])), classes, self.path) for r in rows]


class VocPart(Part):
    """PASCAL VOC: ``path`` holds one file ``<class>_<part>.txt`` per class, lines ``<image> <-1, 0 or 1>``.

    1 is a positive, -1 a negative; 0 is an image all of whose objects of the class are marked difficult.

    Attributes:
        part: ``"train"``, ``"val"``, ``"trainval"`` or ``"test"``.
        difficult: What 0 is: ``"present"``, a positive, so that every image has a label and the parts have the sizes
            that ELEVATER states; ``"ignore"``, neither positive nor negative, as the VOC programs have it;
            ``"negative"``, as the code of MULTI-LANE has it. With the last two an image may be left without a label.
    """

    format: Literal["voc"]
    part: Literal["train", "val", "trainval", "test"]
    difficult: Difficult = "present"

    def read(self, folder: Path, images: Path, own_names: tuple[str, ...]) -> list[Sample]:
        """See :meth:`Part.read`."""
        certain = ("1", "0") if self.difficult == "present" else ("1",)
        labels_of: dict[str, list[int]] = {}
        unknown_of: dict[str, list[int]] = {}
        for label, name in enumerate(own_names):
            path = need(folder / self.path / f"{name}_{self.part}.txt")
            for number, line in enumerate(read_text(path).splitlines(), 1):
                words = line.split()
                if words and (len(words) != 2 or words[1] not in ("-1", "0", "1")):
                    raise DataError(
                        f"{path}, line {number}: expected '<image> <-1, 0 or 1>', got {line[:80]!r}."
                    )
                if not words:
                    continue

                labels = labels_of.setdefault(words[0], [])
                if words[1] in certain:
                    labels.append(label)
                elif words[1] == "0" and self.difficult == "ignore":
                    unknown_of.setdefault(words[0], []).append(label)

        if self.difficult == "present":  # every image of VOC has an object
            labels_of = {image: labels for image, labels in labels_of.items() if labels}
        return [
            Sample(f"{self.prefix}{image}{self.suffix}", tuple(labels), tuple(unknown_of.get(image, ())))
            for image, labels in sorted(labels_of.items())
        ]


PartSpec = Annotated[
    FolderPart | TextPart | TablePart | FlowersPart | CarsPart | VocPart, Field(discriminator="format")
]


def need(path: Path) -> Path:
    """Return a list's path. Raises DataError if it is missing."""
    if not path.is_file():
        raise DataError(f"the list {path} is missing.")
    return path


def _mat(path: Path, key: str) -> Any:
    """Return one variable of a MATLAB file. Raises DataError if the file is damaged or lacks it."""
    from scipy.io import loadmat  # here: few data sets need it

    try:
        return loadmat(str(path), squeeze_me=True)[key]
    except (KeyError, ValueError, OSError, TypeError, NotImplementedError) as error:
        raise DataError(f"{path} is no MATLAB file with {key!r}: {error}.") from None
