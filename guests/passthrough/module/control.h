/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * The interface between user space and the device. All integers are little-endian.
 *
 * The registers are in BAR 0. They are also in the file "bar" of the device's folder in debugfs,
 * for processes that have not opened the device. The other files of that folder:
 *
 * control: write an array of struct dmaproof_op; write() returns when all of them are executed
 * dma: write bytes; the device writes them by DMA at the IOVA that is the file's position
 * journal: read an array of struct dmaproof_entry
 * reported_ranges: read an array of struct dmaproof_reported_range
 * states: read an array of struct dmaproof_entered_state
 * stats: read text, with a "name value" on each line
 */
#ifndef DMAPROOF_CONTROL_H
#define DMAPROOF_CONTROL_H

#include <linux/types.h>

#define DMAPROOF_MAGIC 0x464f5250414d44ULL /* "DMAPROF" */
#define DMAPROOF_BAR_BYTES 4096

/* BAR 0. The engine writes pieces into a window, `burst` of them every `period_us`. */
struct dmaproof_registers {
	__le64 magic;	 /* read-only */
	__le64 iova;	 /* start of the window */
	__le64 length;	 /* bytes of the window */
	__le64 done;	 /* read-only: pieces written since the engine was started */
	__le64 sequence; /* read-only: number of the last write */
	__le32 piece;	 /* bytes of a piece */
	__le32 skew;	 /* offset of the first piece in the window */
	__le32 stride;	 /* bytes between the starts of two pieces */
	__le32 burst;	 /* pieces in a tick */
	__le32 period_us;
	__le32 limit;	 /* the engine stops after this many pieces; 0: never */
	__le32 run;	 /* 0, or DMAPROOF_RUN...; a write starts or stops the engine */
	__le32 error;	 /* read-only: the errno that stopped the engine, 0: none */
};

#define DMAPROOF_RUN 1
#define DMAPROOF_RUN_SCATTERED 3 /* pieces in a scattered order, each once in a round */

struct dmaproof_op {
	__le32 kind;
	__le32 count; /* number of marks, `stride` bytes apart; 1 for a write */
	__le64 iova;
	__le64 length;
	__le64 stride; /* signed */
};

/* Write `length` bytes by DMA; the write is journalled and tracked as dirty. */
#define DMAPROOF_OP_WRITE 1
/*
 * Pass exactly these ranges to iova_bitmap_set() in the next report, in this order and independent
 * of the requested range, like hardware that ignores the requested range. Nothing is written.
 */
#define DMAPROOF_OP_MARK 2

/* One DMA write, in the order of `sequence`. */
struct dmaproof_entry {
	__le64 sequence;
	__le64 iova;
	__le64 length;
	__le32 reports; /* number of reports before the write */
	__le16 state;	/* enum vfio_device_mig_state */
	__le16 logged;	/* 1: logging was on, and included the whole range */
	__le64 time_ns; /* CLOCK_MONOTONIC */
};

/* A range that was passed to the kernel's iterator, in the report of this number (from 1 on). */
struct dmaproof_reported_range {
	__le64 report;
	__le64 iova;
	__le64 length;
};

/* A migration state that the device has entered since it was opened. */
struct dmaproof_entered_state {
	__le64 order;	/* a number that rises with each entry of any device */
	__le64 time_ns; /* CLOCK_MONOTONIC */
	__le32 state;	/* enum vfio_device_mig_state */
	__le32 writes;	/* number of entries in the journal */
};

/*
 * The content of a write: byte b of the 64-bit little-endian word at the aligned IOVA a, in write
 * s, is byte b of mix(s * 0x9E3779B97F4A7C15 ^ a / 8), where mix is SplitMix64's finalizer. So no
 * two writes leave the same bytes, and the content of a page identifies the write that left it.
 * Bytes from the file "dma" are written unchanged.
 */

#endif
