// SPDX-License-Identifier: Apache-2.0
#include "virtqueue.h"

static uint64_t address_for_device(uint64_t features, const volatile void *memory, size_t bytes) {
    uint64_t address = (uint64_t)memory;
    return features & F_ACCESS_PLATFORM ? iommu_map(IOMMU_PERMANENT, address, bytes) : address;
}

struct area_bytes {
    size_t descriptors, driver, device;
};

static struct area_bytes area_bytes_of(const struct virtqueue *queue) {
    const struct ring_form *form = queue->form;
    return (struct area_bytes){
        .descriptors = (size_t)queue->size * DESCRIPTOR_BYTES,
        .driver = form->driver_bytes + form->driver_bytes_each * queue->size,
        .device = form->device_bytes + form->device_bytes_each * queue->size,
    };
}

bool virtqueue_open(struct virtqueue *queue, uint64_t features, uint16_t size, unsigned places,
                    unsigned pieces) {
    const struct ring_form *form = features & F_RING_PACKED ? &packed_ring : &split_ring;
    *queue = (struct virtqueue){
        .form = form,
        .event_index = features & F_RING_EVENT_INDEX,
        .size = size,
        .places = (uint16_t)places,
        .room = (uint16_t)(size / places),
    };
    if (queue->room < (features & F_RING_INDIRECT ? 1 : pieces))
        return false;
    struct area_bytes bytes = area_bytes_of(queue);
    uint8_t *driver_areas = allocate_aligned(bytes.descriptors + bytes.driver, PAGE_BYTES);
    queue->descriptors = driver_areas;
    queue->driver = driver_areas + bytes.descriptors;
    queue->device = allocate_aligned((bytes.device + PAGE_BYTES - 1) & -PAGE_BYTES, PAGE_BYTES);
    queue->tables = allocate(places * sizeof *queue->tables);
    queue->parts[0] = address_for_device(features, driver_areas, bytes.descriptors);
    queue->parts[1] = address_for_device(features, queue->driver, bytes.driver);
    queue->parts[2] = address_for_device(features, queue->device, bytes.device);
    queue->tables_at = address_for_device(features, queue->tables, places * sizeof *queue->tables);
    form->want_no_interrupt(queue);
    return true;
}

void virtqueue_reset(struct virtqueue *queue) {
    struct area_bytes bytes = area_bytes_of(queue);
    __builtin_memset((void *)queue->descriptors, 0, bytes.descriptors + bytes.driver);
    __builtin_memset((void *)queue->device, 0, bytes.device);
    queue->next = queue->seen = 0;
    queue->form->want_no_interrupt(queue);
}

bool virtqueue_submit(struct virtqueue *queue, unsigned place, const struct piece *pieces,
                      unsigned count) {
    struct piece table = {queue->tables_at + place * sizeof *queue->tables,
                          count * DESCRIPTOR_BYTES, DESCRIPTOR_INDIRECT};
    if (count > queue->room) {
        queue->form->fill_table(queue->tables[place], pieces, count);
        pieces = &table;
        count = 1;
    }
    queue->taken[place] = (uint16_t)count;
    return queue->form->publish(queue, (uint16_t)place, pieces, (uint16_t)count);
}

int virtqueue_poll(struct virtqueue *queue) {
    int place = queue->form->collect(queue);
    if (place >= queue->places)
        give_up("the device has finished a request that does not exist");
    return place;
}
