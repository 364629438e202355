"""Loading: what is read, decoded and augmented, in worker processes, for everything that looks at images.

Training, evaluation, feature caches, adaptation, segmentation, detection, scanning and caption stores all read through
:class:`Loader`. A result depends on its item alone, and results come in the order of their items, so the number of
workers changes no bit of anything.

Workers are forked on Linux, which is quick and needs nothing to be pickled; a worker computes with one thread, so the
parent's thread pools, which a fork does not copy, are never used. Elsewhere they are spawned.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from itertools import chain
from types import TracebackType
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlprompt.core.errors import DataError
from vlprompt.core.options import as_whole

__all__ = ["Loader", "Workers", "check_workers", "takes_workers", "using_workers"]

log = logging.getLogger("vlprompt.run")

Workers = int | Literal["auto"]
"""A number of loading processes; 0 loads in this one; ``"auto"`` chooses by the cores and the cost of a sample."""

Item = TypeVar("Item")
Result = TypeVar("Result")
_P = ParamSpec("_P")
_R = TypeVar("_R")

MOST = 8  # workers that "auto" starts
_AHEAD = 2  # items that each worker has loaded or is loading
_START_SECONDS = {"fork": 0.5, "spawn": 10.0}  # work below which starting workers does not pay
_LEAST_SECONDS = 0.003  # cost of an item below which handing it over between processes does not pay
_SHARED = "/dev/shm"

_present: ContextVar[Workers] = ContextVar("workers", default="auto")


def check_workers(workers: Any) -> Workers:
    """Return a number of workers.

    Raises:
        DataError: If it is neither ``"auto"`` nor a whole number from 0 on.
    """
    if workers == "auto":
        return "auto"
    workers = as_whole(workers)
    if isinstance(workers, int) and not isinstance(workers, bool) and workers >= 0:
        return workers
    raise DataError(f"workers must be 'auto' or a whole number from 0 on, got {workers!r}.")


@contextmanager
def using_workers(workers: Workers | None) -> Iterator[None]:
    """Let every :class:`Loader` that is made inside have so many workers; None leaves it as it is.

    Raises:
        DataError: See :func:`check_workers`.
    """
    if workers is None:
        yield
        return

    token = _present.set(check_workers(workers))
    try:
        yield
    finally:
        _present.reset(token)


def takes_workers(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function's keyword ``workers`` hold for everything that it loads (see :func:`using_workers`)."""

    @wraps(function)
    def with_workers(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with using_workers(kwargs.get("workers")):  # type: ignore[arg-type]
            return function(*args, **kwargs)

    return with_workers


class Loader(Generic[Item, Result]):
    """Loads items in worker processes that live as long as it does; a context manager.

    The first items are loaded here: what they cost tells whether workers pay, and their size whether shared memory
    holds what workers load ahead. Where it does not, results come through a pipe.

    Args:
        fetch: Returns what an item stands for: tensors, or lists, tuples and dicts that hold some. It must depend on
            the item alone, and not use a GPU. Errors that it raises are raised here as they are.
        workers: None for what :func:`using_workers` says, else ``"auto"``.
        expected: Items that will be asked for in all, if more than the first :meth:`stream` has; for ``"auto"``.
        pin: Put tensors into page-locked memory, from which a GPU copies them while it computes.
        start: How processes start, ``"fork"`` or ``"spawn"``; None for the platform's.

    Raises:
        DataError: For an impossible number of workers.
    """

    def __init__(
        self,
        fetch: Callable[[Item], Result],
        *,
        workers: Workers | None = None,
        expected: int = 0,
        pin: bool = False,
        start: Literal["fork", "spawn"] | None = None,
    ) -> None:
        # A script without `if __name__ == "__main__"` is run again by a spawned worker; that worker ends here, and the
        # process that wanted it loads by itself.
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            sys.exit(1)

        self.fetch = fetch
        self.pin = pin
        self.method = start or ("fork" if sys.platform == "linux" else "spawn")
        self._wanted = check_workers(_present.get() if workers is None else workers)
        self._expected = expected
        self._seconds: list[float] = []
        self._packed: bool | None = None
        self._items: _Items[Item] = _Items()
        self._loader: DataLoader[Any] | None = None
        self._results: Any = None  # torch's iterator, which owns the workers
        self._delivered = False

        # Processes that belong to a daemonic one can't have any of their own.
        if multiprocessing.current_process().daemon:
            self._wanted = 0

    def stream(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield what every item stands for, in order, while workers load the next ones.

        Args:
            items: Small things, since they are sent to other processes; an iterable is read a few items ahead.

        Raises:
            DataError: If a worker was killed; says why that happens and what helps.
        """
        left = max(len(items) if isinstance(items, Sized) else 0, self._expected)
        known = isinstance(items, Sized) or self._expected > 0
        rest = iter(items)

        if self._loader is None:
            for item in rest:
                started = time.perf_counter()
                result = self.fetch(item)
                self._seconds.append(time.perf_counter() - started)
                left -= 1
                self._expected = max(0, self._expected - 1)

                # What is decided before the result is used: afterwards its memory may be gone.
                count = self._count(left if known else None)
                if count:
                    self._start(count, result)
                yield result
                if count:
                    break
        if self._loader is not None:
            yield from self._from_workers(rest)

    def close(self) -> None:
        """End the workers."""
        self._loader = None
        results, self._results = self._results, None
        if results is not None:
            # Not left to the garbage collector: the traceback of an error would keep them alive.
            try:
                results._shutdown_workers()
            except RuntimeError as error:
                # The news that a worker died may arrive while its end is waited for. All of them have ended then.
                if not _death(error):
                    raise

    def __enter__(self) -> Loader[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        # The news that a worker died may arrive while the caller works on an earlier result.
        if isinstance(error, RuntimeError) and (reason := _death(error)):
            raise DataError(reason) from None

    def _count(self, left: int | None) -> int:
        """Return how many workers to start before the next item, 0 for none.

        Args:
            left: Items that are still to come, None if nobody knows.
        """
        if left == 0:
            return 0
        if self._wanted != "auto":
            return self._wanted

        cost = min(self._seconds[-2:])
        # The first item often costs more than the others: modules are imported, files are opened.
        if cost < _LEAST_SECONDS or (len(self._seconds) < 2 and cost < 0.1):
            return 0
        coming = sum(self._seconds) if left is None else cost * left
        if coming < _START_SECONDS[self.method]:
            return 0
        return min(MOST, _cores()) if left is None else min(MOST, _cores(), left)

    def _start(self, count: int, sample: Result) -> None:
        """Make ready for workers; the first item that is asked for starts them."""
        needed = _bytes(sample) * (count * _AHEAD + 1)
        free = _free_shared_memory()
        self._packed = needed > free
        if self._packed:
            log.warning(
                "%s has %.0f MB free and loading by %d workers takes %.0f: batches come through a pipe, which is "
                "slower. In a container: --shm-size=2g, or loading.workers=0.",
                _SHARED,
                free / 1e6,
                count,
                needed / 1e6,
            )

        with _quiet():
            self._loader = DataLoader(
                _Source(self.fetch, self._packed),
                batch_size=None,
                sampler=self._items,
                num_workers=count,
                collate_fn=_as_it_is,
                pin_memory=self.pin,
                worker_init_fn=_prepare,
                multiprocessing_context=self.method,
                prefetch_factor=_AHEAD,
                persistent_workers=True,
                generator=torch.Generator(),  # torch's own stream of random numbers stays untouched
            )

    def _from_workers(self, rest: Iterator[Item]) -> Iterator[Result]:
        loader = self._loader
        assert loader is not None
        self._items.begin(rest)

        results: Any = None
        while True:
            try:
                if results is None:
                    with _quiet(), _without_interrupts():
                        results = self._results = iter(loader)
                result: Any = next(results, _End())
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                yield from self._alone(rest, f"what they need can't be sent to them ({error})")
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                if not (reason := _death(error)):
                    raise
                if self._delivered or self.method == "fork" or "killed" in reason:
                    self.close()
                    raise DataError(reason) from None
                why = 'they ended at once; a script\'s own lines belong under `if __name__ == "__main__":`'
                yield from self._alone(rest, why)
                return

            if isinstance(result, _End):
                return
            self._delivered = True
            self._items.pending.popleft()
            if isinstance(result, _Failure):
                raise result.error()
            yield _unpacked(result) if self._packed else result

    def _alone(self, rest: Iterator[Item], why: str) -> Iterator[Result]:
        """Go on without workers: with what they were given and did not bring, then with the rest."""
        log.warning("there are no loading workers: %s. Images are loaded in this process.", why)
        self.close()
        self._wanted = 0
        for item in chain(list(self._items.pending), rest):
            yield self.fetch(item)


class _Items(Sampler[Item]):
    """Items in the place of sample numbers; remembers those whose results have not come yet."""

    def __init__(self) -> None:
        self.pending: deque[Item] = deque()
        self._rest: Iterator[Item] = iter(())

    def begin(self, rest: Iterator[Item]) -> None:
        """Take the items of a new stream."""
        self.pending.clear()
        self._rest = rest

    def __iter__(self) -> Iterator[Item]:
        for item in self._rest:
            self.pending.append(item)
            pickle.dumps(
                item
            )  # what can't be sent is an error here; torch's queue would wait for it without end
            yield item


class _Source(Dataset[Any]):
    """What runs in a worker."""

    def __init__(self, fetch: Callable[[Any], Any], packed: bool) -> None:
        self.fetch = fetch
        self.packed = packed

    def __getitem__(self, item: Any) -> Any:
        try:
            result = self.fetch(item)
        except Exception as error:  # raised where the user sees it, as the error that it is
            return _Failure.of(error)
        return _packed(result) if self.packed else result


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker; errors of ours take other arguments than their message, so pickle fails."""

    kind: type[Exception]
    args: tuple[Any, ...]
    state: dict[str, Any]
    trace: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        """Return what is sent of an error."""
        trace = traceback.format_exc()
        failure = cls(type(error), error.args, dict(error.__dict__), trace)
        try:
            pickle.dumps(failure)
        except Exception:
            return cls(RuntimeError, (f"{type(error).__name__}: {error}",), {}, trace)
        return failure

    def error(self) -> Exception:
        """Return the error again; one that is a fault of a program brings the lines where it happened."""
        error = self.kind.__new__(self.kind, *self.args)
        error.__dict__.update(self.state)
        if not isinstance(error, DataError):
            error.__notes__ = [*getattr(error, "__notes__", []), f"In a loading worker:\n{self.trace}"]
        return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what is known: a fork beside threads (see the head of this module), more workers than cores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while workers start: they are born deaf to it, and this process hears it when all are there."""
    can_hold = hasattr(signal, "pthread_sigmask") and threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_hold else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _End:
    """What comes behind the last result."""


def _as_it_is(result: Result) -> Result:
    return result


def _prepare(number: int) -> None:
    """Make a worker ready: Ctrl-C is the parent's business, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cores() -> int:
    """Return the cores that loading may use: this process's share of those that the machine gives it."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    # One of several cells of a run, each of which has its share of the threads.
    limit = int(os.environ.get("LOKY_MAX_CPU_COUNT", "0") or 0)
    available = min(available, limit) if limit else available
    return max(1, available // processes)


def _free_shared_memory() -> float:
    try:
        return float(shutil.disk_usage(_SHARED).free)
    except OSError:
        return float("inf")  # a platform that has its shared memory elsewhere


def _death(error: BaseException) -> str:
    """Return what to say of a worker's death, empty if that is not what an error of torch's is about."""
    text = str(error)
    # Where a worker is gone before its tensor was taken over, nobody answers for the tensor.
    is_unanswered = isinstance(error, (ConnectionError, EOFError))
    if not is_unanswered and not re.match(r"DataLoader worker \(pid", text):
        return ""
    advice = "Load with fewer (loading.workers=1, or 0 for none) or in smaller batches."
    if "Bus error" in text or "shared memory" in text:
        return (
            f"a loading worker was killed: {_SHARED}, through which it hands over images, is full. {advice}"
        )
    if "Killed" in text:
        return f"a loading worker was killed, most likely because memory ran out. {advice}"
    # What torch says where it finds a worker gone before it hears of the signal.
    return f"a loading worker ended unexpectedly, most likely because memory ran out. {advice}"


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply a change to everything that containers hold."""
    if isinstance(value, dict):
        return {key: _map(change, part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(change, part) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(change, part) for part in value)
    if is_dataclass(value) and not isinstance(value, (type, _Packed)):
        parts = {part.name: _map(change, getattr(value, part.name)) for part in fields(value)}
        return replace(value, **parts)
    return change(value)


@dataclass(frozen=True)
class _Packed:
    """A tensor as it goes through a pipe."""

    values: np.ndarray[Any, Any]


def _packed(value: Any) -> Any:
    return _map(lambda part: _Packed(part.numpy()) if isinstance(part, torch.Tensor) else part, value)


def _unpacked(value: Any) -> Any:
    return _map(lambda part: torch.from_numpy(part.values) if isinstance(part, _Packed) else part, value)


def _bytes(value: Any) -> int:
    """Return the size of all tensors."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    if is_dataclass(value):
        return sum(_bytes(getattr(value, part.name)) for part in fields(value))
    return 0
