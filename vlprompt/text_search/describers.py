"""Descriptions of training images, for proposers that read. A describer never sees a label."""

from __future__ import annotations

import base64
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.options import check_options
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import numpy_rng
from vlprompt.data import ImageDataset
from vlprompt.text_search.budget import Budget, BudgetSpentError
from vlprompt.text_search.proposers.chat import Chat
from vlprompt.text_search.templates import masked
from vlprompt.text_search.transcript import Exchange

__all__ = ["Describer", "check_describer", "create_describer", "described"]

_KINDS = ("captions", "chat", "file:PATH")
_LONGEST = 300  # characters of a description
_SIDE = 336  # pixels to which an image is shrunk before it is sent
_QUESTION = (
    "Describe what this picture looks like in one short sentence: medium, colours, background, viewpoint, quality. Do "
    "not name the object."
)

Keep = Callable[[Exchange], None]


class Describer(ABC):
    """Says what training images look like.

    Attributes:
        identity: What it is.
    """

    identity: str

    @abstractmethod
    def describe(
        self, data: ImageDataset, most: int, seed: int, past: Sequence[Exchange], keep: Keep, budget: Budget
    ) -> list[str]:
        """Return descriptions of some images, as they came.

        Args:
            data: The training images.
            most: How many.
            seed: Of the choice of images.
            past: What was asked before a kill.
            keep: Writes an exchange into the transcript.
            budget: What may be spent.
        """


def check_describer(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a describer that does not exist, and options that it does not have.

    Raises:
        UnknownNameError: Names the kinds.
        ConfigError: For options.
    """
    if name in ("captions", "chat") or (name.startswith("file:") and name != "file:"):
        check_options(Chat if name == "chat" else _no_options, options, f"describer {name!r}")
        return
    raise UnknownNameError("describer", name, _KINDS)


def create_describer(name: str, options: Mapping[str, Any]) -> Describer:
    """Build a describer: ``captions``, ``chat`` or ``file:PATH``.

    Raises:
        UnknownNameError: For another name.
        ConfigError: For options that it does not have.
        DataError: If the file can't be read.
    """
    check_describer(name, options)
    if name == "captions":
        return _Captions()
    if name == "chat":
        return _Chat(Chat(**check_options(Chat, options, "describer 'chat'")))
    return _File(name.removeprefix("file:"))


def described(
    describer: Describer,
    data: ImageDataset,
    most: int,
    seed: int,
    past: Sequence[Exchange],
    keep: Keep,
    budget: Budget,
) -> list[str]:
    """Return descriptions on one line each, without class names and not too long; see :meth:`Describer.describe`."""
    texts = describer.describe(data, most, seed, past, keep, budget)
    cleaned = (masked(" ".join(text.split()), data.classnames)[:_LONGEST] for text in texts)
    return list(dict.fromkeys(text for text in cleaned if text))


def _no_options() -> None:
    """Stand for a describer without options."""


def _places(data: ImageDataset, most: int, seed: int) -> list[int]:
    order = numpy_rng(seed, "images to describe").permutation(len(data))
    return [int(place) for place in order[:most]]


class _Captions(Describer):
    """Captions that the data bring along (:meth:`vlprompt.data.base.Reader.caption`)."""

    identity = "captions"

    def describe(
        self, data: ImageDataset, most: int, seed: int, past: Sequence[Exchange], keep: Keep, budget: Budget
    ) -> list[str]:
        """See :meth:`Describer.describe`.

        Raises:
            DataError: If the data have none.
        """
        captions = [data.reader.caption(data.samples[place].source) for place in _places(data, most, seed)]
        if not any(captions):
            raise DataError(f"{data.name} brings no captions; use describer=file:PATH or chat.")
        return captions


class _File(Describer):
    """Lines of a text file."""

    def __init__(self, path: str) -> None:
        self.path = user_path(path)
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise DataError(f"describer file:{path}: it can't be read: {error}.") from None

        self.lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not self.lines:
            raise DataError(f"describer file:{path}: it holds no description. Write one on each line.")
        self.identity = f"file {hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def describe(
        self, data: ImageDataset, most: int, seed: int, past: Sequence[Exchange], keep: Keep, budget: Budget
    ) -> list[str]:
        """See :meth:`Describer.describe`."""
        return self.lines[:most]


class _Chat(Describer):
    """A chat model that sees the images, shrunk; the transcript has their hashes."""

    def __init__(self, chat: Chat) -> None:
        self.endpoint = chat.endpoint
        self.identity = f"chat {chat.endpoint.identity}"

    def describe(
        self, data: ImageDataset, most: int, seed: int, past: Sequence[Exchange], keep: Keep, budget: Budget
    ) -> list[str]:
        """See :meth:`Describer.describe`."""
        known = {exchange.request: exchange.reply for exchange in past if not exchange.error}
        texts = []
        for place in _places(data, most, seed):
            content = _shrunk(data[place][0])
            request = f"describe image {hashlib.sha256(content).hexdigest()[:16]}"
            if request not in known:
                try:
                    known[request] = self._ask(content, request, seed, keep, budget)
                except BudgetSpentError:
                    break
            texts.append(known[request])
        return texts

    def _ask(self, content: bytes, request: str, seed: int, keep: Keep, budget: Budget) -> str:
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        parts = [
            {"type": "text", "text": _QUESTION},
            {"type": "image_url", "image_url": {"url": url}},
        ]
        messages = [{"role": "user", "content": parts}]
        return self.endpoint.ask(messages, request, step=-1, seed=seed, budget=budget, keep=keep).reply


def _shrunk(image: Image.Image) -> bytes:
    """Return a PNG of an image of at most 336 pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()
