"""Every benchmark explains its options on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import BENCHMARKS
from vlprompt.core.options import describe_options, options_model


@pytest.mark.parametrize("entry", list(BENCHMARKS), ids=lambda entry: entry.name)
def test_every_option_is_described(entry: Any) -> None:
    text, described = describe_options(entry.target)
    assert text
    assert "Args:" not in text
    assert set(described) == set(options_model(entry.target).model_fields)
    assert all(described.values())


def test_a_description_goes_on_over_lines() -> None:
    def target(*, first: int = 1, second: int = 2) -> None:
        """Do it.

        Well.

        Args:
            first: One thing:
                and another.
            second: Two.

        Raises:
            ValueError: Never.
        """

    assert describe_options(target) == (
        "Do it.\n\nWell.",
        {"first": "One thing: and another.", "second": "Two."},
    )
