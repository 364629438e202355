"""What one row of a comparison depends on, as data; rows of different settings do not enter one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlprompt.adaptation.base import Adapter
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.files import write_text

__all__ = ["AdaptationRecord", "Tuning", "check_settings", "read_records", "view_setting", "write_records"]

Tuning = Literal["G", "F", "D"]
"""How hyper-parameters were chosen: G one value everywhere, F one per family of data sets, D one per data set."""
_FILE = "records.json"
_SETTINGS = ("backbone", "classnames", "prompts", "views", "stream")


@dataclass(frozen=True)
class AdaptationRecord:
    """One method on one data set in one order.

    Attributes:
        method: Its label.
        data: Name of the data set.
        backbone: Id of the backbone's fingerprint.
        classnames: Hash of the class names.
        prompts: The classifier that adaptation starts from.
        views: Count, augmentation and seed; see :func:`view_setting`.
        stream: Kind and numbers of the plan, seed, number of the order, count and hash of the images in order, and the
            attack if images were attacked too; all images are the backbone's crops then.
        granularity: See :class:`vlprompt.adaptation.base.Adapter`, as the four that follow.
        batch: 0 where images do not come together.
        updates_first: Whether it learns from an image before it names it.
        reset_scope: After what it forgets.
        horizon: Length of the stream that it was told; 0 for none.
        calibrated: Whether its probabilities are meant as such.
        options: All options, defaults included.
        tuning: See :data:`Tuning`.
        uses: What beyond the images it was given (a generator, source statistics, a teacher ...); never labels.
        metrics: Fractions by name.
        refused: Images whose embeddings were NaN or infinite.
        state_bytes: Size of what it had learned from the stream at its end.
    """

    method: str
    data: str
    backbone: str
    classnames: str
    prompts: str
    views: Mapping[str, Any]
    stream: Mapping[str, Any]
    granularity: str
    batch: int
    updates_first: bool
    reset_scope: str
    horizon: int
    calibrated: bool
    options: Mapping[str, Any]
    tuning: Tuning
    uses: Sequence[str]
    metrics: dict[str, float]
    refused: int
    state_bytes: int

    def json(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return asdict(self)


def view_setting(adapter: Adapter) -> dict[str, Any]:
    """Return count, augmentation and seed of the views; one view is the image itself, whatever the rest says."""
    plan = adapter.plan
    if plan.count == 1:
        return {"count": 1}
    return {"count": plan.count, "augment": plan.augment, "seed": plan.seed}


def check_settings(records: Sequence[AdaptationRecord]) -> None:
    """Refuse to compare rows of different settings.

    Rows agree if backbone, class names, prompts and stream are the same, and the views too; a method that looks at the
    image alone agrees with every plan of views. The seed of the stream and the number of its order may differ.

    Raises:
        DataError: Names what differs, and between which rows.
    """
    if not records:
        raise DataError("there is no row to compare.")

    problems = []
    for setting in _SETTINGS:
        first: tuple[Any, str] | None = None
        for record in records:
            value = _compared(record, setting)
            if value is None:
                continue
            if first is None:
                first = (value, record.method)
            elif value != first[0]:
                problems.append(f"{setting}: {first[1]} has {first[0]}, {record.method} has {value}.")
                break
    if problems:
        raise DataError(
            "these rows have different settings and do not belong in one table:\n" + "\n".join(problems)
        )


def write_records(folder: Path, records: Sequence[AdaptationRecord]) -> None:
    """Write the records of a cell into its folder."""
    content = [record.json() for record in records]
    write_text(folder / _FILE, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_records(run: Path, label: Callable[[str], str]) -> list[AdaptationRecord]:
    """Read the records of all cells of a run.

    Args:
        run: Its folder.
        label: Returns what a method of the run is called beside others.

    Raises:
        CheckpointError: If a file is damaged.
    """
    records = []
    for path in sorted(run.glob(f"cells/*/{_FILE}")):
        try:
            for content in json.loads(path.read_text(encoding="utf-8")):
                records.append(AdaptationRecord(**{**content, "method": label(content["method"])}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} holds no records of this version: {error}.") from error
    return records


def _compared(record: AdaptationRecord, setting: str) -> Any:
    value = asdict(record)[setting]
    if setting == "views":
        return None if value["count"] == 1 else value
    if setting == "stream":
        return {name: part for name, part in value.items() if name not in ("seed", "order", "images")}
    return value
