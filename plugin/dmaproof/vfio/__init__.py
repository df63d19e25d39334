"""The kernel's interfaces to devices that are passed through: VFIO and iommufd.

A device that is passed through to a guest writes RAM through an IOMMU. Three parties can know what
the device wrote: the device itself (DMA logging, in VFIO), the IOMMU (dirty bits of a hardware page
table, in iommufd), or type1 (in the legacy container). Each reports into a bitmap of the caller,
the first two through the kernel's iova_bitmap. In this package each is a `DirtyTracker`
(`trackers`), so it takes the place of an emulated tracker in the chain.

::

    abi            requests, their numbers and structures, as in linux/vfio.h and linux/iommufd.h
    requests       makes a request; a refused request raises an error that names the broken rule
    iommufd        IOAS, mappings, hardware page tables and their dirty bits
    type1          the legacy container with its groups
    device         a device: regions, migration, DMA logging
    trackers       the three as `DirtyTracker`
    vhost_session  a vhost-user device whose DMA a VFIO device does

The package needs only the standard library and numpy. It never binds a device to VFIO, so that only
devices that the user has bound are tested.
"""
