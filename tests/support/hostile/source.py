"""The source of the decisions of a hostile front end and its guest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Source(Protocol):
    """Makes the decisions of a run."""

    def integer(self, low: int, high: int) -> int:
        """Return a number from `low` to `high`, both included."""

    def blob(self, most: int) -> bytes:
        """Return up to `most` bytes."""

    def pick(self, options: Sequence[T]) -> T:
        """Return one of `options`."""
