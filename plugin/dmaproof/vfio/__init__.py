"""The kernel's interfaces to devices that are passed through: VFIO and iommufd.

A device that a guest owns writes RAM through an IOMMU. What it wrote is known to the device itself
(DMA logging, in VFIO), to the IOMMU (dirty bits of a hardware page table, in iommufd), or, with the
legacy container, to type1. Each reports through the kernel's own iova_bitmap, or its like, into a
bitmap of the caller's. Here each is a `DirtyTracker` (`trackers`), and so stands where the emulated
ones do in the chain.

::

    abi            requests, their numbers and structures, as in linux/vfio.h and linux/iommufd.h
    requests       makes a request; a refusal is told with the rule that was broken
    iommufd        IOAS, mappings, hardware page tables and their dirty bits
    type1          the legacy container with its groups
    device         a device: regions, migration, DMA logging
    trackers       the three as `DirtyTracker`
    vhost_session  a vhost-user device whose DMA a VFIO device does

Nothing here needs more than the standard library and numpy. A device is never bound to VFIO here:
who has not done that already does not mean it to be tested.
"""
