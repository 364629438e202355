"""What a search may cost: requests, tokens and money, counted exactly and never exceeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Budget", "BudgetSpentError", "Usage"]


class BudgetSpentError(Exception):
    """A request would exceed the budget; the search ends with what it has."""


@dataclass(frozen=True)
class Usage:
    """What requests cost.

    Attributes:
        requests: How many were sent, those that failed and were sent again among them.
        input_tokens: Tokens that were read.
        output_tokens: Tokens that were written.
        price: In the currency of the user's prices.
        estimated: Whether the server did not say, so that tokens were estimated from characters.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    price: float = 0.0
    estimated: bool = False

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.price + other.price,
            self.estimated or other.estimated,
        )

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "price": self.price,
            "estimated": self.estimated,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Usage:
        """Return what :meth:`record` described."""
        return cls(**record)


@dataclass
class Budget:
    """Limits, and what is spent of them.

    Attributes:
        max_requests: None is no limit, here and below.
        max_tokens: Read and written.
        max_price: In the currency of the prices.
        spent: So far, in this search and in the runs of it that were killed.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    max_price: float | None = None
    spent: Usage = field(default_factory=Usage)

    @property
    def requests_left(self) -> int | None:
        """Requests that may still be sent; None if there is no limit."""
        return None if self.max_requests is None else max(0, self.max_requests - self.spent.requests)

    def admit(self, tokens: int, price: float = 0.0) -> None:
        """Refuse a request that could exceed the budget.

        Args:
            tokens: The most that it may read and write.
            price: The most that it may cost.

        Raises:
            BudgetSpentError: Names the limit.
        """
        if self.requests_left == 0:
            raise BudgetSpentError(f"{self.max_requests} requests")
        if self.max_tokens is not None and self.spent.tokens + tokens > self.max_tokens:
            raise BudgetSpentError(f"{self.max_tokens} tokens")
        if self.max_price is not None and self.spent.price + price > self.max_price:
            raise BudgetSpentError(f"a price of {self.max_price:g}")

    def spend(self, usage: Usage) -> None:
        """Count what was spent."""
        self.spent = self.spent + usage
