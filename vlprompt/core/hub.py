"""The Hugging Face Hub: files of a repository, from its cache where they are there already."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlprompt.core.errors import VLPromptError, first_line

__all__ = ["HF_HUB", "HubError", "Repository", "UnreachableError", "names_repository"]

HF_HUB = "hf-hub:"
"""Says that what follows is the name of a repository."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)


class HubError(VLPromptError):
    """A repository that is not there, is closed, or lacks a file; says why, and what to do."""


class UnreachableError(HubError):
    """The Hub could not be asked, and the cache has no copy."""


class Repository:
    """A model repository on the Hub, or in its cache.

    Args:
        name: ``"org/name"``, or ``"org/name@revision"``.
        cache_dir: Where files are kept; None for the usual folder.
        advice: What to do where a file can't be fetched; the end of every message.

    Attributes:
        repo: ``"org/name"``.
        revision: Branch, tag or commit; None for the main branch.
    """

    def __init__(self, name: str, cache_dir: str | None = None, advice: str = "") -> None:
        repo, _, revision = name.partition("@")
        self.repo = repo
        self.revision = revision or None
        self.cache_dir = cache_dir
        self.advice = advice

    def fetch(self, file: str, revision: str | None = None) -> Path | None:
        """Return a file of the repository, fetched if it is not in the cache; None if the repository has none.

        Args:
            file: Its path in the repository.
            revision: In place of the repository's own.

        Raises:
            HubError: If it can't be fetched; says why, and what to do.
        """
        revision = revision or self.revision
        try:
            return Path(hf_hub_download(self.repo, file, revision=revision, cache_dir=self.cache_dir))
        except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError, but the Hub was not asked
            reason = "the Hub can't be reached, and the cache has no copy"
            raise UnreachableError(self._message(file, reason)) from error
        except EntryNotFoundError:
            return None
        except RepositoryNotFoundError as error:
            reason = (
                "there is no such repository, or it is not open to everyone (401). If it is private or gated, accept "
                "its terms on its page and log in with `hf auth login`, or set HF_TOKEN"
            )
            raise HubError(self._message(file, reason)) from error
        except RevisionNotFoundError as error:
            raise HubError(self._message(file, f"there is no revision {revision!r}")) from error
        except HFValidationError as error:
            raise HubError(self._message(file, "a name on the Hub looks like org/name")) from error
        except Exception as error:  # connections, disks and servers raise many kinds
            raise HubError(self._message(file, first_line(error))) from error

    def _message(self, file: str, reason: str) -> str:
        return (
            f"{file} of {HF_HUB}{self.repo} could not be fetched: {reason.rstrip('.')}. {self.advice}".strip()
        )


def names_repository(text: str) -> bool:
    """Return whether a word could be the name of a repository, ``org/name`` or ``org/name@revision``."""
    return _NAME.fullmatch(text) is not None
