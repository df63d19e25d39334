"""L1: a virtual machine of our own in which the real kernel's and QEMU's VFIO code run.

A device can only be passed through by a machine that has it. L1 is such a machine, without
hardware: a kernel with every dirty-tracking interface (`kernel`), the module of
``guests/passthrough`` that is the device, and a root file system with Python, numpy and a recent
QEMU (`root`), all made from the distribution's archive and kept in the user's cache. `machine`
boots it under TCG, runs one command in it and brings the files out. A guest that QEMU runs inside
it is called L2.
"""
