// SPDX-License-Identifier: GPL-2.0
/*
 * Faults, which module parameters inject at any time, for all devices of the module or for one.
 *
 * Each fault imitates a mistake of real hardware or of a driver, and almost all of them lose dirty
 * pages. All faults are off by default; then dmaproof_report() only calls
 * dmaproof_tracker_pass_on(). precopy_bytes and precopy_errno concern estimates, and lose no page.
 * without_p2p is not a fault, but a feature that devices may lack.
 */
#include <linux/delay.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "device.h"

static char victim[64] = "all";
module_param_string(victim, victim, sizeof(victim), 0644);
MODULE_PARM_DESC(victim, "the UUID of the only device that has the faults, or all");

static uint drop;
module_param(drop, uint, 0644);
MODULE_PARM_DESC(drop, "number of pages in 1000 that are never reported; seed selects them");

static uint seed;
module_param(seed, uint, 0644);
MODULE_PARM_DESC(seed, "selects the pages that drop affects");

static int shift;
module_param(shift, int, 0644);
MODULE_PARM_DESC(shift, "offset in pages that is added to each reported range");

static uint late;
module_param(late, uint, 0644);
MODULE_PARM_DESC(late, "delay in milliseconds before a dirty range is reported");

static uint clear_before_read;
module_param(clear_before_read, uint, 0644);
MODULE_PARM_DESC(clear_before_read, "clear dirty bits this many microseconds before the read");

static uint fail_state;
module_param(fail_state, uint, 0644);
MODULE_PARM_DESC(fail_state, "entering this migration state fails and leaves the device in ERROR");

static uint write_after_stop;
module_param(write_after_stop, uint, 0644);
MODULE_PARM_DESC(write_after_stop, "when the stopped device's state has been read, the device "
				   "writes its last ranges, this many, once more");

static uint without_p2p;
module_param(without_p2p, uint, 0644);
MODULE_PARM_DESC(without_p2p, "1: devices that are opened do not support the P2P states");

static unsigned long long precopy_bytes;
module_param(precopy_bytes, ullong, 0644);
MODULE_PARM_DESC(precopy_bytes, "the initial and the dirty bytes of PRE_COPY's information");

static uint precopy_errno;
module_param(precopy_errno, uint, 0644);
MODULE_PARM_DESC(precopy_errno, "the request for PRE_COPY's information fails with this errno");

static bool selected(struct dmaproof_device *device)
{
	return !strcmp(victim, "all") || !strcmp(victim, dev_name(device->vdev.dev));
}

bool dmaproof_fault_state(struct dmaproof_device *device, enum vfio_device_mig_state state)
{
	return fail_state && state == fail_state && selected(device);
}

u32 dmaproof_writes_after_stop(struct dmaproof_device *device)
{
	return write_after_stop && selected(device) ? write_after_stop : 0;
}

bool dmaproof_has_p2p(struct dmaproof_device *device)
{
	return !without_p2p || !selected(device);
}

/* Change PRE_COPY's estimates; returns the error of the request. */
int dmaproof_fault_precopy(struct dmaproof_device *device, u64 *initial_bytes, u64 *dirty_bytes)
{
	if (!selected(device))
		return 0;
	if (precopy_bytes)
		*initial_bytes = *dirty_bytes = precopy_bytes;
	return -(int)precopy_errno;
}

static struct dmaproof_device *device_of(struct dmaproof_tracker *tracker)
{
	return container_of(tracker, struct dmaproof_device, tracker);
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
			dmaproof_tracker_pass_on(tracker, dirty, iova, end - iova + 1);
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
		.iova = iova,
		.length = length,
		.count = 1,
		.report_at_ns = ktime_get_ns() + late * (u64)NSEC_PER_MSEC,
	};
	list_add_tail(&mark->list, &tracker->held);
}

/* Apply the faults that come before a read; the tracker's lock is held. */
void dmaproof_fault_before_read(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty,
				u64 iova, u64 last)
{
	struct dmaproof_mark *mark, *next;

	if (clear_before_read && selected(device_of(tracker))) {
		dmaproof_tracker_clear(tracker, iova, last);
		mutex_unlock(&tracker->lock);
		fsleep(clear_before_read);
		mutex_lock(&tracker->lock);
	}
	list_for_each_entry_safe(mark, next, &tracker->held, list) {
		if (mark->report_at_ns > ktime_get_ns() || mark->iova < iova ||
		    mark->iova + mark->length - 1 > last)
			continue;
		dmaproof_tracker_pass_on(tracker, dirty, mark->iova, mark->length);
		list_del(&mark->list);
		kfree(mark);
	}
}

/* Report a range to `dirty`, with the injected faults; every report of the tracker goes through. */
void dmaproof_report(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty, u64 iova,
		     u64 length)
{
	bool faulty = (late || drop || shift) && selected(device_of(tracker));

	tracker->reported++;
	if (!faulty)
		dmaproof_tracker_pass_on(tracker, dirty, iova, length);
	else if (late)
		hold(tracker, iova, length);
	else if (drop)
		report_undropped(tracker, dirty, iova, length);
	else
		dmaproof_tracker_pass_on(tracker, dirty, iova + shift * (s64)tracker->page_size,
					 length);
}
