"""A connection to Ray: to a cluster that runs already, or to one that is started here and ended with the work.

Ray is imported when it is asked for.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from vlprompt.core.engine_options import Gibibytes, read_options
from vlprompt.core.errors import VLPromptError, first_line

__all__ = ["RayCluster", "RayOptions", "import_ray", "read_ray_options"]

log = logging.getLogger("vlprompt.run")

_STORE_BYTES = 128 << 20  # of a cluster that is started here: names, counts and descriptions lie in it


class RayOptions(BaseModel):
    """What stands behind ``ray:``, beside the address; a worker is what runs one cell, or one shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cores: int | None = Field(
        None, ge=1, description="cores of a cluster that is started here; without it all of the machine"
    )
    cpus: float = Field(1, gt=0, description="cores of a worker")
    gpus: float = Field(0, ge=0, description="GPUs of a worker; 0.5: two workers share one")
    memory: Gibibytes | None = Field(None, description="memory of a worker, for example 8GiB")
    retries: int = Field(3, ge=0, description="how often work is started again whose worker died")

    @property
    def threads(self) -> int:
        """That a worker computes with."""
        return max(1, int(self.cpus))

    def needs(self) -> dict[str, Any]:
        """Return what Ray is to keep free for a worker, in Ray's words."""
        needs: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.memory is not None:
            needs["memory"] = int(self.memory * 2**30)
        return needs


Options = TypeVar("Options", bound=RayOptions)


def read_ray_options(argument: str, model: type[Options]) -> tuple[str, Options]:
    """Return the address, empty if there is none, and the options behind ``--on ray:``.

    Args:
        argument: For example ``"auto,cpus=2"``.
        model: Checks the options.

    Raises:
        ConfigError: With every mistake of the options at once, and the nearest valid key.
        VLPromptError: If there are several addresses, or cores for a cluster that has its own.
    """
    words, options = read_options("ray", argument, model)
    if len(words) > 1:
        raise VLPromptError(f"--on ray takes one address; got {' and '.join(words)}.")

    if words and options.cores is not None:
        raise VLPromptError(
            f"--on ray:{argument}: cores= is for a cluster that is started here; the one at {words[0]} has its own."
        )
    return (words[0] if words else ""), options


def import_ray() -> Any:
    """Return the module.

    Raises:
        VLPromptError: If it isn't installed; says how.
    """
    try:
        import ray
    except ImportError:
        raise VLPromptError("--on ray needs Ray: pip install 'vlprompt[ray]'.") from None
    return ray


class RayCluster:
    """A cluster that this process is connected to, until :meth:`leave`.

    Attributes:
        ray: The module.

    Args:
        address: Of a cluster that runs; empty to start one on this machine.
        cores: Of one that is started; None for all of the machine.

    Raises:
        VLPromptError: If Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str = "", cores: int | None = None) -> None:
        ray = import_ray()
        self.ray: Any = ray
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._connected = False
        if not ray.is_initialized():  # else by the program that called vlprompt: it stays in its hands
            self._connect(address, cores)

    def leave(self) -> None:
        """Disconnect, and end a cluster that was started here."""
        if self._connected:
            self._connected = False
            self.ray.shutdown()
        if self._scratch is not None:
            self._scratch.cleanup()

    def check_room(self, options: RayOptions, what: str) -> None:
        """Refuse what the cluster has no room for; one that runs elsewhere may grow, so that a warning has to do.

        Args:
            options: What a worker needs.
            what: What a worker does, for the message.

        Raises:
            VLPromptError: If the cluster was started here, and no worker would ever begin; the cluster is ended.
        """
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        needs = {"CPU": options.cpus, "GPU": options.gpus, "memory": (options.memory or 0) * 2**30}
        if any(all(node.get(kind, 0.0) >= need for kind, need in needs.items()) for node in nodes):
            return

        most = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in needs}
        if not options.memory:
            del needs["memory"], most["memory"]
        asked, there = _in_words(needs), _in_words(most)
        if self._scratch is not None:
            self.leave()
            raise VLPromptError(
                f"--on ray: {what} needs {asked}, and this machine has {there}. Ask for less with cpus=, gpus= and "
                "memory=, or name the address of a cluster."
            )
        log.warning(
            "no node of the Ray cluster has %s, which %s needs (the most is %s): it waits until such a node joins",
            asked, what, there,
        )  # fmt: skip

    def _connect(self, address: str, cores: int | None) -> None:
        # Ray reports its use to its makers unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address:
            options["address"] = address
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            options |= {
                "address": "local",
                "include_dashboard": False,
                "num_cpus": cores,
                "object_store_memory": _STORE_BYTES,
                "_temp_dir": self._scratch.name,
            }

        try:
            self.ray.init(**options)
        except Exception as error:  # Ray raises many kinds for a cluster that isn't there
            self.leave()
            where = f"at {address}" if address else "on this machine"
            raise VLPromptError(
                f"there is no Ray cluster {where}: {first_line(error)} Start one with: ray start --head"
            ) from error
        self._connected = True


def _in_words(resources: Mapping[str, float]) -> str:
    memory = f", {resources['memory'] / 2**30:.3g} GiB of memory" if "memory" in resources else ""
    return f"{resources['CPU']:g} cores, {resources['GPU']:g} GPUs{memory}"
