"""Options that several callables share, and the one place that has their defaults."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field
from typing_extensions import TypedDict

from vlprompt.core.options import whole_options
from vlprompt.text_search.proposers import create_proposer


class _Options(TypedDict, total=False):
    size: Annotated[int, Field(3, ge=1)]
    name: Annotated[str | None, Field(None)]


def test_what_is_not_given_has_its_default() -> None:
    assert whole_options(_Options, {"name": "a"}) == {"size": 3, "name": "a"}
    assert whole_options(_Options, {}) == {"size": 3, "name": None}


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        (
            "clusters",
            "clusters greedy words behind length=3 vocabulary=9 clusters=200 percentile=80 population=64",
        ),
        (
            "policy",
            "policy words behind length=3 vocabulary=9 clusters=200 percentile=80 width=64 lr=0.02 entropy=0.01",
        ),
    ],
)
def test_proposers_of_units_have_the_same_options(name: str, identity: str) -> None:
    assert create_proposer(name, {"site": "behind", "vocabulary": 9}).identity == identity
    with pytest.raises(ValueError, match=r"length: input should be less than or equal to 12, got 13.*"):
        create_proposer(name, {"length": 13})
