"""The parameters of a guest's workload: what any guest does to its disk and its memory.

The names are the same in docs/guests.md, in ``guests/workload.c``, and with ``--workload``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from dmaproof.errors import UsageError

PATTERNS: Final = ("random", "sequential", "hot-set")
MOST_HOLD_PAGES: Final = 1 << 16

_BOUNDS: Final = {
    "threads": (1, 64),
    "hot": (64, 1 << 24),
    "write_once": (0, 1 << 24),
    "churn": (0, 1 << 24),
    "hold": (0, MOST_HOLD_PAGES),
    "seed": (0, (1 << 64) - 1),
    "write_every": (0, 1 << 30),
    "max_pages": (1, 16),
    "huge_every": (0, 1 << 30),
    "unaligned_every": (0, 1 << 30),
    "image": (0, 1),
    "last": (0, 1 << 24),
}
"""The least and the greatest value of each parameter that is a number."""

MEANINGS: Final = {
    "threads": "requests in flight at a time",
    "hot": "pages that the device writes again and again",
    "write_once": "pages that the device writes a single time",
    "churn": "pages that a vCPU keeps dirtying, without a device",
    "hold": "pages that only QEMU dirties, to hold the migration in precopy; 0: none",
    "seed": "decides every random choice of the guest",
    "pattern": "the order of disk blocks and pages",
    "write_every": "one request in N writes a block, or reads one back; 0: none",
    "max_pages": "the most pages of a request that is not huge",
    "huge_every": "one read in N has 256 pages in a row; 0: none",
    "unaligned_every": "one request in N reads 512-byte pieces to any address; 0: none",
    "image": "1: the disk is an image file (a proof sets this as its device needs it)",
    "last": "write-once pages left for the end (a proof sets this as its device needs it)",
}
"""What each parameter means, for ``dmaproof list workload``."""


def values_of(parameter: str) -> str:
    """Return the values that a parameter can have, as text."""
    if parameter == "pattern":
        return ", ".join(PATTERNS)
    low, high = _BOUNDS[parameter]
    return f"{low} to {high}"


@dataclass(frozen=True)
class Workload:
    """A guest's workload; `hot`, `write_once`, `churn`, `hold` and `max_pages` in pages.

    One request in `write_every`, `huge_every` and `unaligned_every` is of that kind; 0 means none.
    `image` is 1 if the disk is an image file, whose stamps do not change. The guest uses `last` of
    its write-once pages only when the migration is about to end.

    Raises:
        UsageError: a value is out of bounds.
    """

    threads: int = 4
    hot: int = 1024
    write_once: int = 8192
    churn: int = 4096
    hold: int = 2048
    seed: int = 1
    pattern: str = "random"
    write_every: int = 16
    max_pages: int = 8
    huge_every: int = 512
    unaligned_every: int = 16
    image: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(
                    f"workload: {name}={getattr(self, name)} is out of range; expected {low} to "
                    f"{high}"
                )
        if self.pattern not in PATTERNS:
            raise UsageError(
                f"workload: pattern={self.pattern} is unknown; expected one of "
                f"{', '.join(PATTERNS)}"
            )

    def __str__(self) -> str:
        """Return the workload as text for a guest's command line."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


def parse_workload(text: str, seed: int) -> Workload:
    """Parse ``name=value,name=value``; parameters that are not named get their defaults.

    Raises:
        UsageError: a parameter is unknown, or its value is not a number or is out of bounds.
    """
    known = [field.name for field in fields(Workload)]
    given: dict[str, Any] = {"seed": seed}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        if name not in known:
            raise UsageError(
                f"workload: unknown parameter {name!r}; expected one of {', '.join(known)}"
            )
        try:
            given[name] = value if name == "pattern" else int(value)
        except ValueError:
            raise UsageError(f"workload: {name}: expected a number, got {value!r}") from None
    return Workload(**given)
