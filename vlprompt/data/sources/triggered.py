"""triggered:NAME: another data set with backdoor triggers in its images (see ``vlprompt.data.compositions``)."""

from __future__ import annotations

from collections.abc import Sequence

from vlprompt.core.errors import DataError
from vlprompt.data.base import ImageDataset
from vlprompt.data.catalog import load_dataset
from vlprompt.data.compositions import composition_dataset
from vlprompt.data.sources import Request, sources
from vlprompt.data.triggers import DEFAULT_TRIGGERS, NATIVE_SIZE, NativeSize, size_of

__all__ = ["build"]


@sources.register(
    "triggered", summary="another data set with backdoor triggers put in", grammar="triggered:NAME"
)
def build(
    request: Request,
    *,
    triggers: Sequence[str] | None = None,
    native_size: NativeSize = NATIVE_SIZE,
    compositions_seed: int = 1,
    unseen: float = 0.3,
    copies: int = 1,
) -> ImageDataset:
    """Build one split: every image once clean, and ``copies`` times with a trigger.

    Args:
        request: ``argument`` is the name of the other data set.
        triggers: Names of triggers, the first ``"clean"``; None for the usual ones.
        native_size: Pixels a side at which triggers are put in; all images are brought to it. ``"own"``: triggers are
            put in at the size that each image comes with, and it keeps that size.
        compositions_seed: Of the triggers, and of which compositions of trigger and object training doesn't see.
        unseen: Share of the triggered compositions that training doesn't see.
        copies: Triggered images per image.
    """
    if not request.argument or request.argument.startswith("triggered:"):
        raise DataError(
            f"{request.name}: name the data set to put triggers into, for example triggered:scenes/shape."
        )
    base = load_dataset(request.argument, request.split, root=request.root)
    names = DEFAULT_TRIGGERS if triggers is None else tuple(triggers)
    return composition_dataset(
        base, names, size=size_of(native_size), seed=compositions_seed, unseen=unseen, copies=copies
    )
