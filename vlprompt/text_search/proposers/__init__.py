"""Who proposes templates: one file each, discovered, never listed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlprompt.core.errors import ConfigError
from vlprompt.core.options import check_options, options_model
from vlprompt.core.registry import Registry
from vlprompt.text_search.proposers.base import Proposer

__all__ = ["PROPOSERS", "check_proposer", "create_proposer"]

PROPOSERS: Registry[type[Proposer]] = Registry("proposer", "vlprompt.text_search.proposers")
"""Every proposer by name, with what it needs."""

_SECRETS = ("api_key", "key", "token", "password")


def check_proposer(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a proposer's options, checked; nothing is built, read or asked.

    Args:
        name: See :data:`PROPOSERS`.
        options: Its own, see its class.

    Raises:
        UnknownNameError: For an unknown proposer.
        ConfigError: For options that it does not have or values that it does not take, and for a key among them.
    """
    entry = PROPOSERS.get(name)
    # A key that is written here would be in every file that the run writes.
    if secrets := [key for key in options if key in _SECRETS]:
        raise ConfigError(
            [f"{secrets[0]}: a key would be written with the configuration. Put it into an environment variable and "
             "name that: key_variable=OPENAI_API_KEY."], f"proposer {name!r}",
        )  # fmt: skip
    checked = check_options(entry.target, options, source=f"proposer {name!r}")
    missing = [key for key, field in options_model(entry.target).model_fields.items() if field.is_required()]
    if missing := [key for key in missing if key not in options]:
        raise ConfigError([f"{key}: required, but missing." for key in missing], f"proposer {name!r}")
    return checked


def create_proposer(name: str, options: Mapping[str, Any]) -> Proposer:
    """Build a proposer; arguments and errors as :func:`check_proposer`, and those of its constructor."""
    return PROPOSERS.get(name).target(**check_proposer(name, options))
