"""The obvious way to run both towers, as a switch on a backbone: what benchmarks compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Aside
from vlprompt.backbones.text import TextTower
from vlprompt.learners import Learner

__all__ = ["naive_text_bytes", "naive_towers", "replaced"]


_NAIVE_BYTES = 4 << 30
_BYTES = 4 * 17  # that autograd keeps per token, layer and unit of width, as in the packed tower


def naive_text_bytes(tower: TextTower, sentences: int) -> int:
    """Return the bytes of activations of so many full sentences with their graph."""
    return _BYTES * tower.layers * tower.width * tower.context_length * sentences


@contextmanager
def naive_towers(
    learner: Learner, image_graph: bool = True, constant_text: bool = False, memory: int = _NAIVE_BYTES
) -> Iterator[Aside]:
    """While open, the learner's backbone computes the same with nothing left out, by torch's own attention.

    Yields what only the lack of memory costs: sentences whose graph does not fit are run once without one, and that
    is no part of the obvious way.

    Args:
        learner: Whose backbone; others that share it are affected too.
        image_graph: Keep a graph from the pixels on, also where nothing in the image tower learns.
        constant_text: The learner's class weights are constants; encode their sentences at every step anyway.
        memory: Bytes of activations of text while it is open; further sentences go in chunks, computed again in the
            backward pass.
    """
    aside = Aside()
    left = memory
    backbone = learner.backbone
    tower = learner.backbone.text
    embed = tower.embed
    class_weights = learner.class_weights
    template = learner.templates[0]

    def encode(
        layout: Any, context: Any = None, deep: Any = None, adapters: Any = None, offsets: Any = None
    ) -> Tensor:
        nonlocal left
        groups = max(
            [
                1,
                *(
                    len(t)
                    for t, size in ((context, 3), (deep, 4))
                    if isinstance(t, Tensor) and t.dim() == size
                ),
            ]
        )
        need = naive_text_bytes(tower, groups * len(layout))
        if not torch.is_grad_enabled() or need <= left:
            left -= need if torch.is_grad_enabled() else 0
            return tower.encode_plain(layout, context, deep, tower.context_length, adapters, offsets)

        size = max(1, len(layout) * memory // (2 * need))
        parts = []
        with aside.running():
            for start in range(0, len(layout), size):
                part = layout.part(range(start, min(start + size, len(layout))))
                arguments = (part, context, deep, tower.context_length, adapters, offsets)
                parts.append(checkpoint(tower.encode_plain, *arguments, use_reentrant=False))
        return torch.cat(parts, dim=-2)

    def embed_with_graph(*arguments: Any) -> Tensor:
        return _require_grad(embed(*arguments))

    def image_embeddings(images: Tensor, prompts: Any = None, adapters: Any = None) -> Tensor:
        images = images.to(backbone.device)
        return backbone.vision.encode(_require_grad(images) if image_graph else images, prompts, adapters)

    def image_embeddings_and_tokens(images: Tensor, adapters: Any) -> tuple[Tensor, Tensor]:
        images = images.to(backbone.device)
        return backbone.vision.encode_entered(_require_grad(images) if image_graph else images, adapters)

    def class_weights_every_step() -> Tensor:
        sentences = [tower.sentence(template.format(name)) for name in learner.classnames]
        return class_weights() + 0 * tower.encode(tower.layout(sentences, learner.classnames))

    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (tower, "encode", encode),
        (tower, "embed", embed_with_graph),
        (backbone, "image_embeddings", image_embeddings),
        (backbone, "image_embeddings_and_tokens", image_embeddings_and_tokens),
        *(
            [(learner, "class_weights", class_weights_every_step)]
            if constant_text and tower.refusal is None
            else []
        ),
    ]
    with patch("vlprompt.backbones.vision.quick_attention", nullcontext), replaced(replacements):
        yield aside


@contextmanager
def replaced(methods: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """While open, instances use other functions in place of their class's methods."""
    with ExitStack() as stack:
        for owner, name, function in methods:
            vars(owner)[name] = function
            stack.callback(vars(owner).pop, name)
        yield


def _require_grad(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x
