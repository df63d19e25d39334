"""A coverage-guided fuzzer that acts as front end and guest; see ``support.hostile``.

README.md says how to run it. It measures the coverage of dmaproof's Python code. It saves inputs
that reach new code in the folder given as argument.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

with atheris.instrument_imports(include=["dmaproof"]):
    from support import hostile

T = TypeVar("T")


class Bytes:
    """A source of decisions: the fuzzer's bytes."""

    def __init__(self, data: bytes) -> None:
        self._provider: Any = atheris.FuzzedDataProvider(data)

    def integer(self, low: int, high: int) -> int:
        """See `hostile.Source`."""
        return int(self._provider.ConsumeIntInRange(low, high))

    def blob(self, most: int) -> bytes:
        """See `hostile.Source`."""
        return bytes(self._provider.ConsumeBytes(self.integer(0, most)))

    def pick(self, options: Sequence[T]) -> T:
        """See `hostile.Source`."""
        return options[self.integer(0, len(options) - 1)]


if __name__ == "__main__":
    atheris.Setup(sys.argv, lambda data: hostile.attack(Bytes(data)))
    atheris.Fuzz()
