"""What the kernel's dirty bitmaps cost: VFIO's REPORT, iommufd's GET_DIRTY_BITMAP, type1's log.

Theory of operation
-------------------
A machine under TCG has no clock to trust, so nothing is timed: L1 runs with QEMU's instruction
counter as its clock (``-icount shift=0``: a nanosecond is one instruction), on one CPU. What is
measured in it is exact, and the same on a busy machine and on another one.

REPORT goes through the fake device's ranges ("marks"), which need no RAM behind them: so bitmaps of
guests up to 16 TiB are filled by the real iova_bitmap. Pages written one by one are measured as far
as it is quick, and reckoned beyond: a model of what the kernel does (windows pinned, bitmap pages
pinned, bits set) is fitted to every row, and how far it is off is told with it.

To make times of instructions, the same small programs (`yardsticks`) run in L1, where they are
counted, and here, where they are timed. Nanoseconds an instruction differ by what is done; their
lowest and highest bound the projection. Modules::

    yardsticks    system calls, page faults, page-table walks, bit loops: counted and timed
    measure       what runs in L1: every row of the measurement
    model         the fit, and the projection to other guests
    tables        the measurement as text and as a picture
"""
