"""What a check has found: the pages that differ, what was not compared, and the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.errors import DmaproofError, UntestableError, UsageError

from ..exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED
from .guest import Side

_MOST_NAMED: Final = 10
IMAGE: Final = "image"
"""The name of the only region of a raw image, in which a page has an offset but no GPA."""


class RamDiffersError(DmaproofError, AssertionError):
    """Pages differ; the message names the first ones. Test frameworks report it as a failure."""


@dataclass(frozen=True)
class Difference:
    """A page that differs. `gpa` is None in RAM that the physical map hides.

    `offset` is that of the page in memory region `region`. `bytes_differing` is None if a snapshot
    has only the digest of the page. `device` is the DIMM that contains the page, if any. `known`
    names an entry of `known_differences`, and `why` is its explanation.
    """

    gpa: int | None
    region: str
    offset: int
    bytes_differing: int | None
    device: str | None = None
    known: str | None = None
    why: str | None = None


def _no_pages() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class ComparedArea:
    """A run of pages that was compared.

    `differing` are the numbers of its pages that differ, `discarded` those of pages that the guest
    gave back, and `undecided` those of pages that may be either.
    """

    gpa: int | None
    region: str
    offset: int
    pages: int
    differing: NDArray[np.int64]
    discarded: NDArray[np.int64] = field(default_factory=_no_pages)
    undecided: NDArray[np.int64] = field(default_factory=_no_pages)


@dataclass(frozen=True)
class NotCompared:
    """Memory of `length` bytes that was not compared, and the reason."""

    region: str
    offset: int
    length: int
    why: str


@dataclass(frozen=True)
class Check:
    """The outcome; `differences` has the first pages that differ, and `areas` has all of them.

    `discarders` are the names of the source's devices through which its guest may give memory back.
    """

    source: Side
    destination: Side
    areas: Sequence[ComparedArea]
    differences: Sequence[Difference]
    not_compared: Sequence[NotCompared]
    notes: Sequence[str]
    compare_s: float
    discarders: Sequence[str] = ()

    @property
    def pages(self) -> int:
        """The number of pages that were compared."""
        return sum(area.pages for area in self.areas)

    @property
    def differing(self) -> int:
        """The number of pages that differ."""
        return sum(len(area.differing) for area in self.areas)

    @property
    def discarded(self) -> int:
        """The number of pages that may differ because the guest gave them back."""
        return sum(len(area.discarded) for area in self.areas)

    @property
    def undecided(self) -> int:
        """The number of pages that are not equal and were either given back or lost."""
        return sum(len(area.undecided) for area in self.areas)

    @property
    def known(self) -> int:
        """The number of pages that differ, but are known to differ after a correct migration."""
        return sum(difference.known is not None for difference in self.differences)

    @property
    def exit_code(self) -> int:
        """1 if pages differ that are not known to differ, 3 if that is undecided, else 0."""
        if self.differing > self.known:
            return EXIT_LOST
        return EXIT_UNTESTED if self.undecided else EXIT_PASS

    def __bool__(self) -> bool:
        """Refuse: ``assert check(…)`` would not do what it seems to do.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "the outcome of a check is neither true nor false: call require_equal(), or compare "
            "exit_code with EXIT_PASS"
        )

    def require_equal(self) -> None:
        """Raise unless the check has passed.

        Raises:
            RamDiffersError: pages differ.
            UntestableError: it is undecided whether pages were lost.
        """
        if self.exit_code == EXIT_UNTESTED:
            raise UntestableError(self.sentence)
        if self.exit_code:
            shown = [
                f"  {difference.region} +{difference.offset:#x}"
                + ("" if difference.gpa is None else f" (GPA {difference.gpa:#x})")
                for difference in self.differences
                if difference.known is None
            ]
            more = ["  …"] if self.differing - self.known > _MOST_NAMED else []
            raise RamDiffersError("\n".join([self.sentence, *shown[:_MOST_NAMED], *more]))

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        more = [
            f"{pages} {what}"
            for pages, what in (
                (self.known, "known to differ"),
                (self.undecided, "either lost or given back by the guest"),
                (self.discarded, "given back by the guest, about which the check proves nothing"),
            )
            if pages
        ]
        if self.differing > self.known:
            also = f"; in addition, {', '.join(more)}" if more else ""
            return f"{self.differing - self.known} of {self.pages} pages differ{also}"
        if more:
            return f"{self.pages} pages compared: all are equal except {', '.join(more)}"
        return f"all pages are equal: {self.pages} pages compared"
