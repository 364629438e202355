"""The caption store: features of images and captions, computed once, in shards that a killed build goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError, NonFiniteError
from vlprompt.core.files import read_tensors, write_json, write_tensors
from vlprompt.core.paths import user_path
from vlprompt.data.captions import CaptionSource, open_captions
from vlprompt.data.captions.encoded import EncodedCaptions
from vlprompt.data.loading import Loader, Workers

__all__ = ["CaptionStore", "Rows", "build_store"]

log = logging.getLogger("vlprompt.captions")

_FORMAT = 1
_BATCH = 64  # images per pass
Progress = Callable[[str, int, int], None]


class Rows:
    """The rows of several shards as if they were one matrix; they stay pages of their files.

    Args:
        shards: Each (n, d) float16.
    """

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self.shards = list(shards)
        self.starts = np.cumsum([0, *(len(s) for s in shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return (m, d) float32 rows, unit length again after float16."""
        wanted = np.asarray(rows, dtype=np.int64)
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        result = torch.empty(len(wanted), self.shards[0].shape[1])
        for number in np.unique(owner):
            here = torch.from_numpy(owner == number)
            result[here] = self.shards[number][wanted[owner == number] - self.starts[number]].float()
        return F.normalize(result, dim=-1)

    def all(self) -> Tensor:
        """Return everything as float32, (N, d)."""
        return F.normalize(torch.cat([s.float() for s in self.shards]), dim=-1)


@dataclass(frozen=True)
class CaptionStore:
    """N captioned images, in the order of their source.

    Attributes:
        folder: Where it lies.
        source: Reads images again, for learners that need pixels.
        index: (N,) number of each one in the source; unreadable images are missing.
        image: (N, d) unit-length features of the images.
        text: (N, d) of the captions.
        skipped: Source number to the reason why an image could not be read.
    """

    folder: Path
    source: CaptionSource
    index: Tensor
    image: Rows
    text: Rows
    skipped: dict[int, str]

    def __len__(self) -> int:
        return len(self.index)

    def caption(self, row: int) -> str:
        """Return the caption of a row."""
        return self.source.caption(int(self.index[row]))

    def pixels(self, row: int, preprocess: Any) -> Tensor:
        """Return (3, H, W) preprocessed pixels of a row."""
        return preprocess(self.source.image(int(self.index[row])))

    @property
    def digest(self) -> str:
        """12 hex digits of what the store was built from and with."""
        return str(json.loads((self.folder / "store.json").read_text(encoding="utf-8"))["digest"])


def build_store(
    pairs: str,
    backbone: Backbone,
    folder: str | Path,
    *,
    shard: int = 4096,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> CaptionStore:
    """Encode all captioned images that are not encoded yet, and open the store.

    A shard holds the features of ``shard`` consecutive ones of the source and is written as a whole; a build that was
    killed keeps the shards it finished. Features are float16: 2 KiB per captioned image at d = 512.

    Args:
        pairs: What :func:`open_captions` takes.
        backbone: Encodes both sides.
        folder: Of the store; one store per source and backbone.
        shard: Captioned images per file.
        workers: Processes that decode images; see :data:`vlprompt.data.loading.Workers`.
        progress: Called with ("pairs", done, total).

    Raises:
        CheckpointError: If the folder holds a store of other captions or of another backbone; each difference is named.
        DataError: If there are no captions, or no image can be read.
        BackboneError: If the backbone reads no text.
    """
    source = open_captions(pairs)
    folder = user_path(folder)
    facts = {
        "format": _FORMAT,
        "pairs": source.identity(),
        "count": len(source),
        "backbone": backbone.features_id,
        "shard": shard,
    }
    _claim(folder, facts)
    if isinstance(source, EncodedCaptions):
        return _encoded_store(folder, source, backbone)

    parts: list[dict[str, Tensor]] = []
    skipped: dict[int, str] = {}
    reader = _ImageReader(source, backbone.preprocess)
    with Loader(reader, workers=workers, expected=-(-len(source) // _BATCH)) as loader:
        for number, start in enumerate(range(0, len(source), shard)):
            path = folder / f"shard-{number:05d}.safetensors"
            rows = range(start, min(start + shard, len(source)))
            if not _is_whole(path):
                _write_shard(path, source, rows, backbone, loader)
            tensors, metadata = read_tensors(path)
            parts.append(tensors)
            skipped |= {int(k): v for k, v in metadata["skipped"].items()}
            if progress is not None:
                progress("pairs", rows.stop, len(source))

    if skipped:
        first = next(iter(skipped.values()))
        log.warning("%s: %d of %d images can't be read, first: %s", pairs, len(skipped), len(source), first)

    index = torch.cat([part["index"] for part in parts])
    if not len(index):
        raise DataError(f"pairs {pairs!r}: no image can be read, for example {next(iter(skipped.values()))}")

    image, text = (Rows([part[side] for part in parts]) for side in ("image", "text"))
    return CaptionStore(folder, source, index, image, text, skipped)


def _encoded_store(folder: Path, source: EncodedCaptions, backbone: Backbone) -> CaptionStore:
    """Return the store of features that were computed elsewhere.

    Raises:
        CheckpointError: If another backbone computed them.
    """
    if source.backbone != backbone.features_id:
        raise CheckpointError(
            f"{source.folder} has features of another backbone, {source.backbone}, not {backbone.features_id}: encode "
            "with this one, into another folder."
        )
    index = torch.arange(len(source))
    return CaptionStore(folder, source, index, Rows(source.image_rows), Rows(source.text_rows), {})


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a folder as the store of these captions, or refuse another's."""
    path = folder / "store.json"
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    if path.is_file():
        try:
            existing = json.loads(path.read_text(encoding="utf-8"))
            differs = [
                f"{k} is {existing.get(k)!r} there and {v!r} here"
                for k, v in facts.items()
                if existing.get(k) != v
            ]
        except (ValueError, AttributeError):
            differs = ["store.json is damaged"]

        if differs:
            raise CheckpointError(
                f"{folder} holds another caption store: {'; '.join(differs)}. Give another folder, or remove this one."
            )
        return

    write_json(path, {**facts, "digest": digest})


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(str(path), framework="pt") as file:
            return {"index", "image", "text"} <= set(file.keys())
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s): it is computed again.", path, error)
        return False


def _write_shard(
    path: Path, source: CaptionSource, rows: range, backbone: Backbone, loader: Loader[range, Any]
) -> None:
    index: list[int] = []
    images: list[Tensor] = []
    skipped: dict[int, str] = {}
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    for part, pixels, errors in loader.stream(batches):
        skipped |= errors
        if pixels is not None:
            index += part
            images.append(backbone.encode_image(pixels).cpu())

    texts = (
        backbone.encode_text([source.caption(i) for i in index]).cpu()
        if index
        else torch.empty(0, backbone.dim)
    )
    image = torch.cat(images) if images else torch.empty(0, backbone.dim)
    for what, rows_of in (("image", image), ("caption", texts)):
        bad = (~rows_of.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(f"the features of {what} {index[bad[0]]} of the pairs are not finite.")

    tensors = {"index": torch.tensor(index, dtype=torch.long), "image": image.half(), "text": texts.half()}
    write_tensors(path, tensors, {"skipped": skipped})


@dataclass(frozen=True)
class _ImageReader:
    """Reads a batch of a source's images."""

    source: CaptionSource
    preprocess: Any

    def __call__(self, numbers: range) -> tuple[list[int], Tensor | None, dict[int, str]]:
        """Return the numbers that can be read, their pixels (n, 3, H, W), and why the others can't."""
        readable: list[int] = []
        pixels: list[Tensor] = []
        errors: dict[int, str] = {}
        for number in numbers:
            try:
                pixels.append(self.preprocess(self.source.image(number)))
                readable.append(number)
            except DataError as error:
                errors[number] = str(error)
        return readable, torch.stack(pixels) if pixels else None, errors
