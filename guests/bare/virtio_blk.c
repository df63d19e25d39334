// SPDX-License-Identifier: Apache-2.0
/*
 * A polled virtio block driver over the modern PCI transport (virtio 1.2, sections 4.1 and 5.2).
 * The slots are distributed over the queues in turn, and each has a place in its queue. The status
 * bytes have their own page, which only the device writes, like its area of a queue.
 */
#include "virtqueue.h"

enum {
    VENDOR = 0x1af4,
    BLK = 0x1042,
    TRANSITIONAL_BLK = 0x1001,

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

    DISK_TIMEOUT_US = 10 * 1000 * 1000,
    MAX_QUEUES = 16,

    REQUEST_IN = 0,
    REQUEST_OUT = 1,
};

static const uint64_t F_BLK_MQ = 1ull << 12;
static const uint64_t F_VERSION_1 = 1ull << 32;
static const uint64_t F_ACCESS_PLATFORM = 1ull << 33;

struct common_config {
    uint32_t device_feature_select, device_feature, driver_feature_select, driver_feature;
    uint16_t config_vector, num_queues;
    uint8_t device_status, config_generation;
    uint16_t queue_select, queue_size, queue_vector, queue_enable, queue_notify_off;
    uint32_t queue_parts[3][2];  // descriptors, driver, device: low and high half
};

struct header {
    uint32_t type, reserved;
    uint64_t sector;
};

static struct queue {
    struct virtqueue ring;
    volatile uint16_t *doorbell;
} queues[MAX_QUEUES];

static unsigned queue_count;
static uint64_t features;
static struct header *headers;      // one for each slot
static volatile uint8_t *statuses;  // one for each slot
static uint64_t headers_at, statuses_at;  // their addresses for the device

// Finding the device -----------------------------------------------------------------------------

// Find the capability of `type` and the structure that it points to.
static unsigned capability(const struct pci_device *device, uint8_t type,
                           volatile uint8_t **structure) {
    unsigned offset = 0;
    while ((offset = pci_capability(device, VENDOR_CAPABILITY, offset)))
        if (pci_read8(device, offset + CAPABILITY_TYPE) == type)
            break;
    if (!offset)
        give_up("the disk is not a modern virtio device (virtio 1.0 or later)");
    *structure = pci_map_bar(device, pci_read8(device, offset + CAPABILITY_BAR)) +
                 pci_read32(device, offset + CAPABILITY_OFFSET);
    return offset;
}

static uint64_t negotiate(volatile struct common_config *common) {
    uint64_t offered = 0;
    for (uint32_t half = 0; half < 2; half++) {
        common->device_feature_select = half;
        offered |= (uint64_t)common->device_feature << 32 * half;
    }
    uint64_t of_rings = F_RING_INDIRECT | F_RING_EVENT_INDEX | F_RING_PACKED;
    uint64_t wanted = offered & (F_BLK_MQ | F_VERSION_1 | F_ACCESS_PLATFORM | of_rings);
    for (uint32_t half = 0; half < 2; half++) {
        common->driver_feature_select = half;
        common->driver_feature = (uint32_t)(wanted >> 32 * half);
    }
    common->device_status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
    if (!(wanted & F_VERSION_1) || !(common->device_status & STATUS_FEATURES_OK))
        give_up("the disk refused the virtio features of the guest's driver");
    return wanted;
}

static void set_up_queue(volatile struct common_config *common, struct virtqueue *queue,
                         unsigned places) {
    uint16_t size = common->queue_size < MAX_QUEUE_SIZE ? common->queue_size : MAX_QUEUE_SIZE;
    if (!virtqueue_open(queue, features, size, places))
        give_up("the disk's queues are too small for the workload's threads; use fewer threads");
    common->queue_size = size;
    for (unsigned part = 0; part < 3; part++) {
        common->queue_parts[part][0] = (uint32_t)queue->parts[part];
        common->queue_parts[part][1] = (uint32_t)(queue->parts[part] >> 32);
    }
}

uint64_t disk_open(unsigned slots) {
    static const uint16_t ids[] = {BLK, TRANSITIONAL_BLK};
    struct pci_device device;
    for (bool reported = false; !pci_find(VENDOR, ids, sizeof ids / sizeof *ids, &device);
         reported = true) {
        if (!reported)
            report("waiting for=disk");
        if (microseconds() > DISK_TIMEOUT_US)
            give_up("no virtio disk was found within 10 s");
    }
    volatile uint8_t *notifications, *config, *structure;
    uint32_t multiplier = pci_read32(
        &device, capability(&device, NOTIFICATIONS, &notifications) + CAPABILITY_MULTIPLIER);
    capability(&device, DEVICE_CONFIG, &config);
    capability(&device, COMMON_CONFIG, &structure);
    pci_enable(&device);

    volatile struct common_config *common = (volatile void *)structure;
    common->device_status = 0;
    while (common->device_status)
        ;
    common->device_status = STATUS_ACKNOWLEDGE | STATUS_DRIVER;
    features = negotiate(common);
    if (features & F_ACCESS_PLATFORM)
        iommu_open(&device);

    queue_count = features & F_BLK_MQ ? *(volatile uint16_t *)(config + 34) : 1;
    if (queue_count > MAX_QUEUES)
        queue_count = MAX_QUEUES;
    if (queue_count > slots)
        queue_count = slots;
    for (unsigned index = 0; index < queue_count; index++) {
        struct queue *queue = &queues[index];
        common->queue_select = (uint16_t)index;
        set_up_queue(common, &queue->ring, (slots - index + queue_count - 1) / queue_count);
        queue->doorbell =
            (volatile uint16_t *)(notifications + common->queue_notify_off * multiplier);
        common->queue_enable = 1;
    }
    headers = allocate(slots * sizeof *headers);
    statuses = allocate_aligned(PAGE_BYTES, PAGE_BYTES);
    headers_at = iommu_map(IOMMU_PERMANENT, (uint64_t)headers, slots * sizeof *headers);
    statuses_at = iommu_map(IOMMU_PERMANENT, (uint64_t)statuses, PAGE_BYTES);
    common->device_status |= STATUS_DRIVER_OK;
    return *(volatile uint64_t *)config;
}

// Requests ---------------------------------------------------------------------------------------

static void add(struct piece *pieces, unsigned *count, uint64_t address, uint32_t length,
                uint16_t flags) {
    if (*count == MAX_PIECES)
        give_up("a request has too many pieces");
    pieces[*count] = (struct piece){address, length, flags};
    ++*count;
}

// Describe a slot's request in pieces, with adjacent pages as one piece; return their number.
static unsigned describe(unsigned slot, const struct request *request, struct piece *pieces) {
    uint16_t flags = request->kind == WRITE ? 0 : DESCRIPTOR_WRITE;
    unsigned count = 0;
    headers[slot].type = request->kind == WRITE ? REQUEST_OUT : REQUEST_IN;
    headers[slot].sector = request->sector;
    add(pieces, &count, headers_at + slot * sizeof *headers, sizeof *headers, 0);
    for (uint32_t piece = 0; piece < pieces_of(request); piece++) {
        const uint8_t *address = piece_at(request, piece);
        struct piece *last = &pieces[count - 1];
        bool follows = count > 1 && (uint64_t)address == last->address + last->length;
        if (follows && request->piece_bytes == PAGE_BYTES)
            last->length += request->piece_bytes;
        else
            add(pieces, &count, (uint64_t)address, request->piece_bytes, flags);
    }
    for (unsigned index = 1; index < count; index++)
        pieces[index].address = iommu_map(slot, pieces[index].address, pieces[index].length);
    add(pieces, &count, statuses_at + slot, 1, DESCRIPTOR_WRITE);
    return count;
}

void disk_submit(unsigned slot, const struct request *request) {
    struct piece pieces[MAX_PIECES];
    unsigned count = describe(slot, request, pieces), index = slot % queue_count;
    if (virtqueue_submit(&queues[index].ring, slot / queue_count, pieces, count))
        *queues[index].doorbell = (uint16_t)index;
}

int disk_poll(uint8_t *status) {
    static unsigned turn;
    for (unsigned tried = 0; tried < queue_count; tried++) {
        unsigned index = turn++ % queue_count;
        int place = virtqueue_poll(&queues[index].ring);
        if (place < 0)
            continue;
        unsigned slot = (unsigned)place * queue_count + index;
        *status = statuses[slot];
        iommu_unmap(slot);
        return (int)slot;
    }
    return -1;
}
