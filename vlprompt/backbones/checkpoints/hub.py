"""Weights from the Hugging Face Hub: a card, and the files of weights that lie beside it."""

from __future__ import annotations

import json
from pathlib import Path

from vlprompt.backbones.checkpoints.cards import CARD_FILES
from vlprompt.backbones.checkpoints.files import WEIGHT_FILES, WeightFiles, find_weight_files
from vlprompt.core.errors import BackboneError
from vlprompt.core.hub import HF_HUB, HubError, Repository, UnreachableError

__all__ = ["WeightsRepository", "fetch_weights"]

_ADVICE = (
    "Fetch the repository where there is a network and pass 'local-dir:PATH', or set HF_HOME to a cache that holds "
    "it. What works offline: create_backbone('tiny'), whose weights are in the package."
)


class WeightsRepository(Repository):
    """A repository of weights.

    Args:
        name: ``"org/name"``, or ``"org/name@revision"``.
        cache_dir: Where files are kept; None for the usual folder.
    """

    def __init__(self, name: str, cache_dir: str | None) -> None:
        super().__init__(name, cache_dir, _ADVICE)

    def fetch(self, file: str, revision: str | None = None) -> Path | None:
        """See :meth:`vlprompt.core.hub.Repository.fetch`.

        Raises:
            BackboneError: If it can't be fetched; says why, and what to do.
        """
        try:
            return super().fetch(file, revision)
        except UnreachableError as error:
            raise _UnreachableError(str(error)) from error
        except HubError as error:
            raise BackboneError(str(error)) from error

    def first(self, names: tuple[str, ...], what: str) -> Path:
        """Return the first of these files that the repository has.

        Raises:
            BackboneError: If it has none of them, or they can't be fetched.
        """
        unreachable = None
        for name in names:
            try:
                path = self.fetch(name)
            except _UnreachableError as error:  # offline, another name may still be in the cache
                unreachable = error
                continue
            if path is not None:
                return path

        if unreachable is not None:
            raise BackboneError(str(unreachable)) from unreachable
        raise BackboneError(f"{HF_HUB}{self.repo} has no {what}: none of {', '.join(names)}.")


class _UnreachableError(BackboneError):
    """The Hub could not be asked."""


def fetch_weights(repository: WeightsRepository, card: bool) -> WeightFiles:
    """Return the weights of a repository; its cards are fetched to lie beside them.

    Args:
        repository: Where they are.
        card: Whether there must be a card that describes the model.

    Raises:
        BackboneError: If something is missing or can't be fetched.
    """
    if card:
        repository.first(CARD_FILES[:2], "card")

    path = repository.first(WEIGHT_FILES, "weights")
    for name in CARD_FILES:
        _fetch_if_there(repository, name)

    if path.name.endswith(".index.json"):
        for part in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())):
            if repository.fetch(str(part)) is None:
                raise BackboneError(f"{HF_HUB}{repository.repo} has no {part}, which its {path.name} names.")
    return find_weight_files(path, f"{HF_HUB}{repository.repo}")


def _fetch_if_there(repository: WeightsRepository, name: str) -> None:
    """Fetch a file that a repository need not have; offline, what is in the cache is all there is."""
    try:
        repository.fetch(name)
    except _UnreachableError:
        return
