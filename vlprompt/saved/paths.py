"""Where saved prompts lie: one is named by its own folder, by its cell's, by its run's, or by its name on the Hub."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from vlprompt.core.errors import CheckpointError
from vlprompt.core.hub import HF_HUB, HubError, Repository, names_repository
from vlprompt.core.paths import user_path

__all__ = ["CARD_FILE", "PROMPT_FILE", "find_prompts", "prompt_folder"]

PROMPT_FILE = "prompt.safetensors"
"""The file that makes a folder a saved prompt."""

CARD_FILE = "prompt.json"
"""What lies beside it."""

_SHOWN = 10  # prompts that an error names


def prompt_folder(path: str | Path) -> Path:
    """Return the folder of the one saved prompt that a path means.

    Args:
        path: The prompt's folder; or one that has it in ``prompt/`` (a cell) or in ``cells/*/prompt/`` (a run). Where
            there is no such folder, ``"user/name"`` or ``"user/name@revision"`` is a repository on the Hub;
            ``"hf-hub:user/name"`` is always one.

    Raises:
        CheckpointError: If there is none, or more than one; names them. If it can't be fetched; says why.
    """
    if _is_on_hub(path):
        return _fetched(str(path))

    folders = _prompts_in(user_path(path))
    if not folders:
        raise CheckpointError(
            f"no saved prompt at {str(path)!r}: expected the folder of a prompt, of a cell or of a run "
            f"(no such file: {user_path(path) / PROMPT_FILE})."
        )
    if len(folders) > 1:
        names = "".join(f"\n  {folder}" for folder in folders[:_SHOWN])
        more = f"\n  and {len(folders) - _SHOWN} more" if len(folders) > _SHOWN else ""
        raise CheckpointError(f"{path} holds {len(folders)} saved prompts; name one of them:{names}{more}")
    return folders[0]


def find_prompts(patterns: Sequence[str | Path]) -> list[str]:
    """Return the folders of all saved prompts that paths or patterns mean.

    Args:
        patterns: The folder of a prompt, of a cell or of a run each, shell patterns of such folders, or names on the
            Hub (see :func:`prompt_folder`).

    Raises:
        CheckpointError: If one of them means nothing, or can't be fetched.
    """
    prompts: list[str] = []
    for text in patterns:
        if _is_on_hub(text):
            prompts.append(str(_fetched(str(text))))
            continue

        pattern = str(user_path(text))
        roots = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        folders = [folder for root in roots for folder in _prompts_in(Path(root))]
        if not folders:
            raise CheckpointError(
                f"no saved prompt at {pattern!r}: expected a folder with {PROMPT_FILE}, or a run's folder."
            )
        prompts += [str(folder) for folder in folders]
    return prompts


def _prompts_in(folder: Path) -> list[Path]:
    """Return the nearest saved prompts: the folder itself, else the one of a cell, else those of a run."""
    for places in ([folder], [folder / "prompt"], sorted(folder.glob("cells/*/prompt"))):
        prompts = [path for path in places if (path / PROMPT_FILE).is_file()]
        if prompts:
            return prompts
    return []


def _is_on_hub(path: str | Path) -> bool:
    """Return whether a path is the name of a repository: it says so, or there is no such folder."""
    text = str(path)
    return text.startswith(HF_HUB) or (names_repository(text) and not user_path(path).exists())


def _fetched(text: str) -> Path:
    """Return the folder in the Hub's cache that holds a repository's prompt.

    Raises:
        CheckpointError: If the repository has none, or can't be reached; names both readings of a word that may also
            be a path.
    """
    repository = Repository(text.removeprefix(HF_HUB))
    here = "" if text.startswith(HF_HUB) else f"no folder {text!r} here; "
    try:
        tensors = repository.fetch(PROMPT_FILE)
        # The card of the same commit, even where somebody pushes in between.
        card = None if tensors is None else repository.fetch(CARD_FILE, revision=tensors.parent.name)
    except HubError as error:
        raise CheckpointError(f"{here}{error}") from error

    if tensors is None or card is None:
        raise CheckpointError(
            f"{here}{HF_HUB}{repository.repo} holds no saved prompt (no {PROMPT_FILE}). A repository of weights is a "
            f"backbone: create_backbone('{HF_HUB}{repository.repo}')."
        )
    return tensors.parent
