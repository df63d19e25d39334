"""A virtio device in user space that the kernel offers as a vDPA device (VDUSE).

QEMU's vhost-vdpa opens the vDPA device, as it opens one of a network card. No dirty log reaches the
device: when a migration starts, QEMU puts shadow virtqueues between the guest and the device. The
device then returns each request to QEMU, with the number of bytes that it has written, and QEMU
marks the pages of these bytes dirty. So this number is all that the device reports.

::

    abi       requests and messages, as in linux/vduse.h
    chardev   the kernel's side: creates the device, answers messages, maps guest RAM
    session   serves the virtqueues, with a journal, and traces what the device reports
    __main__  the device's process, with the control socket of `dmaproof.vhost_user`
"""
