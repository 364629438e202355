"""Photographs to distil from: where they lie, which are kept back, and their maps, computed once.

A folder of photographs holds one tar or one folder per class, named by its WordNet id (``n02084071.tar``). Labels
never enter training; the ids say which classes and images are kept back for measuring.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vlprompt.backbones.lite0 import MAP_CHANNELS, PIXELS, STRIDE
from vlprompt.core.errors import DataError
from vlprompt.core.files import write_json
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.decoding import decode
from vlprompt.data.images import EXTENSIONS

__all__ = ["COMPOSITION", "Photographs", "cached_maps", "composed", "to_pixels", "whole"]

_GRIDS, _SHARES = (1, 2, 3), (0.5, 0.3, 0.2)  # photographs per side of a composed image, and how often
_SMALLEST = 0.6  # of a photograph's shorter side that a random crop keeps
#: What compositions depend on beside the photographs and the seed.
COMPOSITION = (_GRIDS, _SHARES, _SMALLEST)
_SIDE = PIXELS // STRIDE


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    size: int


class Photographs:
    """Photographs by class, and what is kept back.

    Args:
        root: The folder, see the module's text.
        held_out: How many classes are kept back whole, drawn by ``seed``.
        seed: Draws them, and a tenth of the photographs of every other class.

    Attributes:
        classes: WordNet ids, sorted.
        unseen: Those that are kept back.

    Raises:
        DataError: If there is no such folder or nothing in it.
    """

    def __init__(self, root: Path, held_out: int = 0, seed: int = 1) -> None:
        self.root = Path(root).expanduser()
        self.seed = seed

        if not self.root.is_dir():
            raise DataError(
                f"photos: there is no folder {str(root)!r}; it holds one tar or folder per WordNet id."
            )

        self._places: dict[str, list[_Place]] = {}

        for path in sorted(self.root.iterdir()):
            places = _in_tar(path) if path.suffix == ".tar" else _in_folder(path) if path.is_dir() else []
            if places:
                self._places[path.stem] = places

        self.classes = sorted(self._places)

        if len(self.classes) <= held_out:
            raise DataError(
                f"photos: {self.root} holds {len(self.classes)} classes, {held_out} are to be kept back."
            )

        chosen_classes = numpy_rng(seed, "classes kept back").permutation(len(self.classes))[:held_out]
        self.unseen = [self.classes[i] for i in sorted(chosen_classes)]

    def chosen(self, part: str) -> list[tuple[str, int]]:
        """Return (class, number) of the photographs of a part.

        Args:
            part: ``"train"``; ``"val"``: the tenth of the same classes that is kept back; ``"unseen"``: all of the
                classes that are kept back.
        """
        listed = []
        for name in self.classes:
            count = len(self._places[name])
            if (name in self.unseen) != (part == "unseen"):
                continue

            order = numpy_rng(self.seed, "photographs kept back", name).permutation(count)
            back = {int(i) for i in order[: -(-count // 10)]}
            listed += [(name, i) for i in range(count) if part == "unseen" or (i in back) == (part == "val")]

        return listed

    def read(self, name: str, number: int) -> Image.Image:
        """Return a photograph as RGB."""
        location = self._places[name][number]
        with location.file.open("rb") as file:
            file.seek(location.offset)
            return decode(file.read(location.size), f"{location.file}#{number}")


def composed(
    photographs: Photographs, pool: list[tuple[str, int]], index: int, seed: int
) -> NDArray[np.uint8]:
    """Return the (224, 224, 3) image of a number: one photograph, or 2 x 2 or 3 x 3, each cropped and flipped.

    Small photographs that are blown up to the input's size are all blur; side by side they are not.
    """
    rng = numpy_rng(seed, "composed", index)
    grid = int(rng.choice(_GRIDS, p=_SHARES))
    edges = np.linspace(0, PIXELS, grid + 1).round().astype(int)
    canvas = np.zeros((PIXELS, PIXELS, 3), np.uint8)

    for cell in range(grid * grid):
        which = index % len(pool) if cell == 0 else int(rng.integers(len(pool)))
        image = photographs.read(*pool[which])
        side = min(image.size) * float(rng.uniform(_SMALLEST, 1))
        left, top = (float(rng.uniform(0, length - side)) for length in image.size)
        (y0, y1), (x0, x1) = (edges[[n, n + 1]] for n in divmod(cell, grid))
        box = (left, top, left + side, top + side)
        part = np.asarray(image.resize((int(x1 - x0), int(y1 - y0)), Image.Resampling.BICUBIC, box))
        canvas[y0:y1, x0:x1] = part[:, ::-1] if rng.random() < 0.5 else part

    return canvas


def whole(photograph: Image.Image) -> NDArray[np.uint8]:
    """Return a photograph as (224, 224, 3): its shorter side fits, what is too long is cut off."""
    width, height = photograph.size
    side = min(width, height)
    left = (width - side) / 2
    top = (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(photograph.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC, box))


def to_pixels(images: list[NDArray[np.uint8]]) -> Tensor:
    """Return (B, 3, H, W) network input, in [-1, 1], of (H, W, 3) bytes."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def cached_maps(
    image: Callable[[int], NDArray[np.uint8]],
    count: int,
    stem: nn.Module,
    path: Path,
    chunk: int = 50,
) -> NDArray[Any]:
    """Return (count, 49, 320) float16 maps of images, memory-mapped; continues after a kill.

    Args:
        image: Returns the (224, 224, 3) image of a number.
        count: How many there are.
        stem: Turns (B, 3, 224, 224) into (B, 320, 7, 7).
        path: The maps are kept here and reused; its name must say what they show.
        chunk: Images at a time.
    """
    shape = (count, _SIDE * _SIDE, MAP_CHANNELS)
    state = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)

    done = int(state.read_text()) if state.is_file() and path.is_file() else 0
    if done < count:
        maps = np.memmap(path, np.float16, "r+" if done else "w+", shape=shape)
        for start in range(done, count, chunk):
            numbers = range(start, min(start + chunk, count))
            with torch.no_grad():
                stem_maps = stem(to_pixels([image(n) for n in numbers]))
            maps[start : numbers.stop] = stem_maps.flatten(2).transpose(1, 2).half().numpy()
            if (start // chunk) % 10 == 9 or numbers.stop == count:
                maps.flush()
                write_json(state, numbers.stop)

    return np.memmap(path, np.float16, "r", shape=shape)


def _in_tar(path: Path) -> list[_Place]:
    try:
        with tarfile.open(path) as packed:
            members = [m for m in packed.getmembers() if m.isfile() and m.name.lower().endswith(EXTENSIONS)]
    except tarfile.TarError as error:
        raise DataError(f"photos: the archive {path} is damaged: {error}.") from None
    return [_Place(path, m.offset_data, m.size) for m in sorted(members, key=lambda m: m.name)]


def _in_folder(path: Path) -> list[_Place]:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    return [_Place(file, 0, file.stat().st_size) for file in files]
