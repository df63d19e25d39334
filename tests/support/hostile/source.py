"""Who decides what a hostile front end and its guest do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Source(Protocol):
    """Whoever decides."""

    def integer(self, low: int, high: int) -> int:
        """Some number from `low` to `high`, both included."""

    def blob(self, most: int) -> bytes:
        """Up to `most` bytes."""

    def pick(self, options: Sequence[T]) -> T:
        """One of them."""
