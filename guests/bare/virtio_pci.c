// SPDX-License-Identifier: Apache-2.0
#include "virtio_pci.h"

enum {
    VENDOR = 0x1af4,
    VENDOR_CAPABILITY = 0x09,
    CAPABILITY_TYPE = 3,
    CAPABILITY_BAR = 4,
    CAPABILITY_OFFSET = 8,
    CAPABILITY_MULTIPLIER = 16,
    COMMON_CONFIG = 1,
    NOTIFICATIONS = 2,
    DEVICE_CONFIG = 4,

    STATUS_ACKNOWLEDGE = 1,
    STATUS_DRIVER = 2,
    STATUS_DRIVER_OK = 4,
    STATUS_FEATURES_OK = 8,
};

struct common_config {
    uint32_t device_feature_select, device_feature, driver_feature_select, driver_feature;
    uint16_t config_vector, num_queues;
    uint8_t device_status, config_generation;
    uint16_t queue_select, queue_size, queue_vector, queue_enable, queue_notify_off;
    uint32_t queue_parts[3][2];  // descriptors, driver, device: low and high half
};

bool virtio_find(struct virtio_device *device, const uint16_t *ids, unsigned count) {
    return pci_find(VENDOR, ids, count, &device->pci);
}

// Find the capability of `type` and the structure that it points to.
static unsigned capability(const struct pci_device *device, uint8_t type,
                           volatile uint8_t **structure) {
    unsigned offset = 0;
    while ((offset = pci_capability(device, VENDOR_CAPABILITY, offset)))
        if (pci_read8(device, offset + CAPABILITY_TYPE) == type)
            break;
    if (!offset)
        give_up("expected a modern virtio device (virtio 1.0 or later), but it is a legacy one");
    *structure = pci_map_bar(device, pci_read8(device, offset + CAPABILITY_BAR)) +
                 pci_read32(device, offset + CAPABILITY_OFFSET);
    return offset;
}

static uint64_t negotiate(volatile struct common_config *common, uint64_t wanted) {
    uint64_t offered = 0;
    for (uint32_t half = 0; half < 2; half++) {
        common->device_feature_select = half;
        offered |= (uint64_t)common->device_feature << 32 * half;
    }
    uint64_t of_rings = F_RING_INDIRECT | F_RING_EVENT_INDEX | F_RING_PACKED;
    uint64_t accepted = offered & (wanted | F_VERSION_1 | F_ACCESS_PLATFORM | of_rings);
    for (uint32_t half = 0; half < 2; half++) {
        common->driver_feature_select = half;
        common->driver_feature = (uint32_t)(accepted >> 32 * half);
    }
    common->device_status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
    if (!(accepted & F_VERSION_1) || !(common->device_status & STATUS_FEATURES_OK))
        give_up("a virtio device refused the features of the guest's driver");
    return accepted;
}

void virtio_open(struct virtio_device *device, uint64_t wanted) {
    volatile uint8_t *structure;
    unsigned notifications = capability(&device->pci, NOTIFICATIONS, &device->notifications);
    device->notification_multiplier =
        pci_read32(&device->pci, notifications + CAPABILITY_MULTIPLIER);
    capability(&device->pci, DEVICE_CONFIG, &device->config);
    capability(&device->pci, COMMON_CONFIG, &structure);
    pci_enable(&device->pci);

    device->common = (volatile void *)structure;
    virtio_reset(device, wanted);
}

// Section 3.1.1; the device has stopped when its status reads 0 (section 2.4.2).
void virtio_reset(struct virtio_device *device, uint64_t wanted) {
    device->common->device_status = 0;
    while (device->common->device_status)
        ;
    device->common->device_status = STATUS_ACKNOWLEDGE | STATUS_DRIVER;
    device->features = negotiate(device->common, wanted);
}

bool virtio_open_queue(struct virtio_device *device, unsigned index, struct virtio_queue *queue,
                       unsigned places, unsigned pieces) {
    volatile struct common_config *common = device->common;
    common->queue_select = (uint16_t)index;
    uint16_t size = common->queue_size < MAX_QUEUE_SIZE ? common->queue_size : MAX_QUEUE_SIZE;
    if (!virtqueue_open(&queue->ring, device->features, size, places, pieces))
        return false;
    virtio_enable_queue(device, index, queue);
    return true;
}

void virtio_enable_queue(struct virtio_device *device, unsigned index, struct virtio_queue *queue) {
    volatile struct common_config *common = device->common;
    common->queue_select = (uint16_t)index;
    common->queue_size = queue->ring.size;
    for (unsigned part = 0; part < 3; part++) {
        common->queue_parts[part][0] = (uint32_t)queue->ring.parts[part];
        common->queue_parts[part][1] = (uint32_t)(queue->ring.parts[part] >> 32);
    }
    unsigned doorbell = common->queue_notify_off * device->notification_multiplier;
    queue->doorbell = (volatile uint16_t *)(device->notifications + doorbell);
    common->queue_enable = 1;
}

void virtio_start(struct virtio_device *device) {
    device->common->device_status |= STATUS_DRIVER_OK;
}

void virtio_submit(struct virtio_queue *queue, unsigned index, unsigned place,
                   const struct piece *pieces, unsigned count) {
    if (virtqueue_submit(&queue->ring, place, pieces, count))
        *queue->doorbell = (uint16_t)index;
}
