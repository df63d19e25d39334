// SPDX-License-Identifier: GPL-2.0
/*
 * Faults that can be injected by module parameter, at any time, for all devices of the module.
 *
 * Each stands for a mistake of real hardware or of a driver, and loses dirty pages for certain. All
 * of them are off at first; then dmaproof_report() is dmaproof_tracker_tell() and nothing else.
 */
#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "device.h"

static uint drop;
module_param(drop, uint, 0644);
MODULE_PARM_DESC(drop, "of 1000 pages so many are never reported; which ones follows from seed");

static uint seed;
module_param(seed, uint, 0644);
MODULE_PARM_DESC(seed, "for the choice of pages that are dropped");

static int shift;
module_param(shift, int, 0644);
MODULE_PARM_DESC(shift, "reports are so many pages beside the place");

static uint late;
module_param(late, uint, 0644);
MODULE_PARM_DESC(late, "what is dirty is told so many milliseconds too late");

static uint clear_before_read;
module_param(clear_before_read, uint, 0644);
MODULE_PARM_DESC(clear_before_read, "what is dirty is cleared so many microseconds before it is read");

static uint fail_state;
module_param(fail_state, uint, 0644);
MODULE_PARM_DESC(fail_state, "entering this migration state fails, and leaves the device in ERROR");

bool dmaproof_fault_state(enum vfio_device_mig_state state)
{
	return fail_state && state == fail_state;
}

static bool dropped(u64 page)
{
	u64 value = (page ^ (u64)seed << 40) * 0xBF58476D1CE4E5B9ULL;

	return (value ^ value >> 29) * 0x94D049BB133111EBULL % 1000 < drop;
}

static void report_undropped(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty,
			     u64 iova, u64 length)
{
	u64 last = iova + length - 1;

	while (iova <= last) {
		u64 end = min(last, iova | (tracker->page_size - 1));

		if (dropped(iova / tracker->page_size))
			tracker->dropped++;
		else
			dmaproof_tracker_tell(tracker, dirty, iova, end - iova + 1);
		if (end == last)
			return;
		iova = end + 1;
	}
}

static void hold(struct dmaproof_tracker *tracker, u64 iova, u64 length)
{
	struct dmaproof_mark *mark = kzalloc(sizeof(*mark), GFP_KERNEL);

	if (!mark)
		return;
	*mark = (struct dmaproof_mark){
		.iova = iova, .length = length, .count = 1, .due = ktime_get_ns() + late * (u64)NSEC_PER_MSEC,
	};
	list_add_tail(&mark->list, &tracker->held);
}

/* The tracker's lock is held. */
void dmaproof_fault_before_read(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty,
				u64 iova, u64 last)
{
	struct dmaproof_mark *mark, *next;

	if (clear_before_read) {
		dmaproof_tracker_forget(tracker, iova, last);
		mutex_unlock(&tracker->lock);
		fsleep(clear_before_read);
		mutex_lock(&tracker->lock);
	}
	list_for_each_entry_safe(mark, next, &tracker->held, list) {
		if (mark->due > ktime_get_ns() || mark->iova < iova ||
		    mark->iova + mark->length - 1 > last)
			continue;
		dmaproof_tracker_tell(tracker, dirty, mark->iova, mark->length);
		list_del(&mark->list);
		kfree(mark);
	}
}

/* Tell `dirty` of a range: the only place where the tracker speaks. */
void dmaproof_report(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty, u64 iova,
		     u64 length)
{
	tracker->reported++;
	if (late)
		hold(tracker, iova, length);
	else if (drop)
		report_undropped(tracker, dirty, iova, length);
	else
		dmaproof_tracker_tell(tracker, dirty, iova + shift * (s64)tracker->page_size,
				      length);
}
