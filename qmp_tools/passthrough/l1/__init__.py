"""L1: a virtual machine in which the real kernel's and QEMU's VFIO code run.

Only a machine that has a device can pass it through. L1 is such a machine, without hardware. It has
a kernel with every dirty-tracking interface (`kernel`), the kernel module in ``guests/passthrough``
that implements the fake device, and a root file system with Python, numpy and a recent QEMU
(`root`). All of these are made from the distribution's archive and cached. `machine` boots L1 under
TCG, runs one command in it, and returns the files that the command wrote. A guest that QEMU runs
inside L1 is called L2.
"""
