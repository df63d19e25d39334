// SPDX-License-Identifier: Apache-2.0
/* Memory that is plugged as a virtio-mem device (virtio 1.2, section 5.15). */
#ifndef DMAPROOF_VIRTIO_MEM_H
#define DMAPROOF_VIRTIO_MEM_H

#include "machine.h"

// Find the next virtio-mem device, and plug all memory that it offers. Return false if there is no
// further device.
bool virtio_mem_plug(struct range *range);

#endif
