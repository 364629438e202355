"""docs/browser.py, which the pictures of the documents are taken with, for tests of pages."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

__all__ = ["load_browser"]


@functools.cache
def load_browser() -> ModuleType:
    """Return the module; the caller is skipped where there is no browser."""
    pytest.importorskip("selenium", reason="selenium drives the browser")
    path = Path(__file__).parent.parent / "docs" / "browser.py"
    spec = importlib.util.spec_from_file_location("docs_browser", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := module.missing_programs():
        pytest.skip(missing, allow_module_level=True)
    return module
