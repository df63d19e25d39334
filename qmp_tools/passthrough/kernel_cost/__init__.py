"""What the kernel's dirty bitmaps cost: VFIO's REPORT, iommufd's GET_DIRTY_BITMAP, type1's log.

Theory of operation
-------------------
The clock of a machine under TCG is not reliable, so the measurement counts instructions instead of
time. L1 runs on one CPU, with QEMU's instruction counter as its clock (``-icount shift=0``: one
instruction takes one nanosecond). The counts do not depend on the host or its load.

REPORT is measured with the fake device's "marks": ranges that need no mapped RAM. So the real
iova_bitmap fills bitmaps of guests up to 16 TiB. Single pages are measured up to a number that does
not take long, and calculated beyond: a model of the kernel's operations (windows pinned, bitmap
pages pinned, bits set) is fitted to all rows, and its largest error is reported.

To convert instructions to time, the same small programs (`yardsticks`) run in L1, where they are
counted, and on the host, where they are timed. The nanoseconds of an instruction depend on its
kind; the lowest and the highest bound the projection. Modules::

    bench         carries out the measurement, and makes the fit and the projection
    yardsticks    system calls, page faults, page-table walks, bit loops: counted and timed
    measure       the program in L1: every row of the measurement
    model         the fit, and the projection to other guests
    tables        the measurement as text and as a picture
"""
