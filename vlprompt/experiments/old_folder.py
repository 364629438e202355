"""The folder of an experiment: where it lies, what is written into it, and what its page says of the machine."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from vlprompt.core.files import write_text
from vlprompt.core.processes import process_state
from vlprompt.core.version import package_version

__all__ = ["environment", "open_folder", "write_history", "yaml_text"]


def open_folder(config: Any, resume: bool) -> Path:
    """Return the folder of a configuration with ``name`` and ``output``, emptied unless it is resumed."""
    digest = hashlib.sha256(yaml_text(config).encode()).hexdigest()[:8]
    folder = Path(config.output) / config.name / digest

    state = process_state()
    if state.is_main_process:
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        text = f"# vlprompt {package_version()}\n{yaml_text(config)}"
        write_text(folder / "config.yaml", text)

    state.wait_for_everyone()
    return folder


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write one line of JSON per epoch."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in history))


def yaml_text(config: Any) -> str:
    """Return the resolved configuration as YAML; its hash names the run's folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def environment() -> dict[str, str]:
    """Return the versions that figures depend on."""
    return {"vlprompt": package_version(), "torch": torch.__version__, "python": platform.python_version()}
