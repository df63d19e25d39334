// SPDX-License-Identifier: GPL-2.0
/*
 * The device's folder in debugfs, for test programs that have not opened the device: see control.h.
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "device.h"

#define OPS_AT_ONCE 65536
#define BYTES_AT_ONCE SZ_1M

static struct dentry *root;

static ssize_t control_write(struct file *file, const char __user *buffer, size_t count,
			     loff_t *pos)
{
	struct dmaproof_device *device = file->private_data;
	size_t ops = min_t(size_t, count / sizeof(struct dmaproof_op), OPS_AT_ONCE);
	int ret;

	if (!ops || count % sizeof(struct dmaproof_op))
		return -EINVAL;

	struct dmaproof_op *copy __free(kvfree) = vmemdup_user(buffer, ops * sizeof(*copy));

	if (IS_ERR(copy))
		return PTR_ERR(no_free_ptr(copy));
	ret = dmaproof_execute(device, copy, ops, NULL);
	return ret ?: ops * sizeof(*copy);
}

static const struct file_operations control = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = control_write,
};

static ssize_t dma_write(struct file *file, const char __user *buffer, size_t count, loff_t *pos)
{
	struct dmaproof_device *device = file->private_data;
	size_t bytes = min_t(size_t, count, BYTES_AT_ONCE);
	struct dmaproof_op op = {
		.kind = cpu_to_le32(DMAPROOF_OP_WRITE),
		.count = cpu_to_le32(1),
		.iova = cpu_to_le64(*pos),
		.length = cpu_to_le64(bytes),
	};
	int ret;

	void *copy __free(kvfree) = vmemdup_user(buffer, bytes);

	if (IS_ERR(copy))
		return PTR_ERR(no_free_ptr(copy));
	ret = dmaproof_execute(device, &op, 1, copy);
	if (ret)
		return ret;
	*pos += bytes;
	return bytes;
}

static const struct file_operations dma = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = dma_write,
	.llseek = no_seek_end_llseek,
};

static ssize_t bar_read(struct file *file, char __user *buffer, size_t count, loff_t *pos)
{
	struct dmaproof_device *device = file->private_data;
	struct dmaproof_registers registers;

	mutex_lock(&device->lock);
	registers = device->registers;
	mutex_unlock(&device->lock);
	return simple_read_from_buffer(buffer, count, pos, &registers, sizeof(registers));
}

static ssize_t bar_write(struct file *file, const char __user *buffer, size_t count, loff_t *pos)
{
	struct dmaproof_device *device = file->private_data;
	struct dmaproof_registers registers = {};
	loff_t start = *pos;
	ssize_t ret = simple_write_to_buffer(&registers, sizeof(registers), pos, buffer, count);

	if (ret <= 0)
		return ret;
	mutex_lock(&device->lock);
	dmaproof_bar_write(device, start, (u8 *)&registers + start, ret);
	mutex_unlock(&device->lock);
	return ret;
}

static const struct file_operations bar = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = bar_read,
	.write = bar_write,
	.llseek = default_llseek,
};

static ssize_t journal_read(struct file *file, char __user *buffer, size_t count, loff_t *pos)
{
	struct dmaproof_device *device = file->private_data;
	u32 used;

	mutex_lock(&device->lock);
	used = device->journal_used;
	mutex_unlock(&device->lock);
	/* While the device is open, entries are only added. */
	return simple_read_from_buffer(buffer, count, pos, device->journal,
				       used * sizeof(*device->journal));
}

static const struct file_operations journal = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = journal_read,
	.llseek = default_llseek,
};

static ssize_t reported_ranges_read(struct file *file, char __user *buffer, size_t count,
				    loff_t *pos)
{
	struct dmaproof_device *device = file->private_data;
	struct dmaproof_tracker *tracker = &device->tracker;
	u32 used;

	mutex_lock(&tracker->lock);
	used = tracker->reported_ranges_used;
	mutex_unlock(&tracker->lock);
	/* As in the journal, entries are only added. */
	return simple_read_from_buffer(buffer, count, pos, tracker->reported_ranges,
				       used * sizeof(*tracker->reported_ranges));
}

static const struct file_operations reported_ranges = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = reported_ranges_read,
	.llseek = default_llseek,
};

static ssize_t states_read(struct file *file, char __user *buffer, size_t count, loff_t *pos)
{
	struct dmaproof_device *device = file->private_data;
	u32 used;

	mutex_lock(&device->lock);
	used = device->states_used;
	mutex_unlock(&device->lock);
	/* As in the journal, entries are only added. */
	return simple_read_from_buffer(buffer, count, pos, device->states,
				       used * sizeof(*device->states));
}

static const struct file_operations states = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.read = states_read,
	.llseek = default_llseek,
};

/* A reader that reads twice gets one text: the second read does not format the counters again. */
static int stats_show(struct seq_file *file, void *unused)
{
	struct dmaproof_device *device = file->private;
	struct dmaproof_tracker *tracker = &device->tracker;

	mutex_lock(&device->lock);
	mutex_lock(&tracker->lock);
	seq_printf(file,
		   "state %d\nlogging %d\npage_size %llu\nwrites %u\nstarts %llu\n"
		   "stops %llu\nreports %llu\nreported %llu\ndropped %llu\n",
		   device->state, tracker->on, tracker->page_size, device->journal_used,
		   tracker->starts, tracker->stops, tracker->reports, tracker->reported,
		   tracker->dropped);
	mutex_unlock(&tracker->lock);
	mutex_unlock(&device->lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

void dmaproof_control_init(void)
{
	root = debugfs_create_dir("dmaproof", NULL);
}

void dmaproof_control_exit(void)
{
	debugfs_remove(root);
}

void dmaproof_control_add(struct dmaproof_device *device, const char *name)
{
	device->folder = debugfs_create_dir(name, root);
	debugfs_create_file("control", 0200, device->folder, device, &control);
	debugfs_create_file("bar", 0600, device->folder, device, &bar);
	debugfs_create_file("dma", 0200, device->folder, device, &dma);
	debugfs_create_file("journal", 0400, device->folder, device, &journal);
	debugfs_create_file("reported_ranges", 0400, device->folder, device, &reported_ranges);
	debugfs_create_file("states", 0400, device->folder, device, &states);
	debugfs_create_file("stats", 0400, device->folder, device, &stats_fops);
}

void dmaproof_control_remove(struct dmaproof_device *device)
{
	debugfs_remove(device->folder);
}
