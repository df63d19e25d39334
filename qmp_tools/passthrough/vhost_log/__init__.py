"""Which pages the kernel's vhost devices write, and which of them are in their dirty logs.

Theory of operation
-------------------
QEMU gives a vhost device of the kernel the guest's memory, the rings, and a log: a bitmap in which
the device sets the bit of each guest page that it writes. Here no QEMU and no guest take part. A
small driver in this process sets up memory, rings and log with the VHOST_… ioctls, lets the device
write, and stops the device. Then every page of the memory is compared with its copy. A page that
changed and has no bit in the log is *lost*: a migration would not send it.

Nothing else writes the memory between the copy and the comparison, and a stopped device has
finished its work. So the comparison is exact, and depends on no timing. Modules::

    abi           the ioctls and structures of linux/vhost.h
    memory        guest memory, its log, the I/O addresses of an IOTLB, the comparison
    ring          the driver's side of a split virtqueue
    device        what all vhost devices have in common
    net           vhost-net on a tap, whose frames this process sends
    net_cases     random rings, buffers and frames
    net_proofs    the proofs with vhost-net
    net_findings  what vhost-net writes without a bit
    vsock         vhost-vsock, with sockets of this process on the other side
    scsi          vhost-scsi on a file

The kernel's log is written by drivers/vhost/vhost.c: vhost_log_write() for buffers, log_used() for
the used ring.
"""
