"""Work on shards: each shard becomes one Parquet file, whole or not at all, wherever it is done and in any order.

The output folder holds ``job.json`` (what is done with what), ``parts/SHARD.parquet`` and, at the end,
``summary.json``. A shard whose file is there, and was made of a shard of this size, is done: the same command goes on.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from vlprompt.backbones import create_backbone
from vlprompt.classification.predict import Classifier, for_classes
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.files import write_atomic, write_json
from vlprompt.core.paths import user_path
from vlprompt.data.base import hash_strings
from vlprompt.data.loading import Loader
from vlprompt.experiments.apart import run_apart
from vlprompt.experiments.cell import Cell, CellResult, Failure
from vlprompt.experiments.config import ExperimentConfig
from vlprompt.experiments.executors import check_executor
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.layout import Layout
from vlprompt.learners import Learner
from vlprompt.learners._scanning import ImageScanner, digest_of
from vlprompt.saved.exported import ExportedClassifier
from vlprompt.saved.prompts import load
from vlprompt.security.scan import threshold_of
from vlprompt.shards.on_ray import check_ray, spread
from vlprompt.shards.reading import find_shards, import_pyarrow, read_shard
from vlprompt.shards.works import BatchReader, Encoding, Naming, Pairs, Scanning, Work

__all__ = ["Job", "JobOutcome", "Part", "RayShards", "build_work", "process_shard", "run_job"]

log = logging.getLogger("vlprompt.shards")

Progress = Callable[[str, int, int], None]

_JOB = "job.json"
_COUNTS = b"vlprompt"  # of a part's metadata
_GROUP = 16  # batches of a row group: what a reader of the results has to hold


class Job(ExperimentConfig):
    """What is done, with what, on which shards."""

    expected_task: ClassVar[str] = "shards"

    task: str = "shards"
    kind: Literal["scan", "predict", "encode", "pairs"]
    data: str = Field(description="tar:PATTERN or parquet:PATTERN")
    folder: str = Field(description="where results are written")
    prompt: str = Field("", description="scan, predict: the saved learner, or an exported file")
    backbone: dict[str, Any] = Field(
        default_factory=dict,
        description="encode, pairs: of create_backbone; else what differs from the saved one",
    )
    classnames: list[str] | None = None
    threshold: float | None = None
    topk: int = Field(5, ge=1)
    column: str = "image"
    batch_size: int = Field(64, ge=1)
    workers: Literal["auto"] | int = 0


@dataclass(frozen=True)
class Part:
    """What became of one shard.

    Attributes:
        shard: Its name.
        images: How many it has.
        unreadable: How many of them can't be read.
        suspected: How many are suspected, if they were scanned.
        left_out: Ending to the number of members that are no images.
        error: Why the shard has no result; empty if it has one.
    """

    shard: str
    images: int = 0
    unreadable: int = 0
    suspected: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class JobOutcome:
    """What became of all shards.

    Attributes:
        folder: Holds ``parts/`` and ``summary.json``.
        parts: In the order of the shards.
        done_before: How many of them an earlier command had finished.
    """

    folder: Path
    parts: list[Part] = field(repr=False)
    done_before: int

    @property
    def images(self) -> int:
        """Images in all shards that were read."""
        return sum(part.images for part in self.parts)

    @property
    def unreadable(self) -> int:
        """Images that can't be read."""
        return sum(part.unreadable for part in self.parts)

    @property
    def suspected(self) -> int:
        """Images that are suspected."""
        return sum(part.suspected for part in self.parts)

    @property
    def failed(self) -> list[Part]:
        """Shards without a result."""
        return [part for part in self.parts if part.error]

    @property
    def left_out(self) -> dict[str, int]:
        """Ending to the number of members that are no images."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.left_out)
        return dict(sorted(total.items()))


def run_job(job: Job, on: str = "serial", progress: Progress | None = None) -> JobOutcome:
    """Do the work on every shard that has no result yet.

    Memory does not grow with the number of images: of a shard, two batches of images are in memory, and its results are
    written as they come.

    Args:
        job: What to do.
        on: ``"serial"``, ``"processes:N"`` or another executor, or ``"ray[:ADDRESS][,workers=N ...]"``: then Ray Data
            spreads shards over actors, one learner each.
        progress: Called with ("shards", done, total).

    Raises:
        DataError: If there are no shards, or the work is impossible.
        CheckpointError: If the folder holds another work's results.
        VLPromptError: If pyarrow or ray isn't installed, or ``on`` is none.
    """
    import_pyarrow()
    if _means_ray(on):
        check_ray(on)
    else:
        check_executor(on)

    shards = find_shards(job.data)
    folder = user_path(job.folder).absolute()
    job = job.model_copy(update={"folder": str(folder)})
    work = build_work(job)
    listed = {"column": job.column} if job.data.startswith("parquet:") else {}
    _claim(folder, {"kind": job.kind, **listed, **work.identity()})

    parts = {
        name: part for name, path in shards.items() if (part := read_part(folder, name, path)) is not None
    }
    waiting = [name for name in shards if name not in parts]
    before = len(parts)
    if before:
        log.info("%d of %d shards are done already", before, len(shards))
    if progress is not None:
        progress("shards", before, len(shards))

    for part in _spread(job, work, {name: shards[name] for name in waiting}, on):
        parts[part.shard] = part
        if part.error:
            log.error("%s: %s", part.shard, part.error)
        if progress is not None:
            progress("shards", len(parts), len(shards))

    outcome = JobOutcome(folder, [parts[name] for name in shards], before)
    write_json(folder / "summary.json", _summary(outcome))
    return outcome


def build_work(job: Job) -> Work:
    """Load what a job needs.

    Raises:
        VLPromptError: If it can't be loaded, or can't do the work.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.kind in ("encode", "pairs"):
        backbone = create_backbone(**{"name": "tiny", "device": device, **job.backbone})
        return Encoding(backbone) if job.kind == "encode" else Pairs(backbone)

    if job.kind == "predict" and job.prompt.endswith(".onnx"):
        exported: Classifier = ExportedClassifier(job.prompt)
        names = hash_strings(exported.classnames)
        return Naming(exported, job.topk, {"exported": digest_of({}), "classnames": names})

    learner: Learner = load(job.prompt, job.backbone)
    if job.classnames and job.kind == "predict":
        learner = for_classes(learner, job.classnames)
    elif job.classnames:
        learner = learner.with_classes(job.classnames)
    learner.to(device)

    if job.kind == "predict":
        described = {
            "method": learner.method,
            "backbone": learner.backbone.features_id,
            "learned": digest_of(dict(learner.trainable_state())),
            "classnames": hash_strings(learner.classnames),
        }
        return Naming(learner, job.topk, described)

    if not isinstance(learner, ImageScanner):
        raise DataError(
            f"{job.prompt} holds {learner.method}, which can't scan. Train a scanner: vlprompt run dbom_tiny.yaml."
        )
    return Scanning(learner, threshold_of(learner, job.threshold))


def process_shard(job: Job, work: Work, name: str, path: Path) -> Part:
    """Do the work on one shard, and write its results; a shard that is damaged has none, and says why.

    Args:
        job: What to do.
        work: What :func:`build_work` made of it.
        name: Of the shard.
        path: Its file.
    """
    folder = Path(job.folder)
    done = read_part(folder, name, path)
    if done is not None:
        return done

    try:
        return _write_part(folder, name, path, job, work)
    except Exception as error:  # the shards behind it must survive whatever one of them does
        failure = Failure.of(error)
        if not failure.mistake:
            log.debug("%s", failure.stack)
        return Part(name, error=failure.message)


def read_part(folder: Path, name: str, path: Path) -> Part | None:
    """Return what became of a shard; None if it has no result, or one of a file of another size."""
    arrow = import_pyarrow()
    try:
        metadata = arrow.parquet.read_metadata(_part(folder, name)).metadata or {}
        record = json.loads(metadata[_COUNTS])
        made_of = {key: record.pop(key) for key in ("bytes", "place")}
        return Part(shard=name, **record) if made_of == _origin(path) else None
    except (OSError, KeyError, ValueError, TypeError, arrow.ArrowException):
        return None


def _origin(path: Path) -> dict[str, Any]:
    """Return what tells a shard's file from another: with further shards, another may come to have its name."""
    absolute = path.absolute()
    return {"bytes": path.stat().st_size, "place": f"{absolute.parent.name}/{absolute.name}"}


def _part(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name}.parquet"


def _write_part(folder: Path, name: str, path: Path, job: Job, work: Work) -> Part:
    arrow = import_pyarrow()
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    origin = _origin(path)

    def write(target: Path) -> None:
        with arrow.parquet.ParquetWriter(target, work.schema(), compression="zstd") as writer:
            tables = _tables(path, job, work, left_out, counts)
            while group := list(islice(tables, _GROUP)):
                writer.write_table(arrow.concat_tables(group))
            record = {
                **{key: counts[key] for key in ("images", "unreadable", "suspected")},
                "left_out": dict(left_out),
            }
            writer.add_key_value_metadata({_COUNTS.decode(): json.dumps({**record, **origin})})

    write_atomic(_part(folder, name), write)
    return Part(name, counts["images"], counts["unreadable"], counts["suspected"], dict(left_out))


def _tables(path: Path, job: Job, work: Work, left_out: Counter[str], counts: Counter[str]) -> Iterator[Any]:
    """Yield the results of a shard, a table for each batch."""
    kind = job.data.partition(":")[0]
    images = read_shard(path, kind, left_out, column=job.column, captions=work.captions)
    batches = iter(lambda: list(islice(images, job.batch_size)), [])
    reader = BatchReader(work.preprocess)

    with Loader(reader, workers=job.workers, pin=work.device.type == "cuda") as loader:
        for batch in loader.stream(batches):
            table = work.table(batch)
            counts["images"] += len(batch.names)
            counts["unreadable"] += sum(bool(error) for error in batch.errors)
            counts["suspected"] += work.suspected(table)
            yield table


class _Shards(Experiment):
    """Shards as cells, so that executors do them; a process loads the learner once."""

    config: Job

    @cached_property
    def work(self) -> Work:
        """What is done."""
        return build_work(self.config)

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Name to file; listed once in every process."""
        return find_shards(self.config.data)

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`."""
        return [Cell.at(shard=name) for name in self.shards]

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        name = cell["shard"]
        return CellResult(facts=asdict(process_shard(self.config, self.work, name, self.shards[name])))

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        return Layout("")


def _spread(job: Job, work: Work, shards: dict[str, Path], on: str) -> Iterator[Part]:
    """Yield what becomes of shards as they end."""
    if on == "serial":  # the learner is loaded already
        yield from (process_shard(job, work, name, path) for name, path in shards.items())
    elif _means_ray(on):
        for record in spread(RayShards, (job.model_dump_json(),), list(shards), on):
            yield Part(**record)
    else:
        cells = [Cell.at(shard=name) for name in shards]
        for cell, answer in run_apart(on, _Shards(job), cells, Path(job.folder) / "cells"):
            if isinstance(answer, Failure):
                yield Part(cell["shard"], error=answer.message)
            else:
                yield Part(**answer.facts)


def _means_ray(on: str) -> bool:
    return on.partition(":")[0].partition(",")[0] == "ray"


class RayShards:
    """Shards for an actor of Ray, which loads the learner once.

    Args:
        job: As JSON.
    """

    def __init__(self, job: str) -> None:
        self.job = Job.model_validate_json(job)
        self.work = build_work(self.job)
        self.shards = find_shards(self.job.data)

    def __call__(self, name: str) -> dict[str, Any]:
        """Return what became of a shard."""
        return asdict(process_shard(self.job, self.work, name, self.shards[name]))


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Mark a folder as the results of this work, or refuse another's."""
    path = folder / _JOB
    if not path.is_file():
        write_json(path, identity)
        return

    try:
        other = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise CheckpointError(f"{path} is damaged. Name another output folder.") from None
    if other != identity:
        different = [key for key in {**identity, **other} if other.get(key) != identity.get(key)]
        raise CheckpointError(
            f"{folder} holds results of another work ({', '.join(sorted(different))}). Name another output folder."
        )


def _summary(outcome: JobOutcome) -> dict[str, Any]:
    return {
        "shards": len(outcome.parts),
        "images": outcome.images,
        "unreadable": outcome.unreadable,
        "suspected": outcome.suspected,
        "left_out": outcome.left_out,
        "failed": {part.shard: part.error for part in outcome.failed},
    }
