"""A class list in chunks: names encoded per second, and images compared per second, exactly and through an index."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field

from benchmarks import BENCHMARKS
from benchmarks.measure import measure
from benchmarks.text import imagenet_names
from vlprompt.backbones import create_backbone
from vlprompt.classification.name_list import NameList, build_name_list
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import create_learner

__all__ = ["bench_name_list"]

_SYNSETS = 21_000
_TOP = 5


@BENCHMARKS.register("name_list", summary="a class list in chunks: encoding it, and comparing images with it")
def bench_name_list(
    *,
    backbone: str = "tiny",
    names: Annotated[int, Field(ge=2)] = 21000,
    images: Annotated[int, Field(ge=1)] = 64,
    chunk: Annotated[int, Field(ge=2)] = 4096,
    nearest: bool = True,
) -> dict[str, Any]:
    """Encode names of ImageNet-21K's synsets, beyond 21,000 with a number behind them, and compare images with all.

    Images are near a name each: its weights with noise. ``agreement`` is the share of images for which the index has
    the same first name as the exact comparison, ``recall`` the share of its first five.

    Args:
        backbone: Any open_clip architecture, or tiny.
        names: How many.
        images: Rows that are compared together.
        chunk: Names that are encoded together.
        nearest: Whether the index is built and measured too.
    """
    learner = create_learner("zero_shot", create_backbone(backbone), ["one", "another"])
    synsets = imagenet_names(min(names, _SYNSETS))
    listed = [
        synsets[i % len(synsets)] + (f" {i // len(synsets)}" if i >= len(synsets) else "")
        for i in range(names)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "list"
        built = measure(lambda: build_name_list(learner, listed, folder, chunk=chunk), 1, warmup=0)
        exact = NameList(learner, folder)
        rows = _rows(exact, images)
        compared = measure(lambda: exact.rank_rows(rows, _TOP), 1, warmup=1)
        figures = {
            "names_per_s": names / built.seconds,
            "names_per_cpu_s": names / built.cpu_seconds,
            "build_peak_rss_gib": built.peak_rss_gib,
            "exact_ms": 1000 * compared.seconds / images,
            "exact_cpu_ms": 1000 * compared.cpu_seconds / images,
            "exact_peak_rss_gib": compared.peak_rss_gib,
        }
        if nearest:
            figures |= _nearest(learner, folder, rows, exact.rank_rows(rows, _TOP)[0])

    facts = {"backbone": backbone, "names": names, "images": images, "chunk": chunk}
    return {**facts, "threads": torch.get_num_threads(), "load": os.getloadavg()[0], **figures}


def _nearest(learner: Any, folder: Path, rows: torch.Tensor, expected: list[list[str]]) -> dict[str, Any]:
    opened: list[NameList] = []
    built = measure(lambda: opened.append(NameList(learner, folder, nearest=True)), 1, warmup=0)
    found = measure(lambda: opened[0].rank_rows(rows, _TOP), 1, warmup=1)
    names = opened[0].rank_rows(rows, _TOP)[0]
    hits = [len(set(a) & set(b)) for a, b in zip(names, expected, strict=True)]
    return {
        "index_s": built.seconds,
        "index_peak_rss_gib": built.peak_rss_gib,
        "nearest_ms": 1000 * found.seconds / len(rows),
        "nearest_cpu_ms": 1000 * found.cpu_seconds / len(rows),
        "agreement": sum(a[0] == b[0] for a, b in zip(names, expected, strict=True)) / len(rows),
        "recall": sum(hits) / (_TOP * len(rows)),
    }


def _rows(names: NameList, images: int) -> torch.Tensor:
    """Return (images, d) rows, each near the weights of a name of the first chunk."""
    _, weights, _ = next(names.chunks())
    generator = torch_rng(0, "bench name list")
    drawn = weights[torch.randint(len(weights), (images,), generator=generator)]
    noise = torch.randn(drawn.shape, generator=generator) / drawn.shape[1] ** 0.5
    return F.normalize(drawn + 0.5 * noise, dim=-1)
