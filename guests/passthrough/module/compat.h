/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Definitions that older kernels do not have, from Linux 6.1 on. Kbuild checks for each of them,
 * except for PRE_COPY, which is known by the macro of its ioctl.
 */
#ifndef DMAPROOF_COMPAT_H
#define DMAPROOF_COMPAT_H

#include <linux/cleanup.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vfio.h>

#ifndef DMAPROOF_HAS_FREE_KVFREE
DEFINE_FREE(kvfree, void *, if (!IS_ERR_OR_NULL(_T)) kvfree(_T))
#endif

#ifndef VFIO_MIG_GET_PRECOPY_INFO /* before Linux 6.2: these states are never entered */
#define VFIO_DEVICE_STATE_PRE_COPY ((enum vfio_device_mig_state)6)
#define VFIO_DEVICE_STATE_PRE_COPY_P2P ((enum vfio_device_mig_state)7)
#define VFIO_MIGRATION_PRE_COPY 0
#elif !defined(DMAPROOF_HAS_CHECK_PRECOPY)
static inline int vfio_check_precopy_ioctl(struct vfio_device *vdev, unsigned int command,
					   unsigned long arg, struct vfio_precopy_info *info)
{
	size_t bytes = offsetofend(struct vfio_precopy_info, dirty_bytes);

	if (command != VFIO_MIG_GET_PRECOPY_INFO)
		return -ENOTTY;
	if (copy_from_user(info, (void __user *)arg, bytes))
		return -EFAULT;
	return info->argsz < bytes ? -EINVAL : 0;
}
#endif

#endif
