// SPDX-License-Identifier: GPL-2.0
/*
 * A VFIO PCI device without hardware, whose DMA is known to the byte.
 *
 * Theory of operation
 * -------------------
 * A mediated device (mdev) that user space, such as QEMU's vfio-pci, uses as a migratable PCI
 * function. It has config space, one BAR of registers, no interrupts, VFIO's migration states, and
 * DMA logging. It is created through sysfs:
 *
 *	echo UUID > /sys/class/dmaproof/dmaproof/mdev_supported_types/dmaproof-dma/create
 *
 * An engine (engine.c) writes into user memory at IOVAs, through vfio_dma_rw(), each piece with
 * content that no other write has. Every write is recorded twice: in the tracker (tracker.c), which
 * keeps what hardware would keep, and in a journal, which is the ground truth. Reports never use
 * the journal. A report goes from the tracker through the kernel's own iova_bitmap into the user's
 * bitmap. It always passes through dmaproof_report() (faults.c), where module parameters can inject
 * faults. Without faults, that function only calls iova_bitmap_set() and records the range.
 *
 * The engine first writes the data to RAM, then the tracker, both under the device's lock. A change
 * to STOP (migration.c) takes that lock too, so the next report has every write before the change.
 *
 * The engine runs on a workqueue, and so without a user's mm. The legacy container (type1) lets
 * only the process that made a mapping, or a kernel thread, write to it; the process that requests
 * a write here is another one.
 *
 * In the P2P states the device continues to write, because it never writes to other devices.
 */
#include <linux/mdev.h>
#include <linux/module.h>
#include <linux/pci.h>

#include "device.h"

#define OFFSET_SHIFT 40 /* region index << 40: where a region is in the device's file */
#define VENDOR 0xfffd
#define DEVICE 0xd3a0

/* The bits of config space that can be written: command, BAR 0, and the interrupt line. */
static const struct {
	u8 offset;
	u8 mask;
} writable[] = {
	{ PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER },
	{ PCI_COMMAND + 1, PCI_COMMAND_INTX_DISABLE >> 8 },
	{ PCI_BASE_ADDRESS_0 + 1, (u8)~((DMAPROOF_BAR_BYTES - 1) >> 8) },
	{ PCI_BASE_ADDRESS_0 + 2, 0xff },
	{ PCI_BASE_ADDRESS_0 + 3, 0xff },
	{ PCI_INTERRUPT_LINE, 0xff },
};

static void reset_config(struct dmaproof_device *device)
{
	u8 *config = device->config;

	memset(config, 0, DMAPROOF_CONFIG_BYTES);
	*(__le16 *)(config + PCI_VENDOR_ID) = cpu_to_le16(VENDOR);
	*(__le16 *)(config + PCI_DEVICE_ID) = cpu_to_le16(DEVICE);
	*(__le16 *)(config + PCI_SUBSYSTEM_VENDOR_ID) = cpu_to_le16(VENDOR);
	*(__le16 *)(config + PCI_SUBSYSTEM_ID) = cpu_to_le16(DEVICE);
	*(__le16 *)(config + PCI_CLASS_DEVICE) = cpu_to_le16(PCI_CLASS_SYSTEM_OTHER);
}

static void write_config(struct dmaproof_device *device, u32 offset, const u8 *data, size_t count)
{
	for (size_t i = 0; i < count; i++)
		for (int j = 0; j < ARRAY_SIZE(writable); j++)
			if (writable[j].offset == offset + i)
				device->config[offset + i] = data[i] & writable[j].mask;
}

static u64 region_bytes(u32 index)
{
	if (index == VFIO_PCI_CONFIG_REGION_INDEX)
		return DMAPROOF_CONFIG_BYTES;
	return index == VFIO_PCI_BAR0_REGION_INDEX ? DMAPROOF_BAR_BYTES : 0;
}

/* The size of the part of [pos, pos + count) that is inside the region at pos. */
static size_t clip_to_region(loff_t pos, size_t count, u32 *index, u32 *offset)
{
	u64 inside = pos & (BIT_ULL(OFFSET_SHIFT) - 1);
	u64 bytes;

	*index = pos >> OFFSET_SHIFT;
	bytes = region_bytes(*index);
	*offset = inside;
	return inside < bytes ? min_t(u64, count, bytes - inside) : 0;
}

static ssize_t device_read(struct vfio_device *vdev, char __user *buffer, size_t count,
			   loff_t *pos)
{
	struct dmaproof_device *device = to_dmaproof(vdev);
	u8 *copy __free(kfree) = kzalloc(DMAPROOF_BAR_BYTES, GFP_KERNEL);
	u32 index, offset;

	if (!copy)
		return -ENOMEM;
	count = clip_to_region(*pos, count, &index, &offset);
	if (!count)
		return -EINVAL;
	mutex_lock(&device->lock);
	if (index == VFIO_PCI_CONFIG_REGION_INDEX)
		memcpy(copy, device->config, DMAPROOF_CONFIG_BYTES);
	else
		memcpy(copy, &device->registers, sizeof(device->registers));
	mutex_unlock(&device->lock);
	if (copy_to_user(buffer, copy + offset, count))
		return -EFAULT;
	*pos += count;
	return count;
}

static ssize_t device_write(struct vfio_device *vdev, const char __user *buffer, size_t count,
			    loff_t *pos)
{
	struct dmaproof_device *device = to_dmaproof(vdev);
	u32 index, offset;

	count = clip_to_region(*pos, count, &index, &offset);
	if (!count)
		return -EINVAL;

	u8 *data __free(kvfree) = vmemdup_user(buffer, count);

	if (IS_ERR(data))
		return PTR_ERR(no_free_ptr(data));
	mutex_lock(&device->lock);
	if (index == VFIO_PCI_CONFIG_REGION_INDEX)
		write_config(device, offset, data, count);
	else
		dmaproof_bar_write(device, offset, data, count);
	mutex_unlock(&device->lock);
	*pos += count;
	return count;
}

static void reset(struct dmaproof_device *device)
{
	mutex_lock(&device->lock);
	dmaproof_engine_reset(device);
	dmaproof_migration_reset(device);
	dmaproof_tracker_stop(&device->tracker);
	reset_config(device);
	mutex_unlock(&device->lock);
}

static int get_info(void __user *arg)
{
	struct vfio_device_info info;
	size_t bytes = offsetofend(struct vfio_device_info, num_irqs);

	if (copy_from_user(&info, arg, bytes))
		return -EFAULT;
	if (info.argsz < bytes)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user(arg, &info, bytes) ? -EFAULT : 0;
}

static int get_irq_info(void __user *arg)
{
	struct vfio_irq_info info;
	size_t bytes = offsetofend(struct vfio_irq_info, count);

	if (copy_from_user(&info, arg, bytes))
		return -EFAULT;
	if (info.argsz < bytes || info.index >= VFIO_PCI_NUM_IRQS)
		return -EINVAL;
	info.flags = 0;
	info.count = 0;
	return copy_to_user(arg, &info, bytes) ? -EFAULT : 0;
}

static int set_irqs(void __user *arg)
{
	struct vfio_irq_set header;

	if (copy_from_user(&header, arg, offsetofend(struct vfio_irq_set, count)))
		return -EFAULT;
	/* The device has no interrupts, but user space may disable them all when it exits. */
	return header.count || header.index >= VFIO_PCI_NUM_IRQS ? -EINVAL : 0;
}

static int region_info(struct vfio_device *vdev, struct vfio_region_info *info,
		       struct vfio_info_cap *caps)
{
	if (info->index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	info->offset = (u64)info->index << OFFSET_SHIFT;
	info->size = region_bytes(info->index);
	info->flags = info->size ? VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE : 0;
	return 0;
}

#ifndef DMAPROOF_HAS_REGION_INFO_OP
static int get_region_info(struct vfio_device *vdev, void __user *arg)
{
	struct vfio_region_info info;
	size_t bytes = offsetofend(struct vfio_region_info, offset);
	int ret;

	if (copy_from_user(&info, arg, bytes))
		return -EFAULT;
	if (info.argsz < bytes)
		return -EINVAL;
	ret = region_info(vdev, &info, NULL);
	if (ret)
		return ret;
	return copy_to_user(arg, &info, bytes) ? -EFAULT : 0;
}
#endif

static long device_ioctl(struct vfio_device *vdev, unsigned int command, unsigned long arg)
{
	void __user *user = (void __user *)arg;

	switch (command) {
	case VFIO_DEVICE_GET_INFO:
		return get_info(user);
#ifndef DMAPROOF_HAS_REGION_INFO_OP
	case VFIO_DEVICE_GET_REGION_INFO:
		return get_region_info(vdev, user);
#endif
	case VFIO_DEVICE_GET_IRQ_INFO:
		return get_irq_info(user);
	case VFIO_DEVICE_SET_IRQS:
		return set_irqs(user);
	case VFIO_DEVICE_RESET:
		reset(to_dmaproof(vdev));
		return 0;
	}
	return -ENOTTY;
}

static int device_open(struct vfio_device *vdev)
{
	struct dmaproof_device *device = to_dmaproof(vdev);

	reset(device);
	mutex_lock(&device->lock);
	device->journal_used = 0;
	device->tracker.reported_ranges_used = 0;
	dmaproof_migration_open(device);
	device->opened = true;
	mutex_unlock(&device->lock);
	return 0;
}

static void device_close(struct vfio_device *vdev)
{
	struct dmaproof_device *device = to_dmaproof(vdev);

	mutex_lock(&device->lock);
	device->opened = false;
	mutex_unlock(&device->lock);
	reset(device);
	flush_workqueue(device->workers);
}

static int device_init(struct vfio_device *vdev)
{
	struct dmaproof_device *device = to_dmaproof(vdev);

	int ret;

	mutex_init(&device->lock);
	ret = dmaproof_tracker_init(&device->tracker);
	if (ret)
		return ret;
	ret = dmaproof_migration_init(device);
	if (ret)
		goto err_tracker;
	reset_config(device);
	vdev->mig_ops = &dmaproof_migration_ops;
	vdev->log_ops = &dmaproof_log_ops;
	ret = dmaproof_engine_init(device);
	if (ret)
		goto err_migration;
	return 0;

err_migration:
	dmaproof_migration_release(device);
err_tracker:
	dmaproof_tracker_release(&device->tracker);
	return ret;
}

static void device_release(struct vfio_device *vdev)
{
	dmaproof_engine_release(to_dmaproof(vdev));
	dmaproof_migration_release(to_dmaproof(vdev));
	dmaproof_tracker_release(&to_dmaproof(vdev)->tracker);
}

static const struct vfio_device_ops device_ops = {
	.name = "dmaproof",
	.init = device_init,
	.release = device_release,
#ifdef DMAPROOF_HAS_IOMMUFD
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
#endif
	.open_device = device_open,
	.close_device = device_close,
	.read = device_read,
	.write = device_write,
	.ioctl = device_ioctl,
#ifdef DMAPROOF_HAS_REGION_INFO_OP
	.get_region_info_caps = region_info,
#endif
};

static int probe(struct mdev_device *mdev)
{
	struct dmaproof_device *device;
	int ret;

	device = vfio_alloc_device(dmaproof_device, vdev, &mdev->dev, &device_ops);
	if (IS_ERR(device))
		return PTR_ERR(device);
	ret = vfio_register_emulated_iommu_dev(&device->vdev);
	if (ret) {
		vfio_put_device(&device->vdev);
		return ret;
	}
	dev_set_drvdata(&mdev->dev, device);
	dmaproof_control_add(device, dev_name(&mdev->dev));
	return 0;
}

static void unprobe(struct mdev_device *mdev)
{
	struct dmaproof_device *device = dev_get_drvdata(&mdev->dev);

	dmaproof_control_remove(device);
	vfio_unregister_group_dev(&device->vdev);
	vfio_put_device(&device->vdev);
}

static struct mdev_driver driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = 16,
	.driver = {
		.name = "dmaproof_vfio",
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
	},
	.probe = probe,
	.remove = unprobe,
};

static struct mdev_type type = {
	.sysfs_name = "dma",
	.pretty_name = "a device whose DMA is known",
};
static struct mdev_type *types[] = { &type };

static struct class parent_class = { .name = "dmaproof" };
static struct device *parent;
static struct mdev_parent mdev_parent;

static int __init dmaproof_init(void)
{
	int ret;

	ret = class_register(&parent_class);
	if (ret)
		return ret;
	parent = device_create(&parent_class, NULL, 0, NULL, "dmaproof");
	if (IS_ERR(parent)) {
		ret = PTR_ERR(parent);
		goto err_class;
	}
	dmaproof_control_init();
	ret = mdev_register_driver(&driver);
	if (ret)
		goto err_device;
	ret = mdev_register_parent(&mdev_parent, parent, &driver, types, ARRAY_SIZE(types));
	if (ret)
		goto err_driver;
	return 0;

err_driver:
	mdev_unregister_driver(&driver);
err_device:
	dmaproof_control_exit();
	device_unregister(parent);
err_class:
	class_unregister(&parent_class);
	return ret;
}

static void __exit dmaproof_exit(void)
{
	mdev_unregister_parent(&mdev_parent);
	mdev_unregister_driver(&driver);
	dmaproof_control_exit();
	device_unregister(parent);
	class_unregister(&parent_class);
}

module_init(dmaproof_init);
module_exit(dmaproof_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A VFIO PCI device without hardware, whose DMA is known to the byte");
MODULE_INFO(import_ns, "IOMMUFD"); /* MODULE_IMPORT_NS() wants quotes from Linux 6.13 on */
