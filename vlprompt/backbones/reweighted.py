"""A backbone whose image tower runs with other weights in place of some of its own.

The backbone itself stays as it is, for everyone else who uses it. A layer's weight is made when the layer runs and
forgotten when it has run; if the backward pass needs it, it is made again. So however many layers are replaced,
there is no second copy of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vlprompt.backbones.attention import reads_its_layers_weights
from vlprompt.backbones.base import Backbone
from vlprompt.backbones.edits import Adapter
from vlprompt.backbones.vision import Images, Prompts, TokenStates, VisionTower
from vlprompt.core.errors import BackboneError

__all__ = ["Reweight", "ReweightedBackbone"]

Reweight = Callable[[Tensor], Tensor]
"""Makes the weight to use of the frozen one, the same every time; it may be differentiable in something else."""


class ReweightedBackbone(Backbone):
    """A view of a backbone that shares all its parts.

    Args:
        backbone: Whose parts it shares; not changed.
        weights: Name of a weight, relative to the image tower, to what replaces it (see :data:`Reweight`).
    """

    def __init__(self, backbone: Backbone, weights: Mapping[str, Reweight]) -> None:
        nn.Module.__init__(self)
        # Every fact of the backbone, also those that are written down after it was built.
        self.__dict__.update(vars(backbone))
        self._modules = dict(backbone._modules)
        self._weights = dict(weights)
        self._tower = (_Tower(self.vision),)  # a tuple, so that its parts are not registered a second time
        self._layers = _by_caller(self.vision, weights)

    def image_embeddings(
        self,
        images: Images,
        prompts: Prompts | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> Tensor:
        """See :meth:`Backbone.image_embeddings`; with a graph, if the weights need one.

        Raises:
            BackboneError: If there are adapters, which read the tower's own weights, or if the tower reads a weight
                without calling its layer.
        """
        if adapters is not None:
            raise BackboneError(
                "adapters of attention can't be combined with replaced weights of the image tower. Fold the weights "
                "into the backbone first, or leave the image tower alone (encoder=text)."
            )

        if torch.compiler.is_compiling():  # a traced graph keeps what it needs by itself
            made = {
                f"visual.{name}": make(self.vision.visual.get_parameter(name))
                for name, make in self._weights.items()
            }
            return functional_call(self._tower[0], made, (images.to(self.device), prompts))

        # Weights below kept states are not read again: nothing is learned there (see Learner.frozen_stages).
        start = images.blocks if isinstance(images, TokenStates) else None
        with _replaced(self._layers, start):
            return self.vision.encode(images.to(self.device), prompts)


class _Tower(nn.Module):
    """An image tower as one module, for ``functional_call``."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.visual = tower.visual
        self.tower = tower

    def forward(self, images: Images, prompts: Prompts | None) -> Tensor:
        """See :meth:`VisionTower.encode`."""
        return self.tower.encode(images, prompts)


@dataclass
class _Place:
    """A weight that is replaced: the parameter ``name`` of the module ``owner``, in a block if it is in one."""

    owner: nn.Module
    name: str
    make: Reweight
    block: int | None

    def frozen(self) -> Tensor:
        return self.owner._parameters[self.name]  # type: ignore[return-value]


@dataclass(frozen=True)
class _Recipe:
    """What stands in the graph for a replaced weight (or a view of it)."""

    frozen: Tensor
    make: Reweight
    dtype: torch.dtype
    geometry: tuple[Any, ...]  # size, strides, offset

    @torch.no_grad()
    def cook(self) -> Tensor:
        return self.make(self.frozen).to(self.dtype).as_strided(*self.geometry)


def _by_caller(tower: VisionTower, weights: Mapping[str, Reweight]) -> list[tuple[nn.Module, list[_Place]]]:
    """Group weights by the module whose call reads them: attention reads its projections' weights by itself."""
    visual = tower.visual
    layers: dict[nn.Module, list[_Place]] = {}
    for path, make in weights.items():
        prefix, _, name = path.rpartition(".")
        owner = visual.get_submodule(prefix)
        parent = visual.get_submodule(prefix.rpartition(".")[0])
        layers.setdefault(parent if reads_its_layers_weights(parent) else owner, []).append(
            _Place(owner, name, make, tower.block_of(path))
        )

    return list(layers.items())


@contextmanager
def _replaced(layers: Sequence[tuple[nn.Module, Sequence[_Place]]], start: int | None) -> Iterator[None]:
    """While open, each of the layers runs with its other weights.

    Args:
        layers: See :func:`_by_caller`.
        start: The first block that runs; None if the whole tower does.
    """
    alive: dict[int, tuple[Tensor, Reweight]] = {}  # by the address of what was made
    ran: set[nn.Module] = set()

    def pack(saved: Tensor) -> Any:
        made = alive.get(saved.untyped_storage().data_ptr())
        if made is None:
            return saved
        return _Recipe(*made, saved.dtype, (saved.size(), saved.stride(), saved.storage_offset()))

    def unpack(saved: Any) -> Tensor:
        return saved.cook() if isinstance(saved, _Recipe) else saved

    def around(places: Sequence[_Place]) -> tuple[Callable[..., None], Callable[..., None]]:
        frozen = [layer.frozen() for layer in places]

        def enter(caller: nn.Module, *_: Any) -> None:
            ran.add(caller)
            for layer, weight in zip(places, frozen, strict=True):
                made = layer.make(weight)
                alive[made.untyped_storage().data_ptr()] = (weight, layer.make)
                layer.owner._parameters[layer.name] = made  # type: ignore[assignment]  # as functional_call does

        def leave(*_: Any) -> None:
            for layer, weight in zip(places, frozen, strict=True):
                layer.owner._parameters[layer.name] = weight  # type: ignore[assignment]
            alive.clear()

        return enter, leave

    handles = []
    undo = []
    for caller, places in layers:
        enter, leave = around(places)
        handles += [caller.register_forward_pre_hook(enter), caller.register_forward_hook(leave)]
        undo.append(leave)
    keep = torch.is_grad_enabled()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack) if keep else nullcontext():
            yield
        _check_all_ran(layers, ran, start)
    finally:
        for handle in handles:
            handle.remove()
        for leave in undo:
            leave()


def _check_all_ran(
    layers: Sequence[tuple[nn.Module, Sequence[_Place]]], ran: set[nn.Module], start: int | None
) -> None:
    """Refuse a tower that reads a weight in another way than by calling its layer: replacing it would do nothing."""
    unread = [place for caller, places in layers if caller not in ran for place in places]
    if start is not None:
        unread = [place for place in unread if place.block is not None and place.block >= start]
    if unread:
        kinds = ", ".join(sorted({f"{type(place.owner).__name__}.{place.name}" for place in unread}))
        raise BackboneError(
            f"{len(unread)} weights of this image tower can't be replaced: it reads them without calling their layers "
            f"({kinds}). Leave them out (tensors=...), or use another learner."
        )
