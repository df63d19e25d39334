/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * What user space says to the device and hears of it. All integers are little-endian.
 *
 * The registers are in BAR 0, and in the file "bar" of the device's folder in debugfs, where a
 * process that does not own the device can reach them. "control" takes an array of struct
 * dmaproof_op and has executed them when write() returns; "dma" takes bytes, and has written them by
 * DMA at the IOVA that is the file's position; "journal" gives an array of struct dmaproof_entry,
 * "told" one of struct dmaproof_told; "stats" is text, a "name value" in each line.
 */
#ifndef DMAPROOF_CONTROL_H
#define DMAPROOF_CONTROL_H

#include <linux/types.h>

#define DMAPROOF_MAGIC 0x464f5250414d44ULL /* "DMAPROF" */
#define DMAPROOF_BAR_BYTES 4096

/* BAR 0. The engine writes pieces into a window, `burst` of them every `period_us`. */
struct dmaproof_registers {
	__le64 magic;	 /* read-only */
	__le64 iova;	 /* the window */
	__le64 length;
	__le64 done;	 /* read-only: pieces written since the engine was started */
	__le64 sequence; /* read-only: number of the last write; rises with every write */
	__le32 piece;	 /* bytes of a piece */
	__le32 skew;	 /* where the first piece starts in the window */
	__le32 stride;	 /* bytes between the starts of two pieces */
	__le32 burst;	 /* pieces in a tick */
	__le32 period_us;
	__le32 limit;	 /* pieces until the engine stops by itself, 0: never */
	__le32 run;	 /* DMAPROOF_RUN...; writing it starts or stops the engine */
	__le32 error;	 /* read-only: the errno that stopped the engine, 0: none */
};

#define DMAPROOF_RUN 1
#define DMAPROOF_RUN_SCATTERED 3 /* slots of the window in a scattered order, each once a round */

struct dmaproof_op {
	__le32 kind;
	__le32 count; /* of marks, `stride` bytes apart; 1 for a write */
	__le64 iova;
	__le64 length;
	__le64 stride; /* signed */
};

/* Write `length` bytes by DMA: journalled, and remembered as dirty. */
#define DMAPROOF_OP_WRITE 1
/*
 * Hand exactly these ranges to iova_bitmap_set() at the next report, in this order, whatever is
 * asked for there: what hardware would do that does not look at the question. Nothing is written.
 */
#define DMAPROOF_OP_MARK 2

/* One DMA write, in the order of `sequence`. */
struct dmaproof_entry {
	__le64 sequence;
	__le64 iova;
	__le64 length;
	__le32 reports; /* reports that had been asked for before the write */
	__le16 state;	/* enum vfio_device_mig_state */
	__le16 logged;	/* 1: logging was on, and the range was inside what is logged */
	__le64 time_ns; /* CLOCK_MONOTONIC */
};

/* What the kernel's iterator was told: a range, in the report of this number (from 1 on). */
struct dmaproof_told {
	__le64 report;
	__le64 iova;
	__le64 length;
};

/*
 * What is written: byte b of the 64-bit little-endian word at the aligned IOVA a, by write s, is
 * byte b of mix(s * 0x9E3779B97F4A7C15 ^ a / 8), where mix is SplitMix64's finalizer. So no two
 * writes leave the same bytes anywhere, and a page tells by itself who wrote it. Only what comes
 * through the file "dma" is written as it was given.
 */

#endif
