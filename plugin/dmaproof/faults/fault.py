"""What a fault is: the seams of a session's chain, each of which one fault replaces."""

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
    """The chain as it should be; a fault is a subclass that builds one part of it differently.

    A subclass has a `name`, a `link` and a docstring, whose first line describes it to users.

    Args:
        value: what a user gave behind the name: a number above 0 and up to `most`, which means
            `value_means`; empty is the default. A fault without `value_means` takes none.
        seed: decides what the fault spoils.

    Raises:
        UsageError: the fault takes no value, or not this one.

    Example:
        >>> class Forgetful(Fault):
        ...     '''The log never gets a bit.'''
        ...
        ...     name = "forgetful"
        ...     link = Link.LOG
        ...
        ...     def wrap_log(self, log):
        ...         return BufferDirtyLog(bytearray(1 << 20))
    """

    name: ClassVar[str]
    """What users call it by: the value of option ``--fault``, up to an equals sign."""
    link: ClassVar[Link]
    """The first link at which a page is missing."""
    value_means: ClassVar[str] = ""
    default: ClassVar[float] = 0.0
    most: ClassVar[float] = 1.0
    needs: ClassVar[str] = ""
    """What the fault does not show without, where that is more than one device and one QEMU."""
    tracker: ClassVar[str | None] = None
    """The only tracker that can be broken like this."""
    harvest: ClassVar[str | None] = None
    """The only harvest policy under which it shows for certain."""
    needs_high_ram: ClassVar[bool] = False
    """Whether it shows only with RAM above 4 GiB."""
    needs_iommu: ClassVar[bool] = False
    """Whether it shows only behind a virtual IOMMU."""
    needs_kill: ClassVar[bool] = False
    """Whether it shows only with a device that is killed and started again."""
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
                    f"fault {self.name}={value}: {self.value_means}, above 0 and up to "
                    f"{self.most:g}, is due"
                )

    def make_session(self, *arguments: Any, **options: Any) -> Session:
        """Make the session of one front end.

        Args:
            arguments: those of `Session`, by position.
            options: those of `Session`, by name.

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
        """Return the broken form of a tracker.

        Args:
            tracker: the tracker as it should be.

        Returns:
            The tracker that the session uses.
        """
        return tracker

    def make_dma(self, *arguments: Any, **options: Any) -> Dma:
        """Make what the device writes guest RAM with.

        Args:
            arguments: those of `Dma`, by position.
            options: those of `Dma`, by name.

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
            arguments: those of `IovaBitmap`.

        Returns:
            The iterator that the tracker reports into.
        """
        return TracedBitmap(*arguments)

    def translate(self, mapping: IovaMapping) -> int:
        """Return the guest-physical address at which a mapping begins.

        Args:
            mapping: the mapping.

        Returns:
            The address that the log gets.
        """
        return mapping.gpa

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """Return the broken form of a log.

        Args:
            log: the log as it should be.

        Returns:
            The log that the collector uses.
        """
        return log


def uniform(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """Draw a number in [0, 1) for each of many numbers, the same whenever the seed is.

    Args:
        numbers: what the draws are for, such as page numbers; any shape.
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
