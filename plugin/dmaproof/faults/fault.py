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

    The first line of its docstring is what people are told of it. `value` is a number above 0 and
    up to `most`, and means `value_means`; a fault without that takes none.
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
        """The session of one front end, from `Session`'s arguments."""
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
        """The broken form of `tracker`."""
        return tracker

    def make_dma(self, *arguments: Any, **options: Any) -> Dma:
        """The door to guest RAM, from `Dma`'s arguments."""
        return Dma(*arguments, **options)

    def make_collector(self, tracker: DirtyTracker) -> Collector:
        """The collector of one session."""
        return self.collector_type(
            tracker,
            wrap_log=self.wrap_log,
            make_bitmap=self.make_bitmap,
            translate=self.translate,
        )

    def make_bitmap(self, *arguments: Any) -> TracedBitmap:
        """The iterator of one range, from `IovaBitmap`'s arguments."""
        return TracedBitmap(*arguments)

    def translate(self, mapping: IovaMapping) -> int:
        """The GPA at which a mapping begins."""
        return mapping.gpa

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """The broken form of `log`."""
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
