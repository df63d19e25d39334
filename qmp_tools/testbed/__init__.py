"""A test bed for the chain without QEMU: dmaproof's own front end, guest driver and precopy.

The device is real, with its server, session, tracker, iterator and log. Only the other side of its
socket is simulated. A fault can therefore be tried in moments, and in cases that a proof with one
QEMU does not reach: two devices on one log, hot-plugged memory, a log that is resized, and bus
addresses that are not guest-physical addresses.

::

    simulation.py     the steps: boot, log, send all, write, plug memory, write, stop, compare
    front_end.py      the messages of QEMU
    ring_driver.py    the guest's driver
    guest_iommu.py    the mappings for a device behind an IOMMU
    precopy.py        QEMU's RAM migration
    hosted_device.py  the device, in a thread or in a process
"""
