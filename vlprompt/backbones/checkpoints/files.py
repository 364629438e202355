"""Where weights lie: one file, the parts of a sharded one, or a folder that holds either."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vlprompt.core.errors import BackboneError

__all__ = ["WEIGHT_FILES", "WeightFiles", "find_weight_files"]

WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names that open_clip and transformers give to weights, best first."""

_INDEX = ".index.json"
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")


@dataclass(frozen=True)
class WeightFiles:
    """Files that together hold the weights of one model.

    Attributes:
        path: What names them: the file, or the index of its parts.
        parts: The files to read.
    """

    path: Path
    parts: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where cards may lie beside them."""
        return self.path.parent


def find_weight_files(path: Path, asked_by: str) -> WeightFiles:
    """Return the weights that a path means.

    Args:
        path: A file of weights, an index of parts (``*.index.json``), or a folder with one of them.
        asked_by: What they are the weights of, for messages.

    Raises:
        BackboneError: If there is nothing, nothing that is weights, or more than one choice; names them.
    """
    if path.is_dir():
        path = _in_folder(path, asked_by)
    if path.name.endswith(_INDEX):
        return WeightFiles(path, _parts(path))
    if not path.is_file():
        raise BackboneError(f"no weights file at {path}: no such file or folder (asked for by {asked_by}).")
    return WeightFiles(path, (path,))


def _in_folder(folder: Path, asked_by: str) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name

    files = sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS and file.is_file())
    if len(files) == 1:
        return files[0]

    if files:
        names = ", ".join(file.name for file in files[:10]) + (", ..." if len(files) > 10 else "")
        raise BackboneError(
            f"{folder} (asked for by {asked_by}) holds {len(files)} files of weights ({names}); name one of them."
        )
    raise BackboneError(
        f"no weights file at {folder} (asked for by {asked_by}): the folder holds none of {', '.join(WEIGHT_FILES)}, "
        f"and no other file that ends with {', '.join(_ENDINGS)}."
    )


def _parts(index: Path) -> tuple[Path, ...]:
    """Return the files that an index names; they lie beside it, and nowhere else."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackboneError(f"{index} is no index of weights: {error!r}.") from error

    if strange or not names:
        raise BackboneError(
            f"{index} is no index of weights: its parts must be files beside it, not {strange[:3]}."
        )

    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise BackboneError(
            f"{index} names {len(names)} parts, of which {len(missing)} are missing: {', '.join(missing[:10])}."
        )
    return tuple(index.parent / name for name in names)
