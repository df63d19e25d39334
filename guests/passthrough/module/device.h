/* SPDX-License-Identifier: GPL-2.0 */
/* Declarations shared by the parts of the device. See device.c for the theory of operation. */
#ifndef DMAPROOF_DEVICE_H
#define DMAPROOF_DEVICE_H

#include <linux/mutex.h>
#include <linux/vfio.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "compat.h"
#include "control.h"

#define DMAPROOF_CONFIG_BYTES 256

struct dmaproof_stream;

struct dmaproof_mark {
	struct list_head list;
	u64 iova, length;
	s64 stride;
	u32 count; /* 1 on the list `held` */
	u64 report_at_ns; /* on the list `held`: when it may be reported, by ktime_get_ns() */
};

/* What hardware would record about its writes; see tracker.c. */
struct dmaproof_tracker {
	struct mutex lock;
	bool on;
	u64 page_size;
	struct dmaproof_range {
		u64 first, last;
	} *ranges;
	u32 range_count;
	struct xarray pages;
	struct list_head marks;
	struct list_head held; /* held back by the fault "late" */
	struct dmaproof_reported_range *reported_ranges;
	u32 reported_ranges_used;
	bool reading_marks;
	u64 starts, stops, reports, reported, dropped;
};

struct dmaproof_device {
	struct vfio_device vdev;
	u8 config[DMAPROOF_CONFIG_BYTES];

	/*
	 * Held while the device writes, and while its state changes, so after a change to STOP no
	 * write is in progress. Taken before the locks of the tracker and of a stream.
	 */
	struct mutex lock;
	enum vfio_device_mig_state state;
	struct dmaproof_entered_state *states;
	u32 states_used;
	bool opened;
	struct dmaproof_registers registers;
	struct workqueue_struct *workers;
	struct delayed_work tick;
	struct work_struct write_again; /* the fault "write_after_stop" */
	struct dmaproof_entry *journal;
	u32 journal_used;
	void *piece; /* a page: the bytes of the next write */
	struct dmaproof_stream *stream;

	struct dmaproof_tracker tracker;
	struct dentry *folder;
};

static inline struct dmaproof_device *to_dmaproof(struct vfio_device *vdev)
{
	return container_of(vdev, struct dmaproof_device, vdev);
}

/* engine.c */
int dmaproof_engine_init(struct dmaproof_device *device);
void dmaproof_engine_release(struct dmaproof_device *device);
void dmaproof_engine_reset(struct dmaproof_device *device);
void dmaproof_engine_kick(struct dmaproof_device *device);
int dmaproof_execute(struct dmaproof_device *device, const struct dmaproof_op *ops, size_t count,
		     void *given);
void dmaproof_bar_write(struct dmaproof_device *device, u32 offset, const void *data, size_t count);

/* tracker.c */
extern const struct vfio_log_ops dmaproof_log_ops;
int dmaproof_tracker_init(struct dmaproof_tracker *tracker);
void dmaproof_tracker_release(struct dmaproof_tracker *tracker);
void dmaproof_tracker_stop(struct dmaproof_tracker *tracker);
bool dmaproof_tracker_add(struct dmaproof_tracker *tracker, u64 iova, u64 length);
int dmaproof_tracker_mark(struct dmaproof_tracker *tracker, u64 iova, u64 length, u32 count,
			  s64 stride);
void dmaproof_tracker_pass_on(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty, u64 iova,
			   u64 length);
void dmaproof_tracker_clear(struct dmaproof_tracker *tracker, u64 iova, u64 last);

/* faults.c */
bool dmaproof_fault_state(struct dmaproof_device *device, enum vfio_device_mig_state state);
u32 dmaproof_writes_after_stop(struct dmaproof_device *device);
bool dmaproof_has_p2p(struct dmaproof_device *device);
int dmaproof_fault_precopy(struct dmaproof_device *device, u64 *initial_bytes, u64 *dirty_bytes);
void dmaproof_fault_before_read(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty,
				u64 iova, u64 last);
void dmaproof_report(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty, u64 iova,
		     u64 length);

/* migration.c */
extern const struct vfio_migration_ops dmaproof_migration_ops;
int dmaproof_migration_init(struct dmaproof_device *device);
void dmaproof_migration_release(struct dmaproof_device *device);
void dmaproof_migration_open(struct dmaproof_device *device);
void dmaproof_migration_reset(struct dmaproof_device *device);

/* control.c */
void dmaproof_control_init(void);
void dmaproof_control_exit(void);
void dmaproof_control_add(struct dmaproof_device *device, const char *name);
void dmaproof_control_remove(struct dmaproof_device *device);

#endif
