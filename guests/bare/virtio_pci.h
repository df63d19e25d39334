// SPDX-License-Identifier: Apache-2.0
/* Modern virtio devices on PCI (virtio 1.2, chapters 3.1 and 4.1). */
#ifndef DMAPROOF_VIRTIO_PCI_H
#define DMAPROOF_VIRTIO_PCI_H

#include "virtqueue.h"

static const uint64_t F_VERSION_1 = 1ull << 32;

// A virtio device; its `pci` device has been found.
struct virtio_device {
    struct pci_device pci;
    volatile struct common_config *common;
    volatile uint8_t *notifications, *config;
    uint32_t notification_multiplier;
    uint64_t features;
};

struct virtio_queue {
    struct virtqueue ring;
    volatile uint16_t *doorbell;
};

// Find the first virtio device with one of the PCI `ids`, from device->pci on.
bool virtio_find(struct virtio_device *device, const uint16_t *ids, unsigned count);
// Reset the device, and negotiate those of the `wanted` features that the device offers, besides
// those of version 1, of the ring and of the IOMMU.
void virtio_open(struct virtio_device *device, uint64_t wanted);
// Do so again with a device that was opened; its queues must be enabled again, and the device started.
void virtio_reset(struct virtio_device *device, uint64_t wanted);
// Set up queue number `index` (virtqueue_open). Return false if it is too small.
bool virtio_open_queue(struct virtio_device *device, unsigned index, struct virtio_queue *queue,
                       unsigned places, unsigned pieces);
// Let the device use a queue that has been set up (virtqueue_open, virtqueue_reset).
void virtio_enable_queue(struct virtio_device *device, unsigned index, struct virtio_queue *queue);
void virtio_start(struct virtio_device *device);
// Submit a request (virtqueue_submit), with a notification if the device wants one.
void virtio_submit(struct virtio_queue *queue, unsigned index, unsigned place,
                   const struct piece *pieces, unsigned count);

#endif
