// SPDX-License-Identifier: Apache-2.0
/* The drivers of the devices that can carry out the workload's requests. */
#ifndef DMAPROOF_STORAGE_H
#define DMAPROOF_STORAGE_H

#include "virtio_pci.h"

// The driver of a type of virtio devices (virtio 1.2, section 5). Its functions are those of the
// same names in machine.h.
struct storage {
    uint16_t type;
    uint16_t transitional_id;  // the PCI device ID of a transitional device (section 4.1.2.1), or 0
    uint64_t features;         // those of this type that the driver can use
    // Set up the queues of `device`, whose features are negotiated, and start it.
    uint64_t (*open)(struct virtio_device *device, unsigned slots);
    // Set up the queues of the device, which was reset, and start it.
    void (*reset)(void);
    void (*submit)(unsigned slot, struct request *request);
    int (*poll)(uint8_t *status);
    void (*report)(void);  // NULL: nothing to report
};
extern const struct storage virtio_blk, virtio_scsi, virtio_net, virtio_vsock;

// For the drivers of disks: slot s has place s / count of queue number s % count.

// Append a request's data, with adjacent pages as one piece, to the `count` pieces of its slot, and
// map the data. Return the new number of pieces.
unsigned add_data(unsigned slot, const struct request *request, struct piece *pieces,
                  unsigned count);
// Return a slot whose request is finished and is not mapped any more, or -1.
int poll_slots(struct virtio_queue *queues, unsigned count);

#endif
