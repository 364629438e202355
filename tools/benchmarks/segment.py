"""A step of prompt tuning on CLIPSeg against transformers' modules with the whole graph alive.

The naive way: both towers of transformers' CLIPSeg on every step, all blocks of them, prompts put between; once with
weights that take gradients (as they come from ``from_pretrained``) and once with frozen ones. Ours: cached states
below the first prompt (all states, for prompts of the text side), blocks up to the last tap only, a text pass only
where prompts enter, over the distinct phrases and the shared beginning once. Both make the same gradient.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import BENCHMARKS
from benchmarks.measure import in_turns
from vlprompt.backbones import create_backbone
from vlprompt.backbones.clipseg import default_config
from vlprompt.core.errors import VLPromptError
from vlprompt.segmentation import Segmenter, create_segmenter

__all__ = ["bench_segment"]

log = logging.getLogger("benchmarks")

_PHRASES = ("a polyp", "the left ventricular cavity of the heart", "a foot ulcer", "a traffic light")


@BENCHMARKS.register(
    "segment", summary="a step of prompt tuning on CLIPSeg, ours against transformers' modules"
)
def bench_segment(
    *,
    size: Literal["vit_b16", "small"] = "vit_b16",
    batch: int = 2,
    depths: str = "1,3,5,7,9,11",
    text: str = "coop,cocoop",
    text_depth: int = 3,
    repeats: int = 1,
) -> dict[str, Any]:
    """Compare seconds and memory of a forward and backward pass on random weights, noise and four phrases.

    Args:
        size: The published model at 352 px, or a small one.
        batch: B.
        depths: Of VPT, with commas; empty: none.
        text: Strategies of the text side, with commas; empty: none.
        text_depth: Their depth.
        repeats: Counted runs of each way.
    """
    theirs = _transformers(size)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        backbone = create_backbone("clipseg", folder)
        cases = [("vpt", int(depth)) for depth in depths.split(",") if depth]
        cases += [(name, text_depth) for name in text.split(",") if name]
        segmenters = [create_segmenter("clipseg", backbone, name, depth=depth) for name, depth in cases]

    rows = [_case(theirs, segmenter, batch, repeats) for segmenter in segmenters]
    cases_by_name = {f"{n}_{d}": row for (n, d), row in zip(cases, rows, strict=True)}
    ratios: dict[str, float] = {}

    for kind, chosen in (("vpt", lambda n: n == "vpt"), ("text", lambda n: n != "vpt")):
        for what in ("speedup", "speedup_frozen_weights"):
            values = [row[what] for (n, _), row in zip(cases, rows, strict=True) if chosen(n)]
            if values:
                ratios[f"{kind}_mean_{what}"] = sum(values) / len(values)

    return {
        "size": size,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "cases": cases_by_name,
        "ratios": ratios,
    }


def _transformers(size: str) -> Any:
    try:
        from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
    except ImportError as error:
        raise VLPromptError(
            "this benchmark compares with transformers >= 5: pip install transformers."
        ) from error

    config = default_config()

    if size == "small":
        config |= {"extract_layers": [0, 1, 2], "decoder_intermediate_size": 64}
        narrow = {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        }
        config["text_config"] |= narrow
        config["vision_config"] |= {**narrow, "image_size": 64}

    torch.manual_seed(0)
    return CLIPSegForImageSegmentation(CLIPSegConfig(**config)).eval()


def _case(theirs: Any, segmenter: Segmenter, batch: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    side = int(theirs.config.vision_config.image_size)
    images = torch.randn(batch, 3, side, side, generator=generator)
    texts = [_PHRASES[i % len(_PHRASES)] for i in range(batch)]
    masks = (torch.rand(batch, 1, side, side, generator=generator) < 0.3).float()
    frozen = segmenter.frozen(images)  # once per image and run, not per step
    name = segmenter.options["strategy"]
    naive = _Naive(theirs, segmenter)
    steps: Mapping[str, Callable[[], Tensor]] = {
        "ours": lambda: segmenter.decode(frozen, texts, (side, side)),
        "frozen_weights": lambda: naive(images, texts),
        "naive": lambda: naive(images, texts),
    }
    gradients: dict[str, Tensor] = {}
    context: Any = segmenter.strategy.context

    def step(way: str) -> None:
        theirs.requires_grad_(way == "naive")
        segmenter.zero_grad()
        theirs.zero_grad()
        F.binary_cross_entropy_with_logits(steps[way](), masks).backward()
        gradients[way] = context.grad.clone()

    turns = in_turns({way: partial(step, way) for way in steps}, repeats, warmup=int(repeats > 1))
    measured = {way: turns[way] for way in steps}
    for way, figures in measured.items():
        log.info("%s, %s: %.2f s (%.2f s of processors)", name, way, figures.seconds, figures.cpu_seconds)

    difference = (gradients["ours"] - gradients["naive"]).norm() / gradients["naive"].norm()
    return {
        **{way: vars(figures) for way, figures in measured.items()},
        "gradient_rel_diff": float(difference),
        "speedup": turns.cpu_ratio("naive", "ours"),
        "speedup_frozen_weights": turns.cpu_ratio("frozen_weights", "ours"),
    }


class _Naive:
    """The obvious step on transformers' modules, with a segmenter's own prompts."""

    def __init__(self, model: Any, segmenter: Segmenter) -> None:
        self.model = model
        self.strategy = segmenter.strategy
        self.text = segmenter.backbone.text

    def __call__(self, images: Tensor, texts: list[str]) -> Tensor:
        """Return (B, 1, H, W) logits."""
        model = self.model
        rows = None if self.strategy.reads_image else self.strategy()
        states, pooled = self._vision(images, None if rows is None else rows.vision)
        rows = rows or self.strategy(pooled.detach())
        condition = self._text(texts, rows.text)
        picked = tuple(states[i] for i in model.extract_layers)

        return model.decoder(picked, condition).logits.unflatten(0, (len(texts), 1))

    def _vision(self, images: Tensor, rows: Tensor | None) -> tuple[list[Tensor], Tensor]:
        tower = self.model.clip.vision_model
        x = tower.embeddings(images)
        count = x.shape[1]

        if rows is not None:
            x = torch.cat([x, rows[0].expand(len(x), -1, -1)], dim=1)

        x = tower.pre_layrnorm(x)
        states = []

        for i, layer in enumerate(tower.encoder.layers):
            x = layer(x, attention_mask=None)
            states.append(x[:, :count])
            if rows is not None and i + 1 < len(rows):
                x = torch.cat([x[:, :count], rows[i + 1].expand(len(x), -1, -1)], dim=1)

        return states, self.model.clip.visual_projection(tower.post_layernorm(x[:, 0]))

    def _text(self, texts: list[str], rows: Tensor | None) -> Tensor:
        tower = self.model.clip.text_model
        ids = [self.text.sentence(text) for text in texts]
        x = tower.embeddings.token_embedding(
            nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        )
        prompts = None if rows is None else rows.expand(len(x), *rows.shape[-3:])
        count = 0 if prompts is None else prompts.shape[2]

        if prompts is not None:
            x = torch.cat([x[:, :1], prompts[:, 0], x[:, 1:]], dim=1)

        x = x + tower.embeddings.position_embedding.weight[: x.shape[1]]
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]

        for i, layer in enumerate(tower.encoder.layers):
            x = layer(x, attention_mask=mask)
            if prompts is not None and i + 1 < prompts.shape[1]:
                x = torch.cat([x[:, :1], prompts[:, i + 1], x[:, 1 + count :]], dim=1)

        ends = torch.tensor([len(row) - 1 + count for row in ids])
        pooled = tower.final_layer_norm(x)[torch.arange(len(x)), ends]
        return self.model.clip.text_projection(pooled)
