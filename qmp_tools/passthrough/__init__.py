"""The passthrough route, proved without hardware: the real kernel, and QEMU's own vfio-pci.

All proofs run in the nested machine L1 (`l1`), in which the fake device's kernel module is loaded.
`prove` starts L1 from the host, `inside` runs in L1, `catalog` lists the proofs, `cells` makes them
cells of a matrix, and `kernel_cost` counts the instructions that the kernel's interfaces cost.
Modules::

    fake_device       the fake VFIO device, created and controlled through its debugfs files
    fake_driver       a user-space VFIO driver of it, on iommufd or on the legacy container
    mock_iommu        iommufd's test device: a page table in which user space sets dirty bits
    clock             corrects timeouts in L1, whose clock may run too fast on a busy host
    rules             what the kernel accepts, refuses, and does where no behaviour is specified:
                      vfio_rules, iommufd_rules
    states            VFIO's migration states, and the device's state as a stream
    differential      the kernel's iterator and trackers compared with dmaproof's, bit for bit
    hwpt              the same comparison for a page table's dirty bits
    injected_faults   each fault of the module, which must be caught every time
    migrations        L2 migrated with vfio-pci by each way of tracking, with controls
    two_devices       L2 with two devices, their tracking and their states
    unplug            L2 migrated after a device was unplugged
    viommu            L2 with a vIOMMU in front of the device
    l2                L2 as it is started; l2_migration, l2_result: its migration and the result;
                      blocked: why QEMU does not start or migrate it
    vhost             dmaproof's vhost-user disk on the kernel's trackers, with controls;
                      vhost_device is its device process
    functions         the steps of `prove --device vfio:…`, tried on the fake device
    nested            an ordinary proof, carried out in L1: `prove --device vfio-fake`;
                      nested_proof is its program in L1
    common_setup      the set-up that vhost, functions and nested_proof share
"""
