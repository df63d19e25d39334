"""The passthrough route, proved without hardware: the real kernel, and QEMU's own vfio-pci.

All of it runs in the nested machine L1 (`l1`), where the fake device's module is loaded; `inside`
is what runs there, `prove` starts it from outside, `kernel_cost` counts what it costs. Modules::

    fake_device       the device, driven and watched through its control files
    owner             a process that owns it, by iommufd or by the legacy container
    mock_iommu        iommufd's test device: a page table whose dirty bits we set
    clock             L1's clock beside the host's: on a busy machine it may be too fast
    rules             what the kernel promises, refuses, and does where nothing is promised:
                      vfio_rules, iommufd_rules
    states            VFIO's migration states and the device's state as a stream
    differential      the kernel's iterator and trackers against ours, bit for bit
    hwpt              the same for a page table's dirty bits
    injected_faults   each fault of the module, caught every time
    migrations        L2 to L2 with vfio-pci, each way with controls that must corrupt
    vhost             our vhost-user disk over the kernel's trackers, each with a control;
                      vhost_device is its process
    functions         the fake device as if it were hardware: `prove --device vfio:…`, in L1
    device_proof       a whole proof on it, whose journal is known: `prove --device vfio-fake`
"""

from typing import Final

GROUPS: Final = ("rules", "states", "differential", "faults", "migration", "vhost", "functions")
"""Of proofs, in the order in which they are carried out."""
