// SPDX-License-Identifier: GPL-2.0
/*
 * The DMA engine: writes pieces periodically while it runs, and single pieces on request.
 *
 * dma_write() is the only access to user memory; it journals and tracks every write. It runs on the
 * device's workqueue, one work item at a time, under the device's lock.
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

#include "device.h"

#define JOURNAL_ENTRIES (1 << 20)
#define SCATTER 2654435761u /* a prime above the number of slots: k * SCATTER permutes them */

static u64 mix(u64 value)
{
	value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9ULL;
	value = (value ^ value >> 27) * 0x94D049BB133111EBULL;
	return value ^ value >> 31;
}

/* Fill `bytes` with the content of write `sequence` at `iova`; see control.h. */
static void fill(u8 *bytes, u64 sequence, u64 iova, size_t length)
{
	for (size_t i = 0; i < length;) {
		u64 address = iova + i;
		__le64 word = cpu_to_le64(mix(sequence * 0x9E3779B97F4A7C15ULL ^ address / 8));
		size_t skip = address % 8;
		size_t count = min(8 - skip, length - i);

		memcpy(bytes + i, (u8 *)&word + skip, count);
		i += count;
	}
}

static bool may_write(struct dmaproof_device *device)
{
	switch ((int)device->state) { /* the enum has no PRE_COPY before Linux 6.2 */
	case VFIO_DEVICE_STATE_RUNNING:
	case VFIO_DEVICE_STATE_RUNNING_P2P:
	case VFIO_DEVICE_STATE_PRE_COPY:
	case VFIO_DEVICE_STATE_PRE_COPY_P2P:
		return device->opened;
	default:
		return false;
	}
}

/*
 * Write the bytes `given`, or if NULL, the content that control.h defines. The caller has checked
 * that the device may write.
 */
static int dma_write(struct dmaproof_device *device, u64 iova, u64 length, u8 *given)
{
	struct dmaproof_entry *entry;
	u64 sequence = le64_to_cpu(device->registers.sequence) + 1;
	u64 done = 0;
	bool logged;
	int ret = 0;

	if (device->journal_used == JOURNAL_ENTRIES)
		return -ENOSPC;
	while (done < length && !ret) {
		size_t chunk = min_t(u64, PAGE_SIZE, length - done);

		u8 *data = given ? given + done : device->piece;

		if (!given)
			fill(data, sequence, iova + done, chunk);
		ret = vfio_dma_rw(&device->vdev, iova + done, data, chunk, true);
		if (!ret)
			done += chunk;
	}
	if (!done)
		return ret;
	/* After the data: whoever sees the dirty bit also sees the data. */
	logged = dmaproof_tracker_add(&device->tracker, iova, done);
	device->registers.sequence = cpu_to_le64(sequence);
	entry = &device->journal[device->journal_used++];
	*entry = (struct dmaproof_entry){
		.sequence = cpu_to_le64(sequence),
		.iova = cpu_to_le64(iova),
		.length = cpu_to_le64(done),
		.reports = cpu_to_le32(READ_ONCE(device->tracker.reports)),
		.state = cpu_to_le16(device->state),
		.logged = cpu_to_le16(logged),
		.time_ns = cpu_to_le64(ktime_get_ns()),
	};
	return ret;
}

/* Compute the IOVA of the engine's piece number k; false if the registers are inconsistent. */
static bool place(const struct dmaproof_registers *registers, u64 k, u64 *iova)
{
	u64 length = le64_to_cpu(registers->length);
	u64 piece = le32_to_cpu(registers->piece);
	u64 skew = le32_to_cpu(registers->skew);
	u64 stride = le32_to_cpu(registers->stride);
	u64 slots;

	if (!piece || !stride || skew + piece > length)
		return false;
	slots = (length - skew - piece) / stride + 1;
	if (slots >= SCATTER)
		return false;
	k %= slots;
	if (le32_to_cpu(registers->run) == DMAPROOF_RUN_SCATTERED)
		k = k * SCATTER % slots;
	*iova = le64_to_cpu(registers->iova) + skew + k * stride;
	return true;
}

static int one_piece(struct dmaproof_device *device)
{
	struct dmaproof_registers *registers = &device->registers;
	u64 done = le64_to_cpu(registers->done);
	u32 limit = le32_to_cpu(registers->limit);
	u64 iova;
	int ret;

	if (!place(registers, done, &iova))
		return -EINVAL;
	ret = dma_write(device, iova, le32_to_cpu(registers->piece), NULL);
	if (ret)
		return ret;
	registers->done = cpu_to_le64(done + 1);
	if (limit && done + 1 >= limit)
		registers->run = 0;
	return 0;
}

static void tick(struct work_struct *work)
{
	struct dmaproof_device *device =
		container_of(to_delayed_work(work), struct dmaproof_device, tick);
	struct dmaproof_registers *registers = &device->registers;
	int ret = 0;

	mutex_lock(&device->lock);
	for (u32 i = 0; i < le32_to_cpu(registers->burst) && registers->run && !ret; i++) {
		if (!may_write(device))
			break;
		ret = one_piece(device);
	}
	if (ret) {
		registers->run = 0;
		registers->error = cpu_to_le32(-ret);
	}
	/* A later change to a state in which the device may write kicks the engine again. */
	if (registers->run && may_write(device))
		queue_delayed_work(device->workers, &device->tick,
				   usecs_to_jiffies(le32_to_cpu(registers->period_us)));
	mutex_unlock(&device->lock);
}

/* Resume the engine if it is started; the device's lock is held. */
void dmaproof_engine_kick(struct dmaproof_device *device)
{
	if (device->registers.run && may_write(device))
		queue_delayed_work(device->workers, &device->tick, 0);
}

/* The fault "write_after_stop": write the journal's last ranges once more, the newest first. */
static void write_again(struct work_struct *work)
{
	struct dmaproof_device *device = container_of(work, struct dmaproof_device, write_again);
	u32 count;

	mutex_lock(&device->lock);
	count = min(dmaproof_writes_after_stop(device), device->journal_used);
	for (u32 last = device->journal_used; device->opened && count; count--) {
		const struct dmaproof_entry *entry = &device->journal[--last];

		dma_write(device, le64_to_cpu(entry->iova), le64_to_cpu(entry->length), NULL);
	}
	mutex_unlock(&device->lock);
}

struct batch {
	struct work_struct work;
	struct dmaproof_device *device;
	const struct dmaproof_op *ops;
	size_t count;
	void *given;
	int ret;
};

/* Whether `count` ranges that begin `stride` bytes apart all fit in 64 bits. */
static bool in_space(u64 iova, u64 length, u32 count, s64 stride)
{
	u64 reach, last;

	if (check_mul_overflow((u64)(count - 1), (u64)abs(stride), &reach))
		return false;
	if (stride < 0)
		return reach <= iova && !check_add_overflow(iova, length - 1, &last);
	return !check_add_overflow(iova, reach, &last) &&
	       !check_add_overflow(last, length - 1, &last);
}

static int execute_one(struct dmaproof_device *device, const struct dmaproof_op *op, void *given)
{
	u64 iova = le64_to_cpu(op->iova), length = le64_to_cpu(op->length);
	u32 count = le32_to_cpu(op->count);
	s64 stride = le64_to_cpu(op->stride);

	/* A mark may be any range, but iova_bitmap_set() may never return for a length of 0. */
	if (!length || !count || !in_space(iova, length, count, stride))
		return -EINVAL;
	switch (le32_to_cpu(op->kind)) {
	case DMAPROOF_OP_WRITE:
		if (count != 1)
			return -EINVAL;
		return may_write(device) ? dma_write(device, iova, length, given) : -EBUSY;
	case DMAPROOF_OP_MARK:
		return dmaproof_tracker_mark(&device->tracker, iova, length, count, stride);
	}
	return -EINVAL;
}

static void execute_batch(struct work_struct *work)
{
	struct batch *batch = container_of(work, struct batch, work);

	mutex_lock(&batch->device->lock);
	for (size_t i = 0; i < batch->count && !batch->ret; i++)
		batch->ret = execute_one(batch->device, &batch->ops[i], batch->given);
	mutex_unlock(&batch->device->lock);
}

/*
 * Execute `ops` and wait for them, up to the first error. `given` has the bytes of a single write,
 * or is NULL.
 */
int dmaproof_execute(struct dmaproof_device *device, const struct dmaproof_op *ops, size_t count,
		     void *given)
{
	struct batch batch = { .device = device, .ops = ops, .count = count, .given = given };

	INIT_WORK_ONSTACK(&batch.work, execute_batch);
	queue_work(device->workers, &batch.work);
	flush_work(&batch.work);
	destroy_work_on_stack(&batch.work);
	return batch.ret;
}

/* Write registers, except read-only ones; the device's lock is held. */
void dmaproof_bar_write(struct dmaproof_device *device, u32 offset, const void *data, size_t count)
{
	struct dmaproof_registers *registers = &device->registers, old = *registers;
	u32 end = min_t(u32, offset + count, sizeof(old));

	if (offset >= end)
		return;
	memcpy((u8 *)registers + offset, data, end - offset);
	registers->magic = old.magic;
	registers->done = old.done;
	registers->sequence = old.sequence;
	registers->error = old.error;
	if (registers->run && !old.run) {
		registers->done = 0;
		registers->error = 0;
		dmaproof_engine_kick(device);
	}
}

/* Reset the registers except `sequence`, as no number is used twice; the device's lock is held. */
void dmaproof_engine_reset(struct dmaproof_device *device)
{
	device->registers = (struct dmaproof_registers){
		.magic = cpu_to_le64(DMAPROOF_MAGIC),
		.sequence = device->registers.sequence,
	};
}

int dmaproof_engine_init(struct dmaproof_device *device)
{
	INIT_DELAYED_WORK(&device->tick, tick);
	INIT_WORK(&device->write_again, write_again);
	dmaproof_engine_reset(device);
	device->piece = kzalloc(PAGE_SIZE, GFP_KERNEL);
	device->journal = vcalloc(JOURNAL_ENTRIES, sizeof(*device->journal));
	device->workers = alloc_ordered_workqueue("dmaproof", 0);
	if (device->piece && device->journal && device->workers)
		return 0;
	if (device->workers)
		destroy_workqueue(device->workers);
	vfree(device->journal);
	kfree(device->piece);
	return -ENOMEM;
}

void dmaproof_engine_release(struct dmaproof_device *device)
{
	cancel_delayed_work_sync(&device->tick);
	destroy_workqueue(device->workers);
	vfree(device->journal);
	kfree(device->piece);
}
