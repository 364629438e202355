"""Plans of streams: in which order images come, and which come together. Every draw is seeded.

``iid``: all images, shuffled. ``dirichlet``: classes come in waves, the narrower the smaller ``gamma`` (Zanella et al.,
StatA, arXiv 2501.03729, section 5). ``separate``: one class after another. ``tasks``: batches of few classes each,
drawn one by one. ``temporal``: sets one after another in their order, the images of each shuffled. ``mixed``: images
of the known classes and intruders, shuffled.

Labels make streams, as an experimenter makes them; no method ever sees one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from vlprompt.core.errors import ConfigError
from vlprompt.core.seeding import numpy_rng

__all__ = ["StreamKind", "StreamPlan", "order_hash", "worst_tenth"]

StreamKind = Literal["iid", "dirichlet", "separate", "tasks", "temporal", "mixed"]


@dataclass(frozen=True)
class StreamPlan:
    """How a stream is drawn from a data set.

    Attributes:
        kind: See the module's text.
        gamma: Of ``dirichlet``; small values make long runs of a class.
        batch: Images of a slot (``dirichlet``) or of a task (``tasks``).
        classes: Fewest and most classes of a task.
        tasks: How many tasks are drawn.
        share: Of the stream that intruders make up, in (0, 1); ``mixed`` leaves out what is too many.
    """

    kind: StreamKind = "iid"
    gamma: Annotated[float, Field(gt=0)] = 0.1
    batch: Annotated[int, Field(ge=1)] = 64
    classes: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 4)
    tasks: Annotated[int, Field(ge=1)] = 10
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def order(
        self,
        labels: Sequence[int],
        seed: int,
        *,
        sets: Sequence[int] | None = None,
        intruders: Sequence[bool] = (),
    ) -> list[int]:
        """Return numbers of images in the order of the stream.

        Args:
            labels: (n,) true classes.
            seed: Of all draws.
            sets: (n,) the set of each image, for ``temporal``; sets come from the smallest number to the largest.
            intruders: (n,) whether an image is out of distribution or attacked, for ``mixed``.

        Returns:
            Every image once, except: of ``tasks`` those that were drawn (perhaps several times, in other tasks), and of
            ``mixed`` those that the share allows.

        Raises:
            ConfigError: If the plan needs what was not given.
        """
        classes = np.asarray(labels)
        rng = numpy_rng(seed, "stream plan", *self.description().values())
        if self.kind == "iid":
            return rng.permutation(len(classes)).tolist()
        if self.kind == "separate":
            return _join(
                [rng.permutation(np.flatnonzero(classes == c)) for c in rng.permutation(np.unique(classes))]
            )
        if self.kind == "dirichlet":
            return self._dirichlet(classes, rng)
        if self.kind == "tasks":
            return self._tasks(classes, rng)
        if self.kind == "temporal":
            if sets is None or len(sets) != len(classes):
                raise ConfigError(["kind: a temporal stream needs the set of every image."], "stream plan")
            numbers = np.asarray(sets)
            return _join([rng.permutation(np.flatnonzero(numbers == s)) for s in np.unique(numbers)])
        return self._mixed(np.asarray(intruders, dtype=bool), len(classes), rng)

    def description(self) -> dict[str, Any]:
        """Return the kind and the numbers that it uses."""
        uses = {"dirichlet": ("gamma", "batch"), "tasks": ("batch", "classes", "tasks"), "mixed": ("share",)}
        values = asdict(self)
        return {name: values[name] for name in ("kind", *uses.get(self.kind, ()))}

    def _dirichlet(self, classes: np.ndarray, rng: np.random.Generator) -> list[int]:
        """Cut every class into shares of the slots, drawn from Dir(gamma), and shuffle inside the slots."""
        present = np.unique(classes)
        count = max(1, min(len(classes) // self.batch, len(present)))
        slots: list[list[np.ndarray]] = [[] for _ in range(count)]
        for c in present:
            rows = rng.permutation(np.flatnonzero(classes == c))
            shares = rng.dirichlet([self.gamma] * count)
            cuts = np.floor(np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for slot, part in zip(slots, np.split(rows, cuts), strict=True):
                slot.append(part)
        return _join([rng.permutation(np.concatenate(slot)) for slot in slots])

    def _tasks(self, classes: np.ndarray, rng: np.random.Generator) -> list[int]:
        """Draw classes first, then images of their union without replacement."""
        low, high = self.classes
        present = np.unique(classes)
        if low > high:
            raise ConfigError(
                [f"classes: the fewest first, then the most; got {self.classes}."], "stream plan"
            )

        tasks = []
        for _ in range(self.tasks):
            count = min(int(rng.integers(low, high + 1)), len(present))
            chosen = rng.choice(present, count, replace=False)
            union = np.flatnonzero(np.isin(classes, chosen))
            tasks.append(rng.choice(union, min(self.batch, len(union)), replace=False))
        return _join(tasks)

    def _mixed(self, intruders: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
        if len(intruders) != count or intruders.all() or not intruders.any():
            problem = "kind: a mixed stream needs known images and intruders; say of every image which it is."
            raise ConfigError([problem], "stream plan")

        strangers = rng.permutation(np.flatnonzero(intruders))
        known = rng.permutation(np.flatnonzero(~intruders))
        # As many of both as the share allows.
        total = min(len(strangers) / self.share, len(known) / (1 - self.share))
        strangers = strangers[: max(1, round(total * self.share))]
        known = known[: max(1, round(total * (1 - self.share)))]
        return rng.permutation(np.concatenate([strangers, known])).tolist()


def order_hash(sources: Sequence[str]) -> str:
    """Return 12 hex digits of a stream: its images and their order."""
    return hashlib.sha256("\n".join(sources).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def worst_tenth(values: Sequence[float]) -> float:
    """Return the mean of the worst 10 % of runs, at least one (ETA: Fuchs et al., OGA, arXiv 2501.04352, section 5)."""
    count = max(1, len(values) // 10)
    return float(np.mean(sorted(values)[:count]))


def _join(parts: Sequence[np.ndarray]) -> list[int]:
    return [int(number) for part in parts for number in part]
