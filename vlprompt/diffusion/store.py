"""Generated images on disk: one lossless file each, in a folder named by a hash of the source image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import write_atomic, write_json
from vlprompt.core.paths import user_path
from vlprompt.data.decoding import read_image

__all__ = ["ViewStore"]

_FORMAT = 1


class ViewStore:
    """Variations of images by one generator with one seed.

    ``<root>/store.json`` describes them (pipeline weights, steps, guidance, ...); ``<root>/<ab>/<image>/<k>.png`` is
    variation k. Files are written atomically, so a killed process loses at most the image that it was generating.

    Args:
        root: The folder; it is created when something is written.

    Raises:
        CheckpointError: If the folder's ``store.json`` is damaged.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = user_path(root)
        self._card = self._read_card()

    @property
    def made_by(self) -> dict[str, Any]:
        """Identity of the generator whose views it holds, and the seed; empty before the first :meth:`claim`."""
        return dict(self._card.get("made_by", {}))

    def claim(self, identity: Mapping[str, Any], seed: int, title: str = "") -> None:
        """Record the generator and the seed of an empty store, or check those of one that is in use.

        Args:
            identity: See :class:`vlprompt.diffusion.Generator`.
            seed: Of its noise.
            title: Recorded, not compared: the same pipeline may be in another folder.

        Raises:
            CheckpointError: If it holds views of another one; names every difference.
        """
        # Through JSON, so that tuples and lists compare equal to what was read.
        wanted = json.loads(json.dumps({**identity, "seed": seed}))
        if not self._card:
            self._card = {"format": _FORMAT, "title": title, "made_by": wanted}
            write_json(self.root / "store.json", self._card)
            return

        stored = self._card["made_by"]
        differences = []

        for key in sorted({*stored, *wanted}):
            if stored.get(key) != wanted.get(key):
                differences.append(f"  - {key}: stored {stored.get(key)!r}, asked for {wanted.get(key)!r}")

        if differences:
            lines = "\n".join(differences)
            raise CheckpointError(
                f"{self.root} holds views of another generator ({self._card['title']}). Name another folder.\n{lines}"
            )

    def missing(self, key: str, n: int) -> list[int]:
        """Return which of an image's variations 0 .. n-1 are not in the store."""
        return [number for number in range(n) if not self._path(key, number).is_file()]

    def get(self, key: str, n: int) -> list[Image.Image]:
        """Return an image's first n variations.

        Raises:
            DataError: If one is missing or damaged; names the file.
        """
        return [read_image(self._path(key, number)) for number in range(n)]

    def put(self, key: str, k: int, image: Image.Image) -> None:
        """Write one variation, atomically.

        Raises:
            CheckpointError: If it can't be written.
        """
        write_atomic(self._path(key, k), lambda temporary: image.save(temporary, format="PNG"))

    def _path(self, key: str, k: int) -> Path:
        return self.root / key[:2] / key / f"{k}.png"

    def _read_card(self) -> dict[str, Any]:
        path = self.root / "store.json"
        if not path.is_file():
            return {}

        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            if card["format"] > _FORMAT:
                raise CheckpointError(f"{path} was written by a newer vlprompt.")
            return {"title": str(card["title"]), "made_by": dict(card["made_by"])}
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is not a view store's card: {error}.") from error
