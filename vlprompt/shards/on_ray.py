"""Shards through Ray Data: a stream of names goes to a pool of actors, and a stream of counts comes back.

A name is all that travels to an actor, and counts are all that travels back: images go from the shard into the actor's
memory, results from there into a Parquet file. So Ray's object store holds nothing that grows with the images. An actor
takes its next shard when it is done with the last (back-pressure); one that dies is started again, and its shard with
it, of which nothing was kept.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import Field

from vlprompt.core.errors import VLPromptError, first_line
from vlprompt.core.processes import set_threads
from vlprompt.core.ray_cluster import RayCluster, RayOptions, import_ray, read_ray_options

__all__ = ["check_ray", "spread"]

Does = Callable[[str], dict[str, Any]]

_BLOCKS_EACH = 64  # blocks of names for each actor: many, so that none waits for long at the end


class _Options(RayOptions):
    """What stands behind ``ray:``, beside the address."""

    workers: int | None = Field(
        None, ge=1, description="actors; without it as many as the cluster has room for"
    )


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


def check_ray(on: str) -> None:
    """Refuse what ``on`` can't mean, at once; arguments and errors as of :func:`spread`."""
    _read(on)
    import_ray()


def spread(
    kind: Callable[..., Does], arguments: tuple[Any, ...], items: Sequence[str], on: str
) -> Iterator[dict[str, Any]]:
    """Yield what becomes of items as they end.

    Args:
        kind: Makes, in every actor, what is called with each item and returns a record that JSON can hold.
        arguments: Of its constructor.
        items: Names of what is to be done.
        on: ``ray[:ADDRESS]``, options behind it with commas between them; without an address a Ray is started here
            and ended behind the work.

    Raises:
        VLPromptError: If ray isn't installed, there is no cluster at the address, an option is none, or a worker died
            more often than ``retries``.
    """
    if not items:
        return
    address, options = _read(on)
    cluster = RayCluster(address, options.cores)
    import ray.data  # after the connection has said whether Ray is there

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        cluster.check_room(options, "an actor")
        workers = min(options.workers or _room(ray, options), len(items))
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = min(len(items), _BLOCKS_EACH * workers)
        stream: Any = ray.data.from_items([{"item": item} for item in items], override_num_blocks=blocks)
        with warnings.catch_warnings():
            # Ray has no other way yet to bound restarts: without one a shard that kills its actor does so for ever.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            stream = stream.map_batches(
                _Actor,
                fn_constructor_args=(kind, arguments, options.threads),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
                max_restarts=options.retries,
                max_task_retries=options.retries,
                **options.needs(),
            )
        for row in stream.iter_rows():
            yield json.loads(row["record"])
    except ray.exceptions.RayError as error:
        raise VLPromptError(
            f"Ray gave up: {first_line(error)} A worker may be killed for want of memory (memory=), and is started "
            f"again {options.retries} times (retries=). What is done stays; the same command goes on."
        ) from error
    finally:
        cluster.leave()


def _read(on: str) -> tuple[str, _Options]:
    return read_ray_options(on.removeprefix("ray").lstrip(":,"), _Options)


def _room(ray: Any, options: _Options) -> int:
    """Return how many actors a cluster has room for, at least one; Ray Data wants a core for itself."""
    resources = ray.cluster_resources()
    room = int(resources.get("CPU", 1) / options.cpus)
    if options.gpus:
        room = min(room, int(resources.get("GPU", 0) / options.gpus))
    if options.memory is not None:
        room = min(room, int(resources.get("memory", 0) / 2**30 / options.memory))
    return max(1, room)
