"""The device process whose DMA the fake VFIO device does; run in L1 with ``python -m``.

It differs from ``python -m dmaproof.vhost_user`` only in its trackers: each session opens a fake
VFIO device of its own, which writes guest RAM, and asks the kernel what that device wrote.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Final

from dmaproof.faults.fault import Fault
from dmaproof.vfio.device import VfioDevice
from dmaproof.vfio.iommufd import Ioas, Iommufd
from dmaproof.vfio.trackers import DmaLogging, KernelTracker, Type1Tracker
from dmaproof.vfio.type1 import Container
from dmaproof.vfio.vhost_session import IoAddressSpace, StandIn, StandInSession
from dmaproof.vhost_user.__main__ import main
from dmaproof.vhost_user.session import Session

from .fake_device import FakeDevice, fake_device


def _stand_in(tracker: str) -> StandIn:
    with contextlib.ExitStack() as stack:
        fake = stack.enter_context(fake_device())
        space, kernel = _OPENERS[tracker](fake, stack)
        dma = fake.open_dma()
        stack.callback(os.close, dma)
        return StandIn(space, kernel, partial(_write_all, dma), stack.pop_all().close)


def _by_iommufd(
    fake: FakeDevice, stack: contextlib.ExitStack
) -> tuple[IoAddressSpace, KernelTracker]:
    iommufd = stack.enter_context(Iommufd())
    device = stack.enter_context(VfioDevice.open_cdev(fake.sysfs, iommufd))
    space = Ioas(iommufd)
    device.attach(space.number)
    return space, DmaLogging(device)


def _by_container(fake: FakeDevice, stack: contextlib.ExitStack) -> tuple[Container, KernelTracker]:
    container = stack.enter_context(Container())
    return container, DmaLogging(stack.enter_context(container.open_device(fake.sysfs)))


def _by_type1(
    fake: FakeDevice, stack: contextlib.ExitStack
) -> tuple[IoAddressSpace, KernelTracker]:
    container, _ = _by_container(fake, stack)
    return container, Type1Tracker(container)


BY_IOMMUFD: Final = "iommufd, device log"
_OPENERS: Final = {
    BY_IOMMUFD: _by_iommufd,
    "container, device log": _by_container,
    "container, type1's log": _by_type1,
}
TRACKERS: Final = tuple(_OPENERS)
"""How the device is opened, and which log tracks its writes."""


def _write_all(dma: int, iova: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(dma, data[done:], iova + done)


def _session_of(fault: Fault) -> Callable[..., Session]:
    """Return the class of sessions, with the faults of the links after the tracker."""
    return partial(StandInSession, make_collector=fault.make_collector)


if __name__ == "__main__":
    os.nice(-10)  # L2's vCPU polls for this process's answers, and both may share one processor
    trackers = {name: partial(_stand_in, name) for name in TRACKERS}
    sys.exit(main(trackers, TRACKERS[0], _session_of))
