"""The fast text tower against a full pass over 77 tokens of every class."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import BENCHMARKS
from benchmarks.measure import Work, in_turns, matrix_gflops
from vlprompt.backbones import create_backbone
from vlprompt.backbones.layout import PromptLayout
from vlprompt.backbones.text import TextTower
from vlprompt.core.errors import DataError
from vlprompt.core.precision import Precision
from vlprompt.learners._context import Position, context_layout, initial_context

__all__ = ["bench_text", "imagenet_names"]

_NAIVE_CHUNK = 100  # classes per naive pass: 1,000 full sentences with their graph would not fit into 24 GiB


@BENCHMARKS.register("text", summary="text features of all classes, forward and backward into the context")
def bench_text(
    *,
    backbone: str = "ViT-B-16",
    classes: int = 100,
    context: int = 16,
    position: Position = "end",
    precision: Precision = "fp32",
    repeats: int = 3,
    naive: bool = True,
) -> dict[str, Any]:
    """Compare the fast path with the naive one on random weights and ImageNet's class names.

    Args:
        backbone: Any open_clip architecture, or tiny.
        classes: C; above 1,000 the names of ImageNet-21K's synsets are taken.
        context: M learned vectors, shared by all classes.
        position: Where the class name stands.
        precision: If it is half precision, the fast path is measured in it too, in turns with the others in float32.
        repeats: Counted rounds of all ways.
        naive: False skips the naive path (and the ratios), for class lists it can't do in reasonable time.
    """
    tower = create_backbone(backbone).text
    names = imagenet_names(classes)
    layout = context_layout(tower, names, context, position)
    start = initial_context(tower, context)
    pull = torch.randn(classes, _joint_dim(tower, layout, start), generator=torch.Generator().manual_seed(0))

    fast = _Pass(start, lambda ctx: _backward(tower.encode(layout, ctx), pull))
    slow = _Pass(start, lambda ctx: _naive(tower, names, context, position, ctx, pull))
    fast()
    ways: dict[str, Work] = {"fast": fast, **({"naive": slow} if naive else {})}

    if precision != "fp32":
        narrow = create_backbone(backbone, precision=precision).text
        half = _Pass(start, lambda ctx: _backward(narrow.encode(layout, ctx), pull))
        half()
        ways["half"] = half

    turns = in_turns(ways, repeats, warmup=0)
    fast_measured = turns["fast"]
    flops = _count_flops(fast)
    tokens = int((layout.tiles.positions > 0).sum()) + layout.shared
    result: dict[str, Any] = {
        "backbone": backbone,
        "classes": classes,
        "context": context,
        "position": position,
        "threads": torch.get_num_threads(),
        "tokens_fast": tokens,
        "tokens_naive": classes * tower.context_length,
        "fast_s": fast_measured.seconds,
        "fast_peak_rss_gib": fast_measured.peak_rss_gib,
        "fast_gflops_per_s": 1e-9 * flops / fast_measured.seconds,
        "matmul_gflops_per_s": matrix_gflops(tokens, tower.width, 4 * tower.width),
    }

    if precision != "fp32":
        result[precision] = {
            **turns.half_precision(),
            "smallest_cosine": float(F.cosine_similarity(fast.features, half.features).min()),
            "grad_cosine": float(
                F.cosine_similarity(fast.gradient.flatten(), half.gradient.flatten(), dim=0)
            ),
        }

    if not naive:
        return result

    slow_measured = turns["naive"]
    return {
        **result,
        "naive_s": slow_measured.seconds,
        "naive_peak_rss_gib": slow_measured.peak_rss_gib,
        "naive_classes_per_pass": min(classes, _NAIVE_CHUNK),
        "speedup": turns.ratio("naive", "fast"),
        "cpu_speedup": turns.cpu_ratio("naive", "fast"),
        "quiet": turns.quiet,
        "max_abs_diff": float((fast.features - slow.features).abs().max()),
        "grad_rel_diff": float((fast.gradient - slow.gradient).norm() / slow.gradient.norm()),
    }


class _Pass:
    """One forward and backward pass from a fresh context; keeps the last features and gradient."""

    def __init__(self, start: Tensor, run: Any) -> None:
        self.start = start
        self.run = run
        self.features = self.gradient = torch.empty(0)

    def __call__(self) -> None:
        context = self.start.clone().requires_grad_()
        self.features = self.run(context).detach()
        self.gradient = torch.empty(0) if context.grad is None else context.grad


def _backward(features: Tensor, pull: Tensor) -> Tensor:
    (features * pull).sum().backward()
    return features


def _naive(
    tower: TextTower, names: list[str], context: int, position: Position, ctx: Tensor, pull: Tensor
) -> Tensor:
    parts = []
    for i in range(0, len(names), _NAIVE_CHUNK):
        layout = context_layout(tower, names[i : i + _NAIVE_CHUNK], context, position)
        features = tower.encode_plain(layout, ctx, length=tower.context_length)
        parts.append(_backward(features, pull[i : i + _NAIVE_CHUNK]).detach())
    return torch.cat(parts)


def _joint_dim(tower: TextTower, layout: PromptLayout, start: Tensor) -> int:
    with torch.no_grad():
        return tower.project(start[:1]).shape[-1]


def _count_flops(work: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def imagenet_names(count: int) -> list[str]:
    """Return ``count`` distinct class names of ImageNet-1K, or ImageNet-21K's if more are asked for.

    Raises:
        DataError: If there are not that many.
    """
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    names = _distinct(open_clip.IMAGENET_CLASSNAMES)
    if count > len(names):
        info = ImageNetInfo("imagenet22k")
        labels = (info.index_to_description(i).split(",")[0].strip() for i in range(info.num_classes()))
        wordnet = (info.index_to_label_name(i) for i in range(info.num_classes()))
        names = _distinct([*names, *labels, *wordnet])
    if count > len(names):
        raise DataError(f"there are {len(names)} ImageNet names, {count} were asked for.")
    return names[:count]


def _distinct(names: Iterable[str]) -> list[str]:
    """Return the first of all names that a text tower can't tell apart: it reads neither capitals nor most signs."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(re.sub(r"[\W_]+", "", name.casefold()), name)
    return list(first.values())
