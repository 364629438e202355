"""The obvious way to run both towers, as a switch on a backbone: what benchmarks compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from vlprompt.learners import Learner

__all__ = ["naive_towers", "replaced"]


@contextmanager
def naive_towers(learner: Learner, image_graph: bool = True, constant_text: bool = False) -> Iterator[None]:
    """While open, the learner's backbone computes the same with nothing left out.

    Args:
        learner: Whose backbone; others that share it are affected too.
        image_graph: Keep a graph from the pixels on, also where nothing in the image tower learns.
        constant_text: The learner's class weights are constants; encode their sentences at every step anyway.
    """
    backbone = learner.backbone
    tower = learner.backbone.text
    embed = tower.embed
    class_weights = learner.class_weights
    template = learner.templates[0]

    def encode(layout: Any, context: Any = None, deep: Any = None, adapters: Any = None) -> Tensor:
        return tower.encode_plain(layout, context, deep, tower.context_length, adapters)

    def embed_with_graph(*arguments: Any) -> Tensor:
        return _require_grad(embed(*arguments))

    def image_embeddings(images: Tensor, prompts: Any = None, adapters: Any = None) -> Tensor:
        images = images.to(backbone.device)
        return backbone.vision.encode(_require_grad(images) if image_graph else images, prompts, adapters)

    def class_weights_every_step() -> Tensor:
        sentences = [tower.sentence(template.format(name)) for name in learner.classnames]
        return class_weights() + 0 * tower.encode(tower.layout(sentences, learner.classnames))

    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (tower, "encode", encode),
        (tower, "embed", embed_with_graph),
        (backbone, "image_embeddings", image_embeddings),
        *(
            [(learner, "class_weights", class_weights_every_step)]
            if constant_text and tower.refusal is None
            else []
        ),
    ]
    with replaced(replacements):
        yield


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
