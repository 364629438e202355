"""GRAM's outer step against the obvious one, which encodes 77 tokens of every class in the inner and the outer pass."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks._naive import naive_towers
from benchmarks.measure import Aside, in_turns
from benchmarks.text import imagenet_names
from vlprompt.backbones import create_backbone
from vlprompt.learners import create_learner
from vlprompt.meta.episodes import Episode, Side
from vlprompt.meta.learning import MetaPrompts
from vlprompt.meta.options import MetaOptions

__all__ = ["bench_gram"]


@BENCHMARKS.register(
    "gram", summary="an outer step of meta-learned context: inner step, regulator, outer gradients"
)
def bench_gram(
    *,
    backbone: str = "ViT-B-16",
    ways: Annotated[int, Field(ge=2)] = 16,
    shots: Annotated[int, Field(ge=1)] = 4,
    context: Annotated[int, Field(ge=1)] = 4,
    regulator: str = "diagonal",
    repeats: Annotated[int, Field(ge=1)] = 5,
) -> dict[str, Any]:
    """Compare one episode's losses and gradients on random weights, ImageNet's names and random image features.

    Both read stored image features, as the caption store provides them.

    Args:
        backbone: Any open_clip architecture, or tiny.
        ways: N classes on either side.
        shots: Images per class on either side.
        context: M learned vectors.
        regulator: See :mod:`vlprompt.meta.regulators`.
        repeats: Counted pairs of runs.
    """
    frozen = create_backbone(backbone)
    names = imagenet_names(2 * ways)
    learner = create_learner("coop", frozen, names[:ways], context_length=context).train()
    options = MetaOptions.model_validate({"regulator": {"name": regulator}})
    module = MetaPrompts(learner, options)
    episode = _episode(names, ways, shots, frozen.dim)

    ours = _Step(module, episode)
    theirs = _Step(module, episode)

    def obvious() -> Aside:
        with naive_towers(learner, image_graph=False) as aside:
            theirs()
        return aside

    ours()  # makes what is made once
    both = in_turns({"ours": ours, "naive": obvious}, repeats, warmup=0)
    fast, slow = both["ours"], both["naive"]
    return {
        "backbone": backbone,
        "ways": ways,
        "shots": shots,
        "context": context,
        "regulator": regulator,
        "threads": torch.get_num_threads(),
        "ours_s": fast.seconds,
        "naive_s": slow.seconds,
        "ours_cpu_s": fast.cpu_seconds,
        "naive_cpu_s": slow.cpu_seconds,
        "ours_peak_rss_gib": fast.peak_rss_gib,
        "naive_peak_rss_gib": slow.peak_rss_gib,
        "speedup": both.cpu_ratio("naive", "ours"),
        "speedup_wall": both.ratio("naive", "ours"),
        "quiet": both.quiet,
        "loss_diff": abs(ours.loss - theirs.loss),
        "grad_rel_diff": _relative(ours.gradients, theirs.gradients),
    }


class _Step:
    """One episode: losses, and gradients of prompts and regulator, which are kept."""

    def __init__(self, module: MetaPrompts, episode: Episode) -> None:
        self.module = module
        self.episode = episode
        self.loss = 0.0
        self.gradients = list[Tensor]()

    def __call__(self) -> None:
        total = torch.stack(list(self.module.loss({"episodes": [self.episode]}).values())).sum()
        learned = [p for p in self.module.parameters() if p.requires_grad]
        self.loss = float(total.detach())
        self.gradients = list(torch.autograd.grad(total, learned))


def _episode(names: list[str], ways: int, shots: int, dim: int) -> Episode:
    generator = torch.Generator().manual_seed(0)
    sides = []

    for classes in (names[:ways], names[ways:]):
        features = F.normalize(torch.randn(ways * shots, dim, generator=generator), dim=-1)
        batch = {"embedding": features, "label": torch.arange(ways).repeat_interleave(shots)}
        centre = F.normalize(features.mean(0), dim=-1)
        sides.append(Side(tuple(classes), batch, centre, torch.arange(ways * shots).numpy()))

    return Episode(sides[0], sides[1], (0, 1), 0.0)


def _relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest |a - b| / |b| over tensors."""
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, theirs, strict=True))
