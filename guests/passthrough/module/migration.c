// SPDX-License-Identifier: GPL-2.0
/*
 * VFIO's migration states, and the device's own state as a stream.
 *
 * The stream has one or two records. The first of two is made in PRE_COPY and may be stale; the
 * last is made in STOP_COPY and is the one that is loaded. A record is a page that starts with
 * struct record. Loaded data is checked when RESUMING is left, as the interface requires. If there
 * is too little or too much of it, or a record is invalid, that transition fails and the device
 * stays in RESUMING until it is reset.
 */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "device.h"

#define RECORD_BYTES 4096
#define RECORDS 2
#define VERSION 1
#define STATES 1024

static atomic64_t entered_states;

struct record {
	__le64 magic;
	__le32 version;
	__le32 final;
	struct dmaproof_registers registers;
};

/* A session of saving or resuming. Its file may outlive the session, and even the device. */
struct dmaproof_stream {
	struct mutex lock;
	struct file *file;
	struct dmaproof_device *device; /* NULL when the session is over */
	bool precopy;
	size_t size;
	size_t position;
	u8 data[RECORDS * RECORD_BYTES];
};

static void add_record(struct dmaproof_stream *stream, bool final)
{
	struct record *record = (struct record *)(stream->data + stream->size);

	record->magic = cpu_to_le64(DMAPROOF_MAGIC);
	record->version = cpu_to_le32(VERSION);
	record->final = cpu_to_le32(final);
	record->registers = stream->device->registers;
	stream->size += RECORD_BYTES;
	stream->precopy = !final;
}

/* The user has read all data, and does not expect that the device still writes. */
static ssize_t end_of_data(struct dmaproof_device *device)
{
	if (dmaproof_writes_after_stop(device))
		queue_work(device->workers, &device->write_again);
	return 0;
}

static ssize_t stream_read(struct file *file, char __user *buffer, size_t count, loff_t *pos)
{
	struct dmaproof_stream *stream = file->private_data;
	ssize_t ret;

	mutex_lock(&stream->lock);
	count = min(count, stream->size - stream->position);
	if (!stream->device)
		ret = -ENODEV;
	else if (!count)
		ret = stream->precopy ? -ENOMSG : end_of_data(stream->device);
	else if (copy_to_user(buffer, stream->data + stream->position, count))
		ret = -EFAULT;
	else
		ret = count;
	if (ret > 0)
		stream->position += ret;
	mutex_unlock(&stream->lock);
	return ret;
}

static ssize_t stream_write(struct file *file, const char __user *buffer, size_t count,
			    loff_t *pos)
{
	struct dmaproof_stream *stream = file->private_data;
	ssize_t ret = count;

	mutex_lock(&stream->lock);
	if (!stream->device)
		ret = -ENODEV;
	else if (count > sizeof(stream->data) - stream->size)
		ret = -ENOSPC;
	else if (copy_from_user(stream->data + stream->size, buffer, count))
		ret = -EFAULT;
	else
		stream->size += count;
	mutex_unlock(&stream->lock);
	return ret;
}

#ifdef VFIO_MIG_GET_PRECOPY_INFO
static long stream_ioctl(struct file *file, unsigned int command, unsigned long arg)
{
	struct dmaproof_stream *stream = file->private_data;
	struct vfio_precopy_info info = {};
	u64 initial_bytes, dirty_bytes = 0;
	int ret = -ENODEV;

	mutex_lock(&stream->lock);
	if (stream->device)
		ret = vfio_check_precopy_ioctl(&stream->device->vdev, command, arg, &info);
	if (!ret && !stream->precopy)
		ret = -EINVAL;
	initial_bytes = stream->size - stream->position;
	if (!ret)
		ret = dmaproof_fault_precopy(stream->device, &initial_bytes, &dirty_bytes);
	if (!ret) {
		info.initial_bytes = initial_bytes;
		info.dirty_bytes = dirty_bytes;
		if (copy_to_user((void __user *)arg, &info,
				 offsetofend(struct vfio_precopy_info, dirty_bytes)))
			ret = -EFAULT;
	}
	mutex_unlock(&stream->lock);
	return ret;
}
#endif

static int stream_release(struct inode *inode, struct file *file)
{
	kfree(file->private_data);
	return 0;
}

static const struct file_operations saving = {
	.owner = THIS_MODULE,
	.read = stream_read,
#ifdef VFIO_MIG_GET_PRECOPY_INFO
	.unlocked_ioctl = stream_ioctl,
#endif
	.release = stream_release,
};

static const struct file_operations resuming = {
	.owner = THIS_MODULE,
	.write = stream_write,
	.release = stream_release,
};

static struct file *open_stream(struct dmaproof_device *device, const struct file_operations *ops)
{
	struct dmaproof_stream *stream = kzalloc(sizeof(*stream), GFP_KERNEL_ACCOUNT);
	struct file *file;

	if (!stream)
		return ERR_PTR(-ENOMEM);
	mutex_init(&stream->lock);
	stream->device = device;
	file = anon_inode_getfile("dmaproof-state", ops, stream,
				  ops == &saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(file)) {
		kfree(stream);
		return file;
	}
	stream_open(file_inode(file), file);
	stream->file = file;
	device->stream = stream;
	return get_file(file);
}

static void close_stream(struct dmaproof_device *device)
{
	struct dmaproof_stream *stream = device->stream;

	if (!stream)
		return;
	mutex_lock(&stream->lock);
	stream->device = NULL;
	mutex_unlock(&stream->lock);
	device->stream = NULL;
	fput(stream->file);
}

static struct file *start_saving(struct dmaproof_device *device, bool final)
{
	struct file *file = open_stream(device, &saving);

	if (!IS_ERR(file)) {
		mutex_lock(&device->stream->lock);
		add_record(device->stream, final);
		mutex_unlock(&device->stream->lock);
	}
	return file;
}

static void finish_saving(struct dmaproof_device *device)
{
	mutex_lock(&device->stream->lock);
	add_record(device->stream, true);
	mutex_unlock(&device->stream->lock);
}

static int load(struct dmaproof_device *device)
{
	struct dmaproof_stream *stream = device->stream;
	const struct record *last;

	guard(mutex)(&stream->lock);
	if (!stream->size || stream->size % RECORD_BYTES)
		return -EINVAL;
	for (size_t at = 0; at < stream->size; at += RECORD_BYTES) {
		last = (const struct record *)(stream->data + at);
		if (le64_to_cpu(last->magic) != DMAPROOF_MAGIC ||
		    le32_to_cpu(last->version) != VERSION ||
		    le32_to_cpu(last->final) != (at + RECORD_BYTES == stream->size))
			return -EINVAL;
	}
	device->registers = last->registers;
	return 0;
}

/* Follow one arc of the state machine (uapi/linux/vfio.h); returns a file, NULL or an error. */
static struct file *step(struct dmaproof_device *device, enum vfio_device_mig_state next)
{
	enum vfio_device_mig_state now = device->state;
	int ret;

	if (next == VFIO_DEVICE_STATE_PRE_COPY && now == VFIO_DEVICE_STATE_RUNNING)
		return start_saving(device, false);
	if (next == VFIO_DEVICE_STATE_PRE_COPY_P2P && now == VFIO_DEVICE_STATE_RUNNING_P2P)
		return start_saving(device, false);
	if (next == VFIO_DEVICE_STATE_STOP_COPY && now == VFIO_DEVICE_STATE_STOP)
		return start_saving(device, true);
	if (next == VFIO_DEVICE_STATE_RESUMING)
		return open_stream(device, &resuming);
	if (next == VFIO_DEVICE_STATE_STOP_COPY) {
		finish_saving(device);
		return NULL;
	}
	if (now == VFIO_DEVICE_STATE_RESUMING) {
		ret = load(device);
		if (ret)
			return ERR_PTR(ret);
	}
	if (next != VFIO_DEVICE_STATE_PRE_COPY && next != VFIO_DEVICE_STATE_PRE_COPY_P2P)
		close_stream(device);
	return NULL;
}

static void enter(struct dmaproof_device *device, enum vfio_device_mig_state state)
{
	device->state = state;
	if (device->states_used == STATES)
		return;
	device->states[device->states_used++] = (struct dmaproof_entered_state){
		.order = cpu_to_le64(atomic64_inc_return(&entered_states)),
		.time_ns = cpu_to_le64(ktime_get_ns()),
		.state = cpu_to_le32(state),
		.writes = cpu_to_le32(device->journal_used),
	};
}

static struct file *set_state(struct vfio_device *vdev, enum vfio_device_mig_state wanted)
{
	struct dmaproof_device *device = to_dmaproof(vdev);
	struct file *file = NULL;

	mutex_lock(&device->lock);
	while (device->state != wanted && !file) {
		enum vfio_device_mig_state next;
		int ret = vfio_mig_get_next_state(vdev, device->state, wanted, &next);

		if (!ret && dmaproof_fault_state(device, next)) {
			close_stream(device);
			enter(device, VFIO_DEVICE_STATE_ERROR);
			ret = -EIO;
		}
		if (ret) {
			file = ERR_PTR(ret);
			break;
		}
		file = step(device, next);
		if (IS_ERR(file))
			break;
		enter(device, next);
		dmaproof_engine_kick(device);
	}
	mutex_unlock(&device->lock);
	return file;
}

static int get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct dmaproof_device *device = to_dmaproof(vdev);

	mutex_lock(&device->lock);
	*state = device->state;
	mutex_unlock(&device->lock);
	return 0;
}

#ifdef VFIO_MIG_GET_PRECOPY_INFO /* Linux 6.2 added both */
static int get_data_size(struct vfio_device *vdev, unsigned long *bytes)
{
	*bytes = RECORD_BYTES;
	return 0;
}
#endif

const struct vfio_migration_ops dmaproof_migration_ops = {
	.migration_set_state = set_state,
	.migration_get_state = get_state,
#ifdef VFIO_MIG_GET_PRECOPY_INFO
	.migration_get_data_size = get_data_size,
#endif
};

/* End the session and return to RUNNING; the device's lock is held. */
void dmaproof_migration_reset(struct dmaproof_device *device)
{
	close_stream(device);
	enter(device, VFIO_DEVICE_STATE_RUNNING);
}

/* Begin a new record of states; the device has been reset, and its lock is held. */
void dmaproof_migration_open(struct dmaproof_device *device)
{
	device->vdev.migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY;
	if (dmaproof_has_p2p(device))
		device->vdev.migration_flags |= VFIO_MIGRATION_P2P;
	device->states_used = 0;
	enter(device, VFIO_DEVICE_STATE_RUNNING);
}

int dmaproof_migration_init(struct dmaproof_device *device)
{
	device->states = vcalloc(STATES, sizeof(*device->states));
	if (!device->states)
		return -ENOMEM;
	device->state = VFIO_DEVICE_STATE_RUNNING;
	/* The kernel requires flags when the device is registered; see dmaproof_migration_open(). */
	device->vdev.migration_flags = VFIO_MIGRATION_STOP_COPY;
	return 0;
}

void dmaproof_migration_release(struct dmaproof_device *device)
{
	vfree(device->states);
}
