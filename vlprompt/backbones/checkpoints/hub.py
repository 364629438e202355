"""Weights from the Hugging Face Hub: a card, and the files of weights that lie beside it."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlprompt.backbones.checkpoints.cards import CARD_FILES
from vlprompt.backbones.checkpoints.files import WEIGHT_FILES, WeightFiles, find_weight_files
from vlprompt.core.errors import BackboneError

__all__ = ["Repository", "fetch_weights"]

_OFFLINE = "What works offline: create_backbone('tiny'), whose weights are in the package."


class Repository:
    """A model on the Hub, or in its cache.

    Args:
        name: ``"org/name"``, or ``"org/name@revision"``.
        cache_dir: Where files are kept; None for the usual folder.

    Attributes:
        repo: ``"org/name"``.
        revision: Branch, tag or commit; None for the main branch.
    """

    def __init__(self, name: str, cache_dir: str | None) -> None:
        repo, _, revision = name.partition("@")
        self.repo = repo
        self.revision = revision or None
        self.cache_dir = cache_dir

    def fetch(self, file: str) -> Path | None:
        """Return a file of the repository, fetched if it is not in the cache; None if the repository has none.

        Raises:
            BackboneError: If it can't be fetched; says why, and what to do.
        """
        try:
            return Path(hf_hub_download(self.repo, file, revision=self.revision, cache_dir=self.cache_dir))
        except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError, but the Hub was not asked
            raise _UnreachableError(
                self._message(file, "the Hub can't be reached, and the cache has no copy")
            ) from error
        except EntryNotFoundError:
            return None
        except RepositoryNotFoundError as error:
            reason = (
                "there is no such repository, or it is not open to everyone (401). If it is private or gated, accept "
                "its terms on its page and log in with `hf auth login`, or set HF_TOKEN"
            )
            raise BackboneError(self._message(file, reason)) from error
        except RevisionNotFoundError as error:
            raise BackboneError(self._message(file, f"there is no revision {self.revision!r}")) from error
        except HFValidationError as error:
            raise BackboneError(self._message(file, "a name on the Hub looks like org/name")) from error
        except Exception as error:  # connections, disks and servers raise many kinds
            raise BackboneError(self._message(file, _first_line(error))) from error

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
        raise BackboneError(f"hf-hub:{self.repo} has no {what}: none of {', '.join(names)}.")

    def _message(self, file: str, reason: str) -> str:
        return (
            f"{file} of hf-hub:{self.repo} could not be fetched: {reason.rstrip('.')}. Fetch the repository where "
            f"there is a network and pass 'local-dir:PATH', or set HF_HOME to a cache that holds it. {_OFFLINE}"
        )


class _UnreachableError(BackboneError):
    """The Hub could not be asked."""


def fetch_weights(repository: Repository, card: bool) -> WeightFiles:
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
                raise BackboneError(f"hf-hub:{repository.repo} has no {part}, which its {path.name} names.")
    return find_weight_files(path, f"hf-hub:{repository.repo}")


def _fetch_if_there(repository: Repository, name: str) -> None:
    """Fetch a file that a repository need not have; offline, what is in the cache is all there is."""
    try:
        repository.fetch(name)
    except _UnreachableError:
        return


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shorten(lines[0] if lines else type(error).__name__, 300, placeholder=" ...")
