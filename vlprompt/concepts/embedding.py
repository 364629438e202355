"""Concept embeddings: vectors in the space that a text encoder writes to, searched there directly.

Paper: Yi et al., "ConES: Concept Embedding Search for Parameter Efficient Tuning Large Vision Language Models", arXiv
2305.18993. Known of it (abstract): embeddings are optimised where the text encoder's output would stand, by the task's
own loss, the visual model frozen; the text encoder is neither run nor differentiated. No code was published, so what
is here is a reconstruction: the shapes, where a search starts from, what concepts may share, and all defaults.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.options import describe_problems
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import torch_rng

__all__ = ["ConceptEmbedding", "Concepts", "Kind", "Share", "normal_start", "repeated", "visual_start"]

Kind = Literal["classifier", "detector", "generator", "segmenter"]
Share = Literal["class", "global"]
_FORMAT = 1


class ConceptEmbedding(nn.Module):
    """C concepts of L vectors, to be learned.

    Args:
        concepts: C.
        length: L, vectors per concept.
        width: d, of the text encoder's output.
        share: One learned set per concept (``class``), or one shift that all concepts share (``global``).
        absolute: Learn the vectors themselves instead of their distance from the start. Both reach the same vectors;
            weight decay pulls one towards zero and the other back to the start.

    Attributes:
        start: (C, L, d) where the search starts, or None before :meth:`begin`.
        offset: What is learned: (C, L, d), or (1, L, d) if it is shared.

    Raises:
        DataError: If shared vectors should be absolute, which would make all concepts the same.
    """

    start: Tensor | None

    def __init__(
        self, concepts: int, length: int, width: int, share: Share = "class", absolute: bool = False
    ) -> None:
        super().__init__()
        if absolute and share == "global":
            raise DataError("absolute vectors can't be shared: all concepts would be one. Learn an offset.")
        self.shape = (concepts, length, width)
        self.absolute = absolute
        rows = 1 if share == "global" else concepts
        self.offset = nn.Parameter(torch.zeros(rows, length, width))
        self.register_buffer("start", None, persistent=False)

    def begin(self, start: Tensor) -> None:
        """Start the search at (C, L, d) vectors; what was learned before is forgotten.

        Raises:
            DataError: If they have another shape or are not finite.
        """
        finite = bool(torch.isfinite(start).all())
        if tuple(start.shape) != self.shape or not finite:
            raise DataError(
                f"a search of concepts {self.shape} can't start from {tuple(start.shape)} vectors"
                f"{'' if finite else ' that are not finite'}."
            )

        self.start = start.detach().float().to(self.offset.device).clone()
        with torch.no_grad():
            self.offset.copy_(self.start) if self.absolute else self.offset.zero_()

    def forward(self) -> Tensor:
        """Return the (C, L, d) vectors.

        Raises:
            DataError: If the search has no start yet.
        """
        if self.start is None:
            raise DataError("the search of concepts has no start yet; call begin() first.")
        return self.offset if self.absolute else self.start + self.offset


class ConceptCard(BaseModel):
    """What a concept file says of its vectors."""

    model_config = ConfigDict(extra="forbid")

    format: int
    kind: Kind
    names: list[str]
    host: dict[str, Any]
    facts: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Concepts:
    """Learned concepts, with all that is needed to use them without a text encoder: one small file.

    Attributes:
        kind: What they were searched for.
        vectors: (C, L, d) float32, as the host reads them.
        names: C names.
        host: Facts that identify the model they belong to.
        facts: What else its user needs (pooling, mode, ...); JSON-able.
    """

    kind: Kind
    vectors: Tensor
    names: tuple[str, ...]
    host: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically.

        Raises:
            CheckpointError: If it can't be written; an older file stays.
        """
        tensors = {"vectors": self.vectors.detach().float().cpu().contiguous()}
        card = ConceptCard(
            format=_FORMAT,
            kind=self.kind,
            names=list(self.names),
            host=self.host,
            facts=self.facts,
            digest=_digest(tensors),
        )
        write_tensors(user_path(path), tensors, {"concepts": card.model_dump()})
        return user_path(path)

    @classmethod
    def load(cls, path: str | Path, kind: Kind) -> Concepts:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            kind: What the caller can use.

        Raises:
            CheckpointError: If it is missing, damaged, no concept file, or of another kind.
        """
        tensors, metadata = read_tensors(user_path(path))
        try:
            card = ConceptCard.model_validate(metadata.get("concepts"))
        except ValidationError as error:
            problem = describe_problems(error, ConceptCard)[0]
            raise CheckpointError(f"{path} is no concept file: {problem}") from error

        if card.format > _FORMAT:
            raise CheckpointError(f"{path} was written by a newer vlprompt.")
        if card.kind != kind:
            raise CheckpointError(f"{path} holds concepts of a {card.kind}; a {kind} can't use them.")
        vectors = tensors.get("vectors")
        if vectors is None or _digest(tensors) != card.digest or vectors.dim() != 3:
            raise CheckpointError(f"{path} does not match its own checksum; it is damaged.")
        if len(vectors) != len(card.names):
            raise CheckpointError(f"{path} holds {len(vectors)} concepts, but {len(card.names)} names.")
        return cls(kind, vectors, tuple(card.names), card.host, card.facts)

    def check_host(self, host: dict[str, Any], source: str | Path = "the concept file") -> None:
        """Refuse another model than the one the concepts were searched on.

        Args:
            host: Facts that identify the model to use them with.
            source: Where the concepts come from, for messages.

        Raises:
            CheckpointError: Names every difference.
        """
        different = [key for key in sorted({*self.host, *host}) if self.host.get(key) != host.get(key)]
        if different:
            lines = [f"  - {key}: saved {self.host.get(key)!r}, given {host.get(key)!r}" for key in different]
            raise CheckpointError(
                "\n".join([f"{source} belongs to another model than the one given:", *lines])
            )


def repeated(start: Tensor, length: int, jitter: float = 0.0, seed: int = 1) -> Tensor:
    """Return (C, L, d) starts from (C, d) vectors.

    Args:
        start: (C, d).
        length: L.
        jitter: Length of the noise that moves the vectors apart, as a share of a vector's own. Vectors of a concept
            that start equal would stay equal.
        seed: Of the noise.
    """
    vectors = start[:, None].repeat(1, length, 1).float()
    if length == 1 or not jitter:
        return vectors

    noise = torch.randn(vectors.shape, generator=torch_rng(seed, "concepts", "jitter")).to(vectors.device)
    lengths = vectors.norm(dim=-1, keepdim=True)
    # Noise of width d has the length sqrt(d) on average.
    return vectors + jitter * lengths * noise / vectors.shape[-1] ** 0.5


def normal_start(
    shape: tuple[int, int, int], like: Tensor | None, seed: int = 1, sigma: float = 0.02
) -> Tensor:
    """Return normal noise with the spread of a text encoder's outputs.

    Args:
        shape: (C, L, d).
        like: Outputs of the encoder, whose standard deviation is taken; None: ``sigma`` is.
        seed: Of the noise.
        sigma: Standard deviation without an encoder.
    """
    spread = sigma if like is None else float(like.float().std())
    return spread * torch.randn(shape, generator=torch_rng(seed, "concepts", "normal"))


def visual_start(features: Tensor, labels: Tensor, names: Sequence[str], norm: float) -> Tensor:
    """Return (C, d) mean directions of each concept's visual features, at a text output's length.

    Args:
        features: (n, d) of images or regions.
        labels: (n,) numbers of concepts.
        names: C names.
        norm: Mean length of the text encoder's outputs.

    Raises:
        DataError: If a concept has no feature; names it.
    """
    unit = nn.functional.normalize(features.float(), dim=-1)
    sums = unit.new_zeros(len(names), unit.shape[-1]).index_add(0, labels, unit)
    counts = torch.bincount(labels, minlength=len(names))
    if not bool((counts > 0).all()):
        missing = names[int((counts == 0).nonzero()[0])]
        raise DataError(f"init='visual' needs training samples of every concept; {missing!r} has none.")
    return norm * nn.functional.normalize(sums, dim=-1)


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(tensors_to_bytes(tensors)).hexdigest()
