"""Shards through Ray Data: a stream of names goes to a pool of actors, and a stream of counts comes back.

A name is all that travels to an actor, and counts are all that travels back: images go from the shard into the actor's
memory, results from there into a Parquet file. So Ray's object store holds nothing that grows with the images. An actor
takes its next shard when it is done with the last (back-pressure); one that dies is started again, and its shard with
it, of which nothing was kept.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.core.options import describe_problems
from vlprompt.core.processes import set_threads

__all__ = ["spread"]

Does = Callable[[str], dict[str, Any]]

_BLOCKS_EACH = 64  # blocks of names for each actor: many, so that none waits for long at the end
_STORE_BYTES = 128 << 20  # of a Ray that is started here: names and counts


class _Options(BaseModel):
    """What stands behind ``ray:``, beside the address."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    workers: int | None = Field(None, ge=1)


class _Actor:
    """Does items one after the other.

    Args:
        kind: Makes what does them.
        arguments: Of its constructor.
        threads: That it computes with.
    """

    def __init__(self, kind: Callable[..., Does], arguments: tuple[Any, ...], threads: int) -> None:
        set_threads(threads)
        self.does = kind(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what became of items, as JSON: columns of one type travel best."""
        return {"record": [json.dumps(self.does(str(item))) for item in batch["item"]]}


def spread(
    kind: Callable[..., Does], arguments: tuple[Any, ...], items: Sequence[str], on: str
) -> Iterator[dict[str, Any]]:
    """Yield what becomes of items as they end.

    Args:
        kind: Makes, in every actor, what is called with each item and returns a record that JSON can hold.
        arguments: Of its constructor.
        items: Names of what is to be done.
        on: ``ray[:ADDRESS][,cpus=1,gpus=0,workers=N]``; without an address a Ray is started here and ended behind the
            work. Without ``workers`` there are as many as the cluster has room for.

    Raises:
        VLPromptError: If ray isn't installed, there is no cluster at the address, or an option is none.
    """
    if not items:
        return
    address, options = _parse(on)
    ray = _import_ray()
    was_there = ray.is_initialized()
    _connect(ray, address)
    try:
        workers = min(options.workers or _room(ray, options), len(items))
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = min(len(items), _BLOCKS_EACH * workers)
        stream = ray.data.from_items([{"item": item} for item in items], override_num_blocks=blocks)
        stream = stream.map_batches(
            _Actor,
            fn_constructor_args=(kind, arguments, max(1, int(options.cpus))),
            batch_size=1,
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        )
        for row in stream.iter_rows():
            yield json.loads(row["record"])
    finally:
        if not was_there:
            ray.shutdown()


def _parse(on: str) -> tuple[str, _Options]:
    words = [word for word in on.removeprefix("ray").lstrip(":,").split(",") if word]
    addresses = [word for word in words if "=" not in word]
    if len(addresses) > 1:
        raise VLPromptError(f"--on ray takes one address; got {' and '.join(addresses)}.")
    content = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        return (addresses[0] if addresses else ""), _Options.model_validate(content)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, _Options), "--on ray") from error


def _import_ray() -> Any:
    try:
        import ray
        import ray.data  # an extra of the package
    except ImportError:
        raise VLPromptError("--on ray needs ray: pip install 'vlprompt[ray]'.") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    """Join a cluster, or start one on this machine."""
    if ray.is_initialized():
        return

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise VLPromptError(f"--on ray: there is no Ray at {address or 'this machine'}: {reason}") from error


def _room(ray: Any, options: _Options) -> int:
    """Return how many actors a cluster has room for, at least one; Ray Data wants a core for itself."""
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 1) / options.cpus)
    if options.gpus:
        room = min(room, int(resources.get("GPU", 0) / options.gpus))
    return max(1, room)
