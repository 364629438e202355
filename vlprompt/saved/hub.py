"""Sharing what was learned: two small files and a model card, as a repository on the Hugging Face Hub.

What is pushed names no folder of the machine that it was trained on. It is read again by
:func:`vlprompt.load`, see :mod:`vlprompt.saved.paths`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import Tensor

from vlprompt.backbones.origin import LOCAL_DIR
from vlprompt.core.errors import CheckpointError, first_line
from vlprompt.core.files import write_json, write_tensors, write_text
from vlprompt.core.hub import HF_HUB, HubError, Repository
from vlprompt.core.options import check_switches
from vlprompt.saved.card import PromptCard, read
from vlprompt.saved.model_card import GENERATED, model_card
from vlprompt.saved.paths import CARD_FILE, PROMPT_FILE

__all__ = ["push", "write_repository"]

_MODEL_CARD = "README.md"
_MAIN = "main"


def push(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    licence: str | None = None,
    message: str = "Upload a prompt of vlprompt",
) -> str:
    """Publish a saved prompt on the Hugging Face Hub, with a model card that is written from what is known of it.

    A repository that exists keeps its history, and its model card if a person wrote it. Log in with ``hf auth login``,
    or set ``HF_TOKEN``.

    Args:
        path: What :func:`vlprompt.save` or a run wrote; see :func:`vlprompt.load`.
        repository: ``"user/name"``; made if there is none.
        private: Whether a new repository is open to its owners alone.
        revision: Branch to push to, made if there is none; None is the main branch.
        licence: Of what was learned, as the Hub names it: ``"mit"``, ``"cc-by-4.0"``.
        message: Of the commit.

    Returns:
        ``"user/name@commit"``, which :func:`vlprompt.load` takes.

    Raises:
        CheckpointError: If there is no such prompt, it can't be used elsewhere, or the Hub refuses it; says why.
        DataError: If ``private`` is neither true nor false.
    """
    check_switches(private=private)
    with tempfile.TemporaryDirectory(prefix="vlprompt-push-") as name:
        folder = Path(name)
        write_repository(path, folder, repository, licence)
        try:
            return _upload(folder, repository, private, revision, message)
        except HFValidationError as error:
            raise CheckpointError(f"{repository!r}: a name on the Hub looks like user/name.") from error
        except OfflineModeIsEnabled as error:
            raise CheckpointError(_refused(repository, "HF_HUB_OFFLINE is set; unset it")) from error
        except HubError as error:
            raise CheckpointError(str(error)) from error
        except HfHubHTTPError as error:
            raise CheckpointError(_refused(repository, _reason(error))) from error
        except Exception as error:  # connections, disks and servers raise many kinds
            raise CheckpointError(_refused(repository, first_line(error))) from error


def write_repository(path: str | Path, folder: Path, repository: str, licence: str | None = None) -> None:
    """Write the files of a repository: the prompt, its card without paths of this machine, and the model card.

    Args:
        path: See :func:`push`.
        folder: Where they are written.
        repository: See :func:`push`.
        licence: See :func:`push`.

    Raises:
        CheckpointError: If there is no such prompt, or it can't be used elsewhere.
    """
    card, tensors = read(path)
    card = _portable(path, card)

    _write_prompt(folder, card, tensors)
    write_text(folder / _MODEL_CARD, model_card(card, tensors, repository, licence))


def _write_prompt(folder: Path, card: PromptCard, tensors: dict[str, Tensor]) -> None:
    content = card.model_dump()
    write_tensors(folder / PROMPT_FILE, tensors, {"card": content})
    write_json(folder / CARD_FILE, content)


def _portable(path: str | Path, card: PromptCard) -> PromptCard:
    """Return a card whose paths are file names: their folders mean nothing elsewhere, and may be private.

    Raises:
        CheckpointError: If the prompt needs files that are not pushed with it.
    """
    if "masks" in card.origin:
        raise CheckpointError(
            f"{path} was trained on a backbone with weight masks ({card.origin['masks']}), which are a folder of their "
            "own and would not be pushed with it."
        )

    origin = {key: _without_folder(value) for key, value in card.origin.items()}
    for key in ("relative", "cache_dir"):
        origin.pop(key, None)

    backbone = {key: _without_folder(value) for key, value in card.backbone.items()}
    return card.model_copy(update={"origin": origin, "backbone": backbone})


def _without_folder(value: Any) -> Any:
    """Return a value; of a path from the root, its last name as ``./NAME``."""
    if not isinstance(value, str):
        return value
    prefix = LOCAL_DIR if value.startswith(LOCAL_DIR) else ""
    path = value.removeprefix(prefix)
    return f"{prefix}./{Path(path).name}" if os.path.isabs(path) else value


def _upload(folder: Path, repository: str, private: bool, revision: str | None, message: str) -> str:
    api = HfApi()
    # A branch of a repository that is there already says nothing of others.
    api.create_repo(repository, private=private, exist_ok=True)
    if revision is not None and revision != _MAIN:
        api.create_branch(repository, branch=revision, exist_ok=True)

    names = [PROMPT_FILE, CARD_FILE]
    if _may_write_model_card(repository, revision):
        names.append(_MODEL_CARD)

    operations = [CommitOperationAdd(name, str(folder / name)) for name in names]
    commit = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return f"{repository}@{commit.oid}"


def _may_write_model_card(repository: str, revision: str | None) -> bool:
    """Return whether the repository has no model card, or one that was generated."""
    place = Repository(repository if revision is None else f"{repository}@{revision}")
    existing = place.fetch(_MODEL_CARD)
    return existing is None or GENERATED in existing.read_text(encoding="utf-8", errors="replace")


def _reason(error: HfHubHTTPError) -> str:
    """Return why the Hub refused, with what to do about it."""
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403):
        return (
            f"you are not logged in, or may not write there ({status}). Log in with `hf auth login` and a token that "
            "may write, or set HF_TOKEN"
        )
    return first_line(error)


def _refused(repository: str, reason: str) -> str:
    return f"{HF_HUB}{repository} could not be pushed to: {reason.rstrip('.')}."
