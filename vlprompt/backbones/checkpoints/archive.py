"""TorchScript archives, such as OpenAI published CLIP in: their tensors are read, and their code is not run.

An archive is a zip file. ``data.pkl`` describes a tree of modules, ``data/<key>`` holds the numbers of one storage.
The description is a pickle, which in general may call anything. Here it may call nothing: every name in it stands for
one of the few inert classes and functions of this file, and a name that is not known ends the reading.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones.checkpoints import WeightsError

__all__ = ["Archive", "is_archive", "read_archive"]

_LARGEST = 64 << 20  # bytes of a description; CLIP's largest takes a thousandth of it
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


@dataclass(frozen=True)
class Archive:
    """What an archive holds.

    Attributes:
        tensors: Parameters and buffers by the names that ``state_dict`` would give them.
        quick_gelu: Whether its code calls a sigmoid (QuickGELU) or GELU; None if it calls neither or both.
    """

    tensors: dict[str, Tensor]
    quick_gelu: bool | None


def is_archive(path: Path) -> bool:
    """Return whether a file is a TorchScript archive, and not the zip file of a plain ``torch.save``."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return _description(file) is not None


def read_archive(path: Path) -> Archive:
    """Read the tensors of a TorchScript archive without running anything in it.

    Raises:
        WeightsError: If it is damaged, or its description names anything but modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as file:
            description = _description(file)
            if description is None:
                raise WeightsError("it is no TorchScript archive")

            root = description.removesuffix("data.pkl")
            reader = _Reader(file, root)
            tree = reader.tree(description)
            tensors = {name: reader.tensor(stored) for name, stored in _named(tree)}
            return Archive(tensors, _quick_gelu(file, root))
    except WeightsError:
        raise
    except Exception as error:  # zipfile, pickle and torch each raise their own kinds on damaged bytes
        raise WeightsError(f"its TorchScript archive is damaged ({type(error).__name__}: {error})") from error


def _description(file: zipfile.ZipFile) -> str | None:
    """Return the name of the record that describes the modules; only archives with code have constants."""
    names = set(file.namelist())
    for name in sorted(names):
        if name.endswith("/data.pkl") and name.replace("data.pkl", "constants.pkl") in names:
            return name
    return None


class _Module:
    """Stands for any class of the archive's own code: it keeps its attributes, and does nothing."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __new__(cls) -> _Module:
        module = super().__new__(cls)
        module.values = {}
        return module

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise WeightsError("it holds more than plain tensors (a module whose state is no mapping)")
        self.values = {str(name): value for name, value in state.items()}


class _Storage:
    """Stands for a block of numbers in the archive."""

    __slots__ = ("count", "dtype", "key")

    def __init__(self, dtype: torch.dtype, key: str, count: int) -> None:
        self.dtype = dtype
        self.key = key
        self.count = count


class _Stored:
    """Stands for a tensor: a view of a storage."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(
        self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.storage = storage
        self.offset = offset
        self.size = size
        self.stride = stride


def _rebuild_tensor(*arguments: Any) -> _Stored:
    """Stand for ``torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)``."""
    storage, offset, size, stride = arguments[:4]
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise WeightsError("it holds a tensor that is described wrongly")
    return _Stored(storage, offset, tuple(size), tuple(stride))


def _ignored(*arguments: Any) -> None:
    """Stand for containers whose content no tower reads (lists of numbers, hooks)."""


class _Reader(pickle.Unpickler):
    """Reads an archive's description; the only names it knows are those of this file."""

    def __init__(self, file: zipfile.ZipFile, root: str) -> None:
        self._file = file
        self._root = root
        super().__init__(io.BytesIO())

    def tree(self, description: str) -> _Module:
        """Return the root module of the archive."""
        if self._file.getinfo(description).file_size > _LARGEST:
            raise WeightsError(f"its description is larger than {_LARGEST >> 20} MB")

        super().__init__(io.BytesIO(self._file.read(description)))
        tree = self.load()
        if not isinstance(tree, _Module):
            raise WeightsError("its TorchScript archive describes no module")
        return tree

    def find_class(self, module: str, name: str) -> Callable[..., Any] | torch.dtype:
        """Return what stands for a name of the description."""
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch.jit._pickle" or (module, name) == ("collections", "OrderedDict"):
            return _ignored
        raise WeightsError(f"it holds more than plain tensors ({module}.{name})")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return what stands for ``("storage", type, key, device, count)``."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise WeightsError("it holds a storage that is described wrongly")
        return _Storage(dtype, key, int(count))

    def tensor(self, stored: _Stored) -> Tensor:
        """Return the numbers of a tensor."""
        storage = stored.storage
        record = self._file.getinfo(f"{self._root}data/{storage.key}")
        expected = storage.count * storage.dtype.itemsize
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != expected:
            raise WeightsError(f"its storage {storage.key} has {record.file_size} bytes, not {expected}")

        last = sum((n - 1) * step for n, step in zip(stored.size, stored.stride, strict=True))
        if 0 not in stored.size and stored.offset + last >= storage.count:
            raise WeightsError(f"a tensor reaches beyond its storage {storage.key}")
        if not storage.count:
            return torch.empty(stored.size, dtype=storage.dtype)

        numbers = torch.frombuffer(bytearray(self._file.read(record)), dtype=storage.dtype)
        return numbers.as_strided(stored.size, stored.stride, stored.offset).clone()


def _named(tree: _Module) -> list[tuple[str, _Stored]]:
    """Return every tensor by its dotted name; a module that is reached twice counts where it comes first."""
    tensors = []
    waiting = [("", tree)]
    seen = {id(tree)}

    while waiting:
        prefix, module = waiting.pop()
        for name, value in module.values.items():
            if isinstance(value, _Stored):
                tensors.append((f"{prefix}{name}", value))
            elif isinstance(value, _Module) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))

    return tensors


def _quick_gelu(file: zipfile.ZipFile, root: str) -> bool | None:
    """Read off the archive's code, which is text, which activation it calls."""
    names = [n for n in file.namelist() if n.startswith(f"{root}code/") and n.endswith(".py")]
    code = [
        file.read(n).decode("utf-8", errors="replace") for n in names if file.getinfo(n).file_size < _LARGEST
    ]

    quick = any("torch.sigmoid(" in text for text in code)
    exact = any("torch.gelu(" in text for text in code)
    return quick if quick != exact else None
