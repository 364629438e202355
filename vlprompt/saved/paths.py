"""Where saved prompts lie: a prompt may be named by its own folder, by its cell's, or by its run's."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from vlprompt.core.errors import CheckpointError
from vlprompt.core.paths import user_path

__all__ = ["PROMPT_FILE", "find_prompts", "prompt_folder"]

PROMPT_FILE = "prompt.safetensors"
"""The file that makes a folder a saved prompt."""

_SHOWN = 10  # prompts that an error names


def prompt_folder(path: str | Path) -> Path:
    """Return the folder of the one saved prompt that a path means.

    Args:
        path: The prompt's folder; or one that has it in ``prompt/`` (a cell) or in ``cells/*/prompt/`` (a run).

    Raises:
        CheckpointError: If there is none, or more than one; names them.
    """
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
        patterns: The folder of a prompt, of a cell or of a run each, or shell patterns of such folders.

    Raises:
        CheckpointError: If one of them means nothing.
    """
    prompts: list[str] = []
    for pattern in (str(user_path(pattern)) for pattern in patterns):
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
