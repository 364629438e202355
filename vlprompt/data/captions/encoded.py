"""encoded:FOLDER: captioned images whose features ``vlprompt encode --pairs`` has computed, in Parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlprompt.core.errors import DataError, VLPromptError
from vlprompt.core.paths import user_path
from vlprompt.data.base import hash_strings
from vlprompt.data.captions import CAPTION_SOURCES

__all__ = ["EncodedCaptions"]

_COLUMNS = ("caption", "feature", "text")


@CAPTION_SOURCES.register(
    "encoded", summary="features that vlprompt encode --pairs wrote", grammar="encoded:FOLDER"
)
class EncodedCaptions:
    """Captions, and features of both sides, of all pairs whose image could be read.

    Features are in memory as float16: 2 KiB a pair at d = 512. There are no pixels, so learners that enter the image
    tower can't be meta-trained on them.

    Args:
        argument: The folder that ``vlprompt encode --pairs`` wrote.

    Raises:
        DataError: If the folder holds no such features, or a file of them is damaged.
        VLPromptError: If pyarrow isn't installed.
    """

    def __init__(self, argument: str) -> None:
        self.folder = user_path(argument)
        parts = sorted((self.folder / "parts").glob("*.parquet"))
        if not parts:
            raise DataError(f"encoded:{argument} holds no features: write them with vlprompt encode --pairs.")

        self.captions: list[str] = []
        self.image_rows: list[Tensor] = []
        self.text_rows: list[Tensor] = []
        for path in parts:
            self._read(path)
        if not self.captions:
            raise DataError(f"encoded:{argument} holds no image that could be read.")

    @property
    def backbone(self) -> str:
        """What identifies the backbone that encoded them."""
        record = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        return str(record["backbone"])

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, index: int) -> str:
        """See :meth:`CaptionSource.caption`."""
        return self.captions[index]

    def image(self, index: int) -> Image.Image:
        """See :meth:`CaptionSource.image`; there is none."""
        raise DataError(
            f"{self.folder} has features of images and no pixels: a learner that enters the image tower needs pairs "
            "that are read from their images, such as tar:PATTERN."
        )

    def identity(self) -> str:
        """See :meth:`CaptionSource.identity`."""
        return hash_strings([self.backbone, *self.captions])

    def stamp(self, index: int) -> str:
        """See :meth:`CaptionSource.stamp`."""
        return ""

    def _read(self, path: Path) -> None:
        arrow = _import_pyarrow()
        try:
            table = arrow.parquet.read_table(path)
            absent = [name for name in _COLUMNS if name not in table.column_names]
            if absent:
                raise DataError(f"{path} has no column {absent[0]!r}: encode with --pairs.")
            table = table.filter(arrow.compute.is_valid(table.column("feature")))
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is no readable Parquet file: {error}.") from None

        if not table.num_rows:
            return
        self.captions += table.column("caption").to_pylist()
        self.image_rows.append(_matrix(path, table, "feature"))
        self.text_rows.append(_matrix(path, table, "text"))


def _matrix(path: Path, table: Any, name: str) -> Tensor:
    """Return a column of equally long lists as (n, d) float16; there is at least one."""
    column = table.column(name)
    lengths = _import_pyarrow().compute.list_value_length(column).unique().to_pylist()
    if len(lengths) != 1:
        raise DataError(
            f"{path}: the rows of {name!r} have {min(lengths)} to {max(lengths)} numbers, not as many each."
        )
    values = np.asarray(column.combine_chunks().flatten()).reshape(-1, *lengths)
    return torch.from_numpy(values.astype(np.float16))


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet  # an extra of the package
    except ImportError:
        raise VLPromptError("encoded:FOLDER needs pyarrow: pip install 'vlprompt[ray]'.") from None
    return pyarrow
