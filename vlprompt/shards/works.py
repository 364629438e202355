"""What is done with every image of a shard: scanned for triggers, named, encoded, encoded with its caption."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.classification.predict import Classifier, predict_batch
from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.data.decoding import decode
from vlprompt.learners import Learner
from vlprompt.learners._scanning import ImageScanner
from vlprompt.security.scan import POISONED, LookedAt, verdict_rows
from vlprompt.shards.reading import ShardImage, import_pyarrow

__all__ = ["BatchReader", "Decoded", "Encoding", "Naming", "Pairs", "Scanning", "Work"]


@dataclass(frozen=True)
class Decoded:
    """A batch of n images.

    Attributes:
        names: Of all.
        errors: Why an image can't be read; empty for those that can.
        captions: Of all.
        pixels: (m, 3, H, W) of the m that can be read; None if none can.
    """

    names: list[str]
    errors: list[str]
    captions: list[str]
    pixels: Tensor | None


@dataclass(frozen=True)
class BatchReader:
    """Decodes a batch, in a loading worker."""

    preprocess: Callable[[Image.Image], Tensor]

    def __call__(self, images: Sequence[ShardImage]) -> Decoded:
        """Return the batch."""
        errors = []
        pixels = []
        for image in images:
            error = image.error
            if image.data is not None:
                try:
                    pixels.append(self.preprocess(decode(image.data, image.name)))
                except DataError as failure:
                    error = str(failure)
            errors.append(error)

        names = [image.name for image in images]
        captions = [image.caption for image in images]
        return Decoded(names, errors, captions, torch.stack(pixels) if pixels else None)


class Work(ABC):
    """What is done with every image.

    Attributes:
        captions: Whether it needs captions.
        preprocess: What makes (3, H, W) of an image.
        device: Where it computes.
    """

    captions: ClassVar[bool] = False
    preprocess: Callable[[Image.Image], Tensor]
    device: torch.device

    @abstractmethod
    def schema(self) -> Any:
        """Return the columns of the results, as pyarrow has them."""

    @abstractmethod
    def table(self, batch: Decoded) -> Any:
        """Return the results of a batch, a row for each of its n images, as a table of pyarrow."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what results depend on, as JSON-able data."""

    def suspected(self, table: Any) -> int:
        """Return how many rows of a table ask for somebody to look at them."""
        return 0


class Naming(Work):
    """Names images.

    Args:
        classifier: A learner, or what was exported.
        topk: Names per image.
        described: What identifies the classifier.
    """

    def __init__(self, classifier: Classifier, topk: int, described: dict[str, Any]) -> None:
        if isinstance(classifier, Learner):
            classifier.eval()
        self.classifier = classifier
        self.topk = topk
        self.described = described
        self.preprocess = classifier.preprocess
        self.device = classifier.device

    def schema(self) -> Any:
        """See :meth:`Work.schema`."""
        arrow = import_pyarrow()
        text = arrow.string()
        return arrow.schema(
            {"image": text, "labels": arrow.list_(text), "probs": arrow.list_(arrow.float32()), "error": text}
        )

    def table(self, batch: Decoded) -> Any:
        """See :meth:`Work.table`."""
        readable = [i for i, error in enumerate(batch.errors) if not error]
        pixels = {} if batch.pixels is None else dict(zip(readable, batch.pixels, strict=True))
        errors = {i: error for i, error in enumerate(batch.errors) if error}
        rows = predict_batch(self.classifier, batch.names, pixels, errors, self.topk)
        return import_pyarrow().Table.from_pylist(rows, self.schema())

    def identity(self) -> dict[str, Any]:
        """See :meth:`Work.identity`."""
        return {"topk": self.topk, **self.described}


class Scanning(Work):
    """Looks for backdoor triggers.

    Args:
        scanner: One that judges single images.
        threshold: The score from which an image is suspected.

    Raises:
        DataError: If the scanner judges whole sets only.
    """

    def __init__(self, scanner: ImageScanner, threshold: float) -> None:
        if scanner.needs_whole_set:
            raise DataError(f"{scanner.method} judges whole labelled data sets, not a stream of images.")
        self.scanner = scanner
        self.threshold = threshold
        self.preprocess = scanner.preprocess
        self.device = scanner.backbone.device

    def schema(self) -> Any:
        """See :meth:`Work.schema`."""
        arrow = import_pyarrow()
        text = arrow.string()
        return arrow.schema(
            {
                "image": text,
                "trigger": text,
                "object": text,
                "score": arrow.float64(),
                "verdict": text,
                "note": text,
            }
        )

    @torch.no_grad()
    def table(self, batch: Decoded) -> Any:
        """See :meth:`Work.table`."""
        pixels = batch.pixels
        verdicts = None if pixels is None else self.scanner.judge(self.scanner.embed_images(pixels))
        looked = [
            LookedAt(name, not error, error) for name, error in zip(batch.names, batch.errors, strict=True)
        ]
        rows = list(verdict_rows(looked, verdicts, self.scanner, self.threshold))
        return import_pyarrow().Table.from_pylist(rows, self.schema())

    def identity(self) -> dict[str, Any]:
        """See :meth:`Work.identity`."""
        scanner = self.scanner
        return {
            "method": scanner.method,
            "backbone": scanner.backbone.features_id,
            "detector": scanner.digest,
            "objects": list(scanner.classnames),
            "threshold": self.threshold,
        }

    def suspected(self, table: Any) -> int:
        """See :meth:`Work.suspected`."""
        return table.column("verdict").to_pylist().count(POISONED)


class Encoding(Work):
    """Encodes images; features are unit length, float32.

    Args:
        backbone: Encodes them.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.preprocess = backbone.preprocess
        self.device = backbone.device

    def schema(self) -> Any:
        """See :meth:`Work.schema`."""
        arrow = import_pyarrow()
        row = arrow.list_(
            arrow.float32()
        )  # of a fixed length, pyarrow before 26 could not read those with nulls
        return arrow.schema({"image": arrow.string(), "error": arrow.string(), "feature": row})

    def table(self, batch: Decoded) -> Any:
        """See :meth:`Work.table`."""
        arrow = import_pyarrow()
        columns = [arrow.array(batch.names), arrow.array(batch.errors), self._features(batch)]
        return arrow.Table.from_arrays(columns, schema=self.schema())

    def identity(self) -> dict[str, Any]:
        """See :meth:`Work.identity`."""
        return {"backbone": self.backbone.features_id, "dim": self.backbone.dim}

    @torch.no_grad()
    def _features(self, batch: Decoded) -> Any:
        """Return n features as a column; null where an image can't be read."""
        if batch.pixels is None:
            return _column([None] * len(batch.names), self.schema().field("feature").type)

        rows = self.backbone.encode_image(batch.pixels.to(self.device)).float().cpu()
        _check_finite(rows, [n for n, e in zip(batch.names, batch.errors, strict=True) if not e])
        values = iter(rows.numpy())
        placed = [None if error else next(values) for error in batch.errors]
        return _column(placed, self.schema().field("feature").type)


class Pairs(Encoding):
    """Encodes captioned images and their captions: the pairs that meta-training is made of, see ``encoded:FOLDER``."""

    captions: ClassVar[bool] = True

    def schema(self) -> Any:
        """See :meth:`Work.schema`."""
        arrow = import_pyarrow()
        row = arrow.list_(arrow.float32())
        text = arrow.string()
        return arrow.schema({"image": text, "caption": text, "error": text, "feature": row, "text": row})

    @torch.no_grad()
    def table(self, batch: Decoded) -> Any:
        """See :meth:`Work.table`."""
        arrow = import_pyarrow()
        texts = self.backbone.encode_text(batch.captions).float().cpu()
        _check_finite(texts, batch.names)
        columns = [
            arrow.array(batch.names),
            arrow.array(batch.captions),
            arrow.array(batch.errors),
            self._features(batch),
            _column(list(texts.numpy()), self.schema().field("text").type),
        ]
        return arrow.Table.from_arrays(columns, schema=self.schema())


def _column(rows: Sequence[Any], kind: Any) -> Any:
    return import_pyarrow().array(list(rows), type=kind)


def _check_finite(rows: Tensor, names: Sequence[str]) -> None:
    bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(f"the features of {names[bad[0]]} are not finite.")
