"""The base class of faults: the parts of a session's chain that a fault can replace."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..collector import Collector
from ..dirty_log import DirtyLog
from ..dirty_tracker import DirtyTracker, EmulatedTracker
from ..dma import Dma
from ..errors import UsageError
from ..guest_memory import IovaMapping
from ..splitmix import GOLDEN, MASK, splitmix64
from ..trace import Link, TracedBitmap
from ..vhost_user.session import Session


class Fault:
    """The intact chain; each fault is a subclass that replaces one part of the chain.

    A subclass has a `name`, a `link` and a docstring, whose first line describes it to users.

    Args:
        value: the text after the name and '=': a number above 0 and up to `most`, whose meaning is
            `value_means`. Empty text selects `default`. A fault without `value_means` takes no
            value.
        seed: decides what the fault affects.

    Raises:
        UsageError: the fault takes no value, or the value is invalid.

    Example:
        >>> class Forgetful(Fault):
        ...     '''The log never receives a dirty bit.'''
        ...
        ...     name = "forgetful"
        ...     link = Link.LOG
        ...
        ...     def wrap_log(self, log):
        ...         return BufferDirtyLog(bytearray(1 << 20))
    """

    name: ClassVar[str]
    """The fault's name for users: the value of option ``--fault``, up to an equals sign."""
    link: ClassVar[Link | None]
    """The first link at which a page is missing; None if the fault loses no page."""
    value_means: ClassVar[str] = ""
    """The meaning of the value, such as 'the share of pages'; empty if the fault takes none."""
    default: ClassVar[float] = 0.0
    most: ClassVar[float] = 1.0
    needs: ClassVar[str] = ""
    """What the fault needs to be detectable, if a proof with one device does not have it."""
    tracker: ClassVar[str | None] = None
    """The only tracker that can have this fault; None if all can."""
    harvest: ClassVar[str | None] = None
    """The only harvest policy under which the fault is always detected; None if all do."""
    needs_high_ram: ClassVar[bool] = False
    """Whether the fault is detectable only with RAM above 4 GiB."""
    needs_iommu: ClassVar[bool] = False
    """Whether the fault is detectable only behind a virtual IOMMU."""
    needs_kill: ClassVar[bool] = False
    """Whether the fault is detectable only with a device that is killed and restarted."""
    needs_reset: ClassVar[bool] = False
    """Whether the fault is detectable only if the guest resets the device while QEMU logs."""
    session_type: ClassVar[type[Session]] = Session
    collector_type: ClassVar[type[Collector]] = Collector

    def __init__(self, value: str, seed: int) -> None:
        self.seed = seed
        self.value = self.default
        if value and not self.value_means:
            raise UsageError(f"fault {self.name}={value}: this fault takes no value")
        if value:
            try:
                self.value = float(value)
            except ValueError:
                self.value = -1.0
            if not 0 < self.value <= self.most:
                raise UsageError(
                    f"fault {self.name}={value}: expected {self.value_means}, above 0 and up to "
                    f"{self.most:g}"
                )

    def make_session(self, *arguments: Any, **options: Any) -> Session:
        """Make the session of one front end.

        Args:
            arguments: positional arguments of `Session`.
            options: keyword arguments of `Session`.

        Returns:
            A session with the fault.
        """
        connection, device, tracker, *others = arguments
        return self.session_type(
            connection,
            device,
            self.wrap_tracker(tracker),
            *others,
            make_dma=self.make_dma,
            make_collector=self.make_collector,
            **options,
        )

    def wrap_tracker(self, tracker: EmulatedTracker) -> EmulatedTracker:
        """Wrap a tracker in the fault.

        Args:
            tracker: the intact tracker.

        Returns:
            The tracker that the session uses.
        """
        return tracker

    def make_dma(self, *arguments: Any, **options: Any) -> Dma:
        """Make the `Dma` through which the device accesses guest RAM.

        Args:
            arguments: positional arguments of `Dma`.
            options: keyword arguments of `Dma`.

        Returns:
            The `Dma` that the device uses.
        """
        return Dma(*arguments, **options)

    def make_collector(self, tracker: DirtyTracker) -> Collector:
        """Make the collector of one session.

        Args:
            tracker: the session's tracker.

        Returns:
            The collector.
        """
        return self.collector_type(
            tracker,
            wrap_log=self.wrap_log,
            make_bitmap=self.make_bitmap,
            translate=self.translate,
        )

    def make_bitmap(self, *arguments: Any) -> TracedBitmap:
        """Make the iterator of one range.

        Args:
            arguments: positional arguments of `IovaBitmap`.

        Returns:
            The iterator that the tracker reports into.
        """
        return TracedBitmap(*arguments)

    def translate(self, mapping: IovaMapping) -> int:
        """Return the address under which a mapping's pages are logged.

        Args:
            mapping: the mapping.

        Returns:
            The guest-physical address at which the mapping begins.
        """
        return mapping.gpa

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """Wrap a log in the fault.

        Args:
            log: the intact log.

        Returns:
            The log that the collector uses.
        """
        return log


def uniform(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """Draw a random number in [0, 1) for each of `numbers`; the same seed gives the same draws.

    Args:
        numbers: the numbers to draw for, such as page numbers; any shape.
        seed: the seed of the fault.

    Returns:
        The draws, in the shape of `numbers`.

    Example:
        >>> import numpy as np
        >>> pages = np.arange(1000, dtype=np.uint64)
        >>> int((uniform(pages, seed=1) < 0.05).sum())
        49
    """
    value = splitmix64(numbers + np.uint64(seed * GOLDEN & MASK))
    return (value >> np.uint64(11)).astype(np.float64) * 2.0**-53
