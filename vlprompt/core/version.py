"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["package_version"]


def package_version() -> str:
    """Return the installed version of vlprompt, ``"unknown"`` in a bare source tree."""
    try:
        return version("vlprompt")
    except PackageNotFoundError:
        return "unknown"
