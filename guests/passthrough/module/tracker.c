// SPDX-License-Identifier: GPL-2.0
/*
 * What the device remembers of its writes, and VFIO's DMA logging on top of it.
 *
 * One bit for each page of the size that logging was started with, inside the ranges that it was
 * started with, in chunks of 32768 pages that are made when something is written there. A report
 * takes the bits of the range that is asked for, in runs, and forgets them, except of pages that
 * are only partly asked for: to forget those would lose the other part.
 *
 * Marks are ranges that are reported as they are, whatever is asked for (control.h).
 */
#include <linux/bitmap.h>
#include <linux/interval_tree.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "device.h"

#define CHUNK_PAGES 32768UL
#define TOLD_ENTRIES (1 << 20)

struct chunk {
	DECLARE_BITMAP(dirty, CHUNK_PAGES);
};

int dmaproof_tracker_init(struct dmaproof_tracker *tracker)
{
	mutex_init(&tracker->lock);
	xa_init(&tracker->pages);
	INIT_LIST_HEAD(&tracker->marks);
	INIT_LIST_HEAD(&tracker->held);
	tracker->told = vcalloc(TOLD_ENTRIES, sizeof(*tracker->told));
	return tracker->told ? 0 : -ENOMEM;
}

void dmaproof_tracker_release(struct dmaproof_tracker *tracker)
{
	vfree(tracker->told);
}

/* Tell the kernel's iterator of a range, and remember that it was told; the lock is held. */
void dmaproof_tracker_tell(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty, u64 iova,
			   u64 length)
{
	iova_bitmap_set(dirty, iova, length);
	/* What is missing there would be taken for a loss. */
	if (WARN_ON(tracker->told_used == TOLD_ENTRIES))
		return;
	tracker->told[tracker->told_used++] = (struct dmaproof_told){
		.report = cpu_to_le64(tracker->reports),
		.iova = cpu_to_le64(iova),
		.length = cpu_to_le64(length),
	};
}

static void forget_marks(struct list_head *marks)
{
	struct dmaproof_mark *mark, *next;

	list_for_each_entry_safe(mark, next, marks, list)
		kfree(mark);
	INIT_LIST_HEAD(marks);
}

static void forget_everything(struct dmaproof_tracker *tracker)
{
	struct chunk *chunk;
	unsigned long index;

	xa_for_each(&tracker->pages, index, chunk)
		kvfree(chunk);
	xa_destroy(&tracker->pages);
	forget_marks(&tracker->marks);
	forget_marks(&tracker->held);
	kfree(tracker->ranges);
	tracker->ranges = NULL;
	tracker->range_count = 0;
}

void dmaproof_tracker_stop(struct dmaproof_tracker *tracker)
{
	mutex_lock(&tracker->lock);
	tracker->stops += tracker->on;
	tracker->on = false;
	forget_everything(tracker);
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

static void remember_pages(struct dmaproof_tracker *tracker, u64 first, u64 last)
{
	while (first <= last) {
		u64 end = min(last, first | (CHUNK_PAGES - 1));
		struct chunk *chunk = chunk_of(tracker, first);

		/* A loss that nobody injected would make every proof a lie. */
		if (WARN_ON(!chunk))
			return;
		bitmap_set(chunk->dirty, first % CHUNK_PAGES, end - first + 1);
		if (end == last)
			return;
		first = end + 1;
	}
}

/* Remember a write; true if all of it is inside what is logged. */
bool dmaproof_tracker_add(struct dmaproof_tracker *tracker, u64 iova, u64 length)
{
	u64 logged = 0;

	mutex_lock(&tracker->lock);
	for (u32 i = 0; tracker->on && i < tracker->range_count; i++) {
		u64 first = max(iova, tracker->ranges[i].first);
		u64 last = min(iova + length - 1, tracker->ranges[i].last);

		if (first > last)
			continue;
		remember_pages(tracker, first / tracker->page_size, last / tracker->page_size);
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

/* Forget the pages that are wholly inside [iova, last]; the tracker's lock is held. */
void dmaproof_tracker_forget(struct dmaproof_tracker *tracker, u64 iova, u64 last)
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

/* Report pages `first` to `end` - 1, of which only what is inside the question. */
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
	dmaproof_tracker_forget(tracker, iova, last);
}

static void read_marks(struct dmaproof_tracker *tracker, struct iova_bitmap *dirty)
{
	struct dmaproof_mark *mark, *next;

	list_for_each_entry_safe(mark, next, &tracker->marks, list) {
		for (u32 i = 0; i < mark->count; i++)
			dmaproof_report(tracker, dirty, mark->iova + i * mark->stride, mark->length);
		kfree(mark);
	}
	INIT_LIST_HEAD(&tracker->marks);
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
	/* As hardware does that has a smallest and a largest page. */
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
