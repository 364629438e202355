"""Names that the shell completes."""

from __future__ import annotations

__all__ = ["complete_config"]


def complete_config(incomplete: str) -> list[str]:
    """Return the shipped configurations whose names begin so."""
    from vlprompt.experiments.config import list_configs  # the shell asks; help doesn't

    return [name for name in list_configs() if name.startswith(incomplete)]
