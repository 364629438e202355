"""Work that several processes of one run share: each does its part, and all have the whole.

Two kinds. :func:`share_rows` divides independent samples (images to encode, to score, to adapt to) and gathers what
comes out, to the bit, in order. :class:`Division` divides the classes whose text features a training step needs, and
gathers them with their gradient. Both meet in collective calls, so every process has to come by the same places in the
same order: :func:`shared_work` and :func:`divided_classes` are opened only where that is so. Elsewhere every process
does all work itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlprompt.core.errors import ProcessLostError, VLPromptError

__all__ = [
    "Division",
    "divided_classes",
    "division",
    "lost_process",
    "part_sizes",
    "process_count",
    "share_rows",
    "shared_work",
    "shares_work",
]

_shares_work: ContextVar[bool] = ContextVar("shares_work", default=False)
_division: ContextVar[Division | None] = ContextVar("division", default=None)

# What gloo and NCCL say when another process is gone.
_SIGNS_OF_LOSS = ("closed by peer", "reset by peer", "broken pipe", "timed out", "remote process exited")


def process_count() -> int:
    """Return how many processes compute this run together; 1 outside ``torchrun`` and before it is set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def lost_process(error: BaseException) -> ProcessLostError | None:
    """Return what to raise for an error of a collective call that means another process is gone; None for others."""
    if isinstance(error, ProcessLostError):
        return error

    text = str(error).lower()
    if (
        isinstance(error, RuntimeError)
        and process_count() > 1
        and any(sign in text for sign in _SIGNS_OF_LOSS)
    ):
        return ProcessLostError(
            "another process of this run ended before its work was done. The same command continues the run."
        )
    return None


# --- samples


@contextmanager
def shared_work() -> Iterator[None]:
    """While open, :func:`share_rows` divides its samples among the processes; all of them have to open it."""
    token = _shares_work.set(process_count() > 1)
    try:
        yield
    finally:
        _shares_work.reset(token)


def shares_work() -> bool:
    """Return whether :func:`share_rows` divides work at the moment."""
    return _shares_work.get()


def share_rows(samples: int, unit: int, work: Callable[[range], Sequence[Tensor]]) -> list[Tensor]:
    """Return what ``work`` makes of all samples, each process computing its part, if work is shared.

    Parts are whole units but for the end, so that a process makes the very batches that it would make alone.

    Args:
        samples: n, at least 1.
        unit: Samples that stay together, for example a batch.
        work: Turns consecutive samples into tensors with one row per sample. Of every process the same number of
            tensors, of the same types and sizes of rows.

    Returns:
        The tensors of all samples, in order, on the CPU.

    Raises:
        VLPromptError: The first process's that made a mistake, in all of them.
        ProcessLostError: If a process is gone.
    """
    if not _shares_work.get():
        return [tensor.cpu() for tensor in work(range(samples))]

    units = -(-samples // unit)
    sizes = part_sizes(units, process_count())
    first = sum(sizes[: dist.get_rank()])
    own = range(unit * first, min(samples, unit * (first + sizes[dist.get_rank()])))

    failure: Exception | None = None
    tensors: list[Tensor] = []
    try:
        with _alone():  # what the work calls in turn is this process's own
            tensors = [tensor.detach().cpu().contiguous() for tensor in work(own)] if len(own) else []
    except Exception as error:
        failure = error

    return _gathered(tensors, failure)


def part_sizes(count: int, parts: int) -> list[int]:
    """Return the sizes of nearly equal parts, larger ones first."""
    return [count // parts + (number < count % parts) for number in range(parts)]


@contextmanager
def _alone() -> Iterator[None]:
    token = _shares_work.set(False)
    try:
        yield
    finally:
        _shares_work.reset(token)


def _gathered(tensors: Sequence[Tensor], failure: Exception | None) -> list[Tensor]:
    """Exchange tensors; a failure of any process is raised in all."""
    header: dict[str, Any] = {
        "shapes": [list(tensor.shape) for tensor in tensors],
        "types": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
    }
    if failure is not None:
        header["failure"] = str(failure) or type(failure).__name__
        header["mistake"] = isinstance(failure, VLPromptError)

    headers = [json.loads(bytes(row.tolist())) for row in _exchange(_as_bytes(header))]
    if failure is not None:
        raise failure
    for other in headers:
        if "failure" in other:
            kind = VLPromptError if other["mistake"] else RuntimeError
            raise kind(other["failure"])

    full = next(other for other in headers if other["shapes"])  # a process may have had no samples
    gathered = []
    for number, (shape, name) in enumerate(zip(full["shapes"], full["types"], strict=True)):
        own = tensors[number] if tensors else torch.empty(0, dtype=torch.uint8)
        rows = _exchange(own.reshape(-1).view(torch.uint8))
        parts = [row.view(getattr(torch, name)).reshape(-1, *shape[1:]) for row in rows if len(row)]
        gathered.append(torch.cat(parts))
    return gathered


def _as_bytes(facts: Mapping[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)


def _exchange(own: Tensor) -> list[Tensor]:
    """Return the bytes of every process, each as long as it was."""
    with _meeting():
        device = _device()
        length = torch.tensor([len(own)], device=device)
        lengths = [torch.empty_like(length) for _ in range(process_count())]
        dist.all_gather(lengths, length)

        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(own)] = own.to(device)
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(rows, padded)
    return [row[: int(n)].cpu() for row, n in zip(rows, lengths, strict=True)]


def _device() -> torch.device:
    """Return where collective calls want their tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def _meeting() -> Iterator[None]:
    """Say in one sentence if another process does not come."""
    try:
        yield
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise lost from error


# --- classes


class Division:
    """Text features that every process computes for its part of the classes.

    Args:
        count: Processes.
        index: Which of them this is.
        gather: Turns this process's (c, d) features into those of all (C, d) classes, with their gradient.

    Attributes:
        features: What was gathered while the division was open.
    """

    def __init__(self, count: int, index: int, gather: Callable[[Tensor, list[int]], Tensor]) -> None:
        self.count = count
        self.index = index
        self.features: list[Tensor] = []
        self._gather = gather

    def part(self, classes: int) -> range:
        """Return the classes that this process computes."""
        sizes = part_sizes(classes, self.count)
        first = sum(sizes[: self.index])
        return range(first, first + sizes[self.index])

    def gather(self, features: Tensor, classes: int) -> Tensor:
        """Return the (C, d) features of all classes from the (c, d) of this process's part.

        The gradient of a process's part is the sum of what the losses of all processes say about it, so the sum of the
        parameters' gradients over processes is that of one process that computes everything.
        """
        gathered = self._gather(features, part_sizes(classes, self.count))
        self.features.append(gathered)
        return gathered

    def anchor(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let every loss with a gradient read all gathered features.

        A loss may leave out a term that its samples don't need; the processes must meet in the backward pass anyway.
        """
        nothing = [0 * features.sum() for features in self.features]
        if not nothing:
            return dict(losses)
        zero = torch.stack(nothing).sum()
        return {name: value + zero if value.requires_grad else value for name, value in losses.items()}


@contextmanager
def divided_classes() -> Iterator[Division]:
    """While open, text towers divide classes among the processes (see :func:`division`).

    All processes must encode the same sentences with the same prompts, equally often, and go backward equally often.
    """
    opened = Division(process_count(), dist.get_rank(), _gather_with_gradient)
    token = _division.set(opened)
    try:
        yield opened
    finally:
        _division.reset(token)


def division() -> Division | None:
    """Return how classes are divided at the moment, or None where every process encodes all of them."""
    return _division.get()


def _gather_with_gradient(features: Tensor, sizes: list[int]) -> Tensor:
    gathered: Tensor = _Gather.apply(features, sizes)
    return gathered


class _Gather(torch.autograd.Function):
    """All processes' rows, in order; backward hands each process the sum of all gradients of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]

        with _meeting():
            dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        with _meeting():
            dist.all_reduce(total)
        rank = dist.get_rank()
        first = sum(ctx.sizes[:rank])
        return total[first : first + ctx.sizes[rank]], None
