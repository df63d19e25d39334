// SPDX-License-Identifier: GPL-2.0
/*
 * The device's record of its writes, and VFIO's DMA logging on top of it.
 *
 * There is one bit for each page inside the ranges for which logging was started, of the page size
 * with which it was started. The bits are in chunks of 32768 pages, which are allocated on the
 * first write. A report passes on the dirty bits of the requested range in runs, and clears them.
 * It does not clear the bit of a page that is only partly inside the range, which would lose the
 * other part.
 *
 * Marks are ranges that are reported unchanged, independent of the requested range (control.h).
 */
#include <linux/bitmap.h>
#include <linux/interval_tree.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "device.h"

#define CHUNK_PAGES 32768UL
#define REPORTED_RANGES (1 << 20)

struct chunk {
	DECLARE_BITMAP(dirty, CHUNK_PAGES);
};

int dmaproof_tracker_init(struct dmaproof_tracker *tracker)
{
	mutex_init(&tracker->lock);
	xa_init(&tracker->pages);
	INIT_LIST_HEAD(&tracker->marks);
	INIT_LIST_HEAD(&tracker->held);
	tracker->reported_ranges = vcalloc(REPORTED_RANGES, sizeof(*tracker->reported_ranges));
	return tracker->reported_ranges ? 0 : -ENOMEM;
}

void dmaproof_tracker_release(struct dmaproof_tracker *tracker)
{
	vfree(tracker->reported_ranges);
}

/*
 * Pass a range to the kernel's iterator, and record it unless it is a mark: nothing was written
 * there, and benchmarks have more marks than the record has entries. The lock is held.
 */
void dmaproof_tracker_pass_on(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty, u64 iova,
			      u64 length)
{
	iova_bitmap_set(dirty, iova, length);
	if (tracker->reading_marks)
		return;
	/* A range that is missing in this record would be counted as lost by the device. */
	if (WARN_ON(tracker->reported_ranges_used == REPORTED_RANGES))
		return;
	tracker->reported_ranges[tracker->reported_ranges_used++] = (struct dmaproof_reported_range){
		.report = cpu_to_le64(tracker->reports),
		.iova = cpu_to_le64(iova),
		.length = cpu_to_le64(length),
	};
}

static void free_marks(struct list_head *marks)
{
	struct dmaproof_mark *mark, *next;

	list_for_each_entry_safe(mark, next, marks, list)
		kfree(mark);
	INIT_LIST_HEAD(marks);
}

static void clear_everything(struct dmaproof_tracker *tracker)
{
	struct chunk *chunk;
	unsigned long index;

	xa_for_each(&tracker->pages, index, chunk)
		kvfree(chunk);
	xa_destroy(&tracker->pages);
	free_marks(&tracker->marks);
	free_marks(&tracker->held);
	kfree(tracker->ranges);
	tracker->ranges = NULL;
	tracker->range_count = 0;
}

void dmaproof_tracker_stop(struct dmaproof_tracker *tracker)
{
	mutex_lock(&tracker->lock);
	tracker->stops += tracker->on;
	tracker->on = false;
	clear_everything(tracker);
	mutex_unlock(&tracker->lock);
}

static struct chunk *chunk_of(struct dmaproof_tracker *tracker, u64 page)
{
	unsigned long index = page / CHUNK_PAGES;
	struct chunk *chunk = xa_load(&tracker->pages, index);

	if (chunk)
		return chunk;
	chunk = kvzalloc(sizeof(*chunk), GFP_KERNEL);
	if (!chunk || xa_err(xa_store(&tracker->pages, index, chunk, GFP_KERNEL))) {
		kvfree(chunk);
		return NULL;
	}
	return chunk;
}

static void set_dirty(struct dmaproof_tracker *tracker, u64 first, u64 last)
{
	while (first <= last) {
		u64 end = min(last, first | (CHUNK_PAGES - 1));
		struct chunk *chunk = chunk_of(tracker, first);

		/* A loss that was not injected would make every proof wrong. */
		if (WARN_ON(!chunk))
			return;
		bitmap_set(chunk->dirty, first % CHUNK_PAGES, end - first + 1);
		if (end == last)
			return;
		first = end + 1;
	}
}

/* Record a write; true if all of it is inside the logged ranges. */
bool dmaproof_tracker_add(struct dmaproof_tracker *tracker, u64 iova, u64 length)
{
	u64 logged = 0;

	mutex_lock(&tracker->lock);
	for (u32 i = 0; tracker->on && i < tracker->range_count; i++) {
		u64 first = max(iova, tracker->ranges[i].first);
		u64 last = min(iova + length - 1, tracker->ranges[i].last);

		if (first > last)
			continue;
		set_dirty(tracker, first / tracker->page_size, last / tracker->page_size);
		logged += last - first + 1;
	}
	mutex_unlock(&tracker->lock);
	return logged == length;
}

int dmaproof_tracker_mark(struct dmaproof_tracker *tracker, u64 iova, u64 length, u32 count,
			  s64 stride)
{
	struct dmaproof_mark *mark = kzalloc(sizeof(*mark), GFP_KERNEL);

	if (!mark)
		return -ENOMEM;
	mark->iova = iova;
	mark->length = length;
	mark->count = count;
	mark->stride = stride;
	mutex_lock(&tracker->lock);
	if (!tracker->on) {
		mutex_unlock(&tracker->lock);
		kfree(mark);
		return -EINVAL;
	}
	list_add_tail(&mark->list, &tracker->marks);
	mutex_unlock(&tracker->lock);
	return 0;
}

/* Clear the dirty bits of the pages entirely inside [iova, last]; the tracker's lock is held. */
void dmaproof_tracker_clear(struct dmaproof_tracker *tracker, u64 iova, u64 last)
{
	u64 size = tracker->page_size;
	u64 first = iova / size + !!(iova % size);
	u64 end = last / size + (last % size == size - 1);

	unsigned long index;
	struct chunk *chunk;

	if (first >= end)
		return;
	xa_for_each_range(&tracker->pages, index, chunk, first / CHUNK_PAGES,
			  (end - 1) / CHUNK_PAGES) {
		u64 base = index * CHUNK_PAGES;
		u64 from = max(first, base);
		u64 to = min(end, base + CHUNK_PAGES);

		bitmap_clear(chunk->dirty, from - base, to - from);
	}
}

/* Report the part of pages `first` to `end` - 1 that is inside the requested range. */
static void report_run(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty, u64 first,
		       u64 end, u64 iova, u64 last)
{
	u64 low = max(first * tracker->page_size, iova);
	u64 high = min(end * tracker->page_size - 1, last);

	dmaproof_report(tracker, dirty, low, high - low + 1);
}

static void report_chunk(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty,
			 const unsigned long *bits, u64 base, u64 iova, u64 last)
{
	unsigned long from = max(iova / tracker->page_size, base) - base;
	unsigned long to = min(last / tracker->page_size + 1, base + CHUNK_PAGES) - base;
	unsigned long start, end;

	for (start = find_next_bit(bits, to, from); start < to;
	     start = find_next_bit(bits, to, end)) {
		end = find_next_zero_bit(bits, to, start);
		report_run(tracker, dirty, base + start, base + end, iova, last);
	}
}

static void read_pages(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty, u64 iova,
		       u64 last)
{
	unsigned long index;
	struct chunk *chunk;

	xa_for_each_range(&tracker->pages, index, chunk, iova / tracker->page_size / CHUNK_PAGES,
			  last / tracker->page_size / CHUNK_PAGES)
		report_chunk(tracker, dirty, chunk->dirty, index * CHUNK_PAGES, iova, last);
	dmaproof_tracker_clear(tracker, iova, last);
}

static void read_marks(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty)
{
	struct dmaproof_mark *mark, *next;

	tracker->reading_marks = true;
	list_for_each_entry_safe(mark, next, &tracker->marks, list) {
		for (u32 i = 0; i < mark->count; i++)
			dmaproof_report(tracker, dirty, mark->iova + i * mark->stride, mark->length);
		kfree(mark);
	}
	INIT_LIST_HEAD(&tracker->marks);
	tracker->reading_marks = false;
}

static int log_start(struct vfio_device *vdev, struct rb_root_cached *root, u32 count,
		     u64 *page_size)
{
	struct dmaproof_tracker *tracker = &to_dmaproof(vdev)->tracker;
	struct interval_tree_node *node;
	u32 i = 0;

	if (!is_power_of_2(*page_size))
		return -EINVAL;
	struct dmaproof_range *ranges __free(kfree) = kcalloc(count, sizeof(*ranges), GFP_KERNEL);

	if (!ranges)
		return -ENOMEM;
	for (node = interval_tree_iter_first(root, 0, ULONG_MAX); node && i < count;
	     node = interval_tree_iter_next(node, 0, ULONG_MAX))
		ranges[i++] = (struct dmaproof_range){ node->start, node->last };

	mutex_lock(&tracker->lock);
	if (tracker->on) {
		mutex_unlock(&tracker->lock);
		return -EBUSY;
	}
	/* As hardware does, which has a smallest and a largest page size. */
	*page_size = clamp(*page_size, (u64)SZ_4K, (u64)SZ_1G);
	tracker->page_size = *page_size;
	tracker->ranges = no_free_ptr(ranges);
	tracker->range_count = i;
	tracker->on = true;
	tracker->starts++;
	mutex_unlock(&tracker->lock);
	return 0;
}

static int log_stop(struct vfio_device *vdev)
{
	dmaproof_tracker_stop(&to_dmaproof(vdev)->tracker);
	return 0;
}

static int log_read_and_clear(struct vfio_device *vdev, unsigned long iova, unsigned long length,
			      struct iova_bitmap *dirty)
{
	struct dmaproof_tracker *tracker = &to_dmaproof(vdev)->tracker;
	unsigned long last = iova + length - 1;

	if (!length)
		return -EINVAL;
	mutex_lock(&tracker->lock);
	if (!tracker->on) {
		mutex_unlock(&tracker->lock);
		return -EINVAL;
	}
	tracker->reports++;
	dmaproof_fault_before_read(tracker, dirty, iova, last);
	read_pages(tracker, dirty, iova, last);
	read_marks(tracker, dirty);
	mutex_unlock(&tracker->lock);
	return 0;
}

const struct vfio_log_ops dmaproof_log_ops = {
	.log_start = log_start,
	.log_stop = log_stop,
	.log_read_and_clear = log_read_and_clear,
};
