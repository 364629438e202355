"""What Gradio finds when it is imported: no telemetry, and a folder for uploads that goes when the page goes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlprompt.core.errors import VLPromptError

__all__ = ["private_gradio"]


@contextmanager
def private_gradio() -> Iterator[Path]:
    """Set Gradio up; its modules are to be imported inside.

    Yields:
        A folder for files of this page, which is removed at the end.

    Raises:
        VLPromptError: If Gradio can't be imported.
    """
    with tempfile.TemporaryDirectory(prefix="vlprompt-demo-", ignore_cleanup_errors=True) as folder:
        uploads = Path(folder, "uploads")
        uploads.mkdir()
        with _variables(
            GRADIO_ANALYTICS_ENABLED="False",
            GRADIO_RUN_HISTORY="False",
            GRADIO_TEMP_DIR=str(uploads),
            HF_HUB_DISABLE_TELEMETRY="1",
        ):
            try:
                import gradio  # noqa: F401 - it reads these when it is imported, and when a page is built
            except ImportError as error:
                raise VLPromptError(
                    f"the page needs gradio ({error}): pip install 'vlprompt[demo]'."
                ) from None
            yield Path(folder)


@contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Set variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
