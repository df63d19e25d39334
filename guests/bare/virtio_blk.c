// SPDX-License-Identifier: Apache-2.0
/*
 * A virtio block driver over the modern PCI transport (virtio 1.2, sections 4.1, 2.7 and 5.2),
 * polled. Every slot has descriptors of its own in its queue's table, and a table for an indirect
 * descriptor, which it uses for what does not fit into the former.
 *
 * Used rings and status bytes are on pages of their own, which only the device writes: if it does
 * not report these writes, nothing else hides that.
 */
#include "machine.h"

#include <stdatomic.h>

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

    DISK_PATIENCE_US = 10 * 1000 * 1000,
    MAX_QUEUES = 16,
    MAX_QUEUE_SIZE = 128,
    MAX_DESCRIPTORS = MAX_SMALL_PAGES + 2,  // more pieces than these are in a row

    DESCRIPTOR_NEXT = 1,
    DESCRIPTOR_WRITE = 2,
    DESCRIPTOR_INDIRECT = 4,
    NO_INTERRUPT = 1,
    NO_NOTIFY = 1,

    REQUEST_IN = 0,
    REQUEST_OUT = 1,
};

static const uint64_t F_BLK_MQ = 1ull << 12;
static const uint64_t F_INDIRECT = 1ull << 28;
static const uint64_t F_EVENT_INDEX = 1ull << 29;
static const uint64_t F_VERSION_1 = 1ull << 32;

struct common_config {
    uint32_t device_feature_select, device_feature, driver_feature_select, driver_feature;
    uint16_t config_vector, num_queues;
    uint8_t device_status, config_generation;
    uint16_t queue_select, queue_size, queue_vector, queue_enable, queue_notify_off;
    uint32_t queue_parts[3][2];  // descriptors, driver, device: low and high half
};

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};
struct available {
    uint16_t flags, index, ring[];  // behind the ring: used_event
};
struct used {
    uint16_t flags, index;
    struct {
        uint32_t id, length;
    } ring[];  // behind it: avail_event, the index that a kick is wanted for
};

struct slot {
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header;
    struct descriptor table[MAX_DESCRIPTORS];
};

static struct queue {
    uint16_t size, room;  // descriptors in all, and for each slot
    uint16_t published, seen;
    struct descriptor *descriptors;
    volatile struct available *available;
    volatile struct used *used;
    const volatile uint16_t *kick_wanted_at;  // avail_event
    volatile uint16_t *doorbell;
} queues[MAX_QUEUES];

static unsigned slot_count, queue_count;
static uint64_t features;
static struct slot *slots;
static volatile uint8_t *statuses;

// Finding the device -----------------------------------------------------------------------------

// The capability of `type`, and what it points to.
static unsigned capability(const struct pci_device *device, uint8_t type,
                           volatile uint8_t **structure) {
    unsigned offset = 0;
    while ((offset = pci_capability(device, VENDOR_CAPABILITY, offset)))
        if (pci_read8(device, offset + CAPABILITY_TYPE) == type)
            break;
    if (!offset)
        give_up("the disk is no modern virtio device");
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
    uint64_t wanted = offered & (F_BLK_MQ | F_INDIRECT | F_EVENT_INDEX | F_VERSION_1);
    for (uint32_t half = 0; half < 2; half++) {
        common->driver_feature_select = half;
        common->driver_feature = (uint32_t)(wanted >> 32 * half);
    }
    common->device_status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
    if (!(wanted & F_VERSION_1) || !(common->device_status & STATUS_FEATURES_OK))
        give_up("the disk and its driver do not agree on features");
    return wanted;
}

static void set_up_queue(volatile struct common_config *common, struct queue *queue,
                         unsigned slots_here) {
    queue->size = common->queue_size < MAX_QUEUE_SIZE ? common->queue_size : MAX_QUEUE_SIZE;
    queue->room = (uint16_t)(queue->size / slots_here);
    if (queue->room < (features & F_INDIRECT ? 1 : MAX_DESCRIPTORS))
        give_up("the disk's queues are too small for so many threads");
    size_t descriptors_bytes = queue->size * sizeof(struct descriptor);
    uint8_t *drivers = allocate_aligned(descriptors_bytes + 6 + 2 * queue->size, PAGE_BYTES);
    queue->descriptors = (void *)drivers;
    queue->available = (void *)(drivers + descriptors_bytes);
    queue->used = allocate_aligned((6 + 8 * queue->size + PAGE_BYTES - 1) & -PAGE_BYTES, PAGE_BYTES);
    queue->kick_wanted_at = (volatile void *)&queue->used->ring[queue->size];
    queue->available->flags = NO_INTERRUPT;
    const volatile void *parts[] = {queue->descriptors, queue->available, queue->used};
    common->queue_size = queue->size;
    for (unsigned part = 0; part < 3; part++) {
        common->queue_parts[part][0] = (uint32_t)(uint64_t)parts[part];
        common->queue_parts[part][1] = (uint32_t)((uint64_t)parts[part] >> 32);
    }
}

uint64_t disk_open(unsigned wanted_slots) {
    slot_count = wanted_slots;
    static const uint16_t ids[] = {BLK, TRANSITIONAL_BLK};
    struct pci_device device;
    for (bool told = false; !pci_find(VENDOR, ids, sizeof ids / sizeof *ids, &device); told = true) {
        if (!told)
            tell("waiting for=disk");
        if (microseconds() > DISK_PATIENCE_US)
            give_up("there is no virtio disk");
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

    queue_count = features & F_BLK_MQ ? *(volatile uint16_t *)(config + 34) : 1;
    if (queue_count > MAX_QUEUES)
        queue_count = MAX_QUEUES;
    if (queue_count > slot_count)
        queue_count = slot_count;
    for (unsigned index = 0; index < queue_count; index++) {
        struct queue *queue = &queues[index];
        common->queue_select = (uint16_t)index;
        set_up_queue(common, queue, (slot_count + queue_count - 1) / queue_count);
        queue->doorbell =
            (volatile uint16_t *)(notifications + common->queue_notify_off * multiplier);
        common->queue_enable = 1;
    }
    slots = allocate(slot_count * sizeof *slots);
    statuses = allocate_aligned(PAGE_BYTES, PAGE_BYTES);
    common->device_status |= STATUS_DRIVER_OK;
    return *(volatile uint64_t *)config;
}

// Requests ---------------------------------------------------------------------------------------

static void add(struct descriptor *table, unsigned *count, const volatile void *address,
                uint32_t length, uint16_t flags) {
    if (*count == MAX_DESCRIPTORS)
        give_up("a request is in too many pieces");
    table[*count] = (struct descriptor){(uint64_t)address, length, flags, 0};
    ++*count;
}

// Describe a request, pages that follow each other in memory as one; returns the descriptors' count.
static unsigned describe(struct slot *slot, volatile uint8_t *status,
                         const struct request *request) {
    struct descriptor *table = slot->table;
    uint16_t flags = request->kind == WRITE ? 0 : DESCRIPTOR_WRITE;
    unsigned count = 0;
    slot->header.type = request->kind == WRITE ? REQUEST_OUT : REQUEST_IN;
    slot->header.sector = request->sector;
    add(table, &count, &slot->header, sizeof slot->header, 0);
    for (uint32_t piece = 0; piece < pieces_of(request); piece++) {
        const uint8_t *address = piece_at(request, piece);
        struct descriptor *last = &table[count - 1];
        bool follows = count > 1 && (uint64_t)address == last->address + last->length;
        if (follows && request->piece_bytes == PAGE_BYTES)
            last->length += request->piece_bytes;
        else
            add(table, &count, address, request->piece_bytes, flags);
    }
    add(table, &count, status, 1, DESCRIPTOR_WRITE);
    return count;
}

static void publish(struct queue *queue, uint16_t head) {
    uint16_t before = queue->published++;
    queue->available->ring[before % queue->size] = head;
    atomic_thread_fence(memory_order_release);
    queue->available->index = queue->published;
    atomic_thread_fence(memory_order_seq_cst);  // section 2.7.13.4.1: before the device is asked
    bool kick = !(queue->used->flags & NO_NOTIFY);
    if (features & F_EVENT_INDEX) {
        uint16_t passed = (uint16_t)(queue->published - *queue->kick_wanted_at - 1);
        kick = passed < (uint16_t)(queue->published - before);
    }
    if (kick)
        *queue->doorbell = (uint16_t)(queue - queues);
}

void disk_submit(unsigned number, const struct request *request) {
    struct queue *queue = &queues[number % queue_count];
    struct slot *slot = &slots[number];
    uint16_t head = (uint16_t)(number / queue_count * queue->room);
    unsigned count = describe(slot, &statuses[number], request);
    bool direct = count <= queue->room;
    struct descriptor *table = direct ? &queue->descriptors[head] : slot->table;
    for (unsigned index = 0; index < count; index++) {
        table[index] = slot->table[index];
        if (index + 1 < count) {
            table[index].flags |= DESCRIPTOR_NEXT;
            table[index].next = (uint16_t)((direct ? head : 0) + index + 1);
        }
    }
    if (!direct)
        queue->descriptors[head] = (struct descriptor){
            (uint64_t)table, count * (uint32_t)sizeof *table, DESCRIPTOR_INDIRECT, 0};
    publish(queue, head);
}

int disk_poll(uint8_t *status) {
    static unsigned turn;
    for (unsigned tried = 0; tried < queue_count; tried++) {
        unsigned index = turn++ % queue_count;
        struct queue *queue = &queues[index];
        if (queue->used->index == queue->seen)
            continue;
        atomic_thread_fence(memory_order_acquire);
        unsigned head = queue->used->ring[queue->seen++ % queue->size].id;
        // The event index is kept far ahead, so that no interrupt comes.
        queue->available->ring[queue->size] = queue->seen + 0x8000;
        unsigned number = head / queue->room * queue_count + index;
        if (number >= slot_count)
            give_up("the disk has finished a request that there is not");
        *status = statuses[number];
        return (int)number;
    }
    return -1;
}
