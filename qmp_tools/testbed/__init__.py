"""A test bed for the chain without QEMU: a front end, a guest's driver and a precopy of our own.

The device is the real one, server, session, tracker, iterator and log; only what stands on the
other side of its socket is played. So a fault can be tried in moments, and in places to which the
proof on one QEMU does not come: two devices on one log, memory that is plugged in, a log that is
resized, bus addresses that are not guest-physical ones.

::

    simulation.py     the story: boot, log, send all, write, plug memory, write, stop, compare
    front_end.py      what QEMU says
    ring_driver.py    what the guest's driver does
    guest_iommu.py    what it maps for the device, if that is behind an IOMMU
    precopy.py        what QEMU's RAM migration does
    hosted_device.py  the device, in a thread or in a process
"""
