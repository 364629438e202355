"""The blocks of the documents, as programs."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["DOCS", "script_of"]

DOCS = Path(__file__).parent.parent / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script_of(page: Path) -> str:
    """Return the blocks of a page as one program: each sh block as it is, each python block as a program of its own."""
    parts = ["set -euo pipefail"]
    for language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            parts.append(text)
        elif language == "python":
            parts.append(f"python - <<'END OF PYTHON'\n{text}END OF PYTHON\n")
    return "\n".join(parts)
