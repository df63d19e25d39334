// SPDX-License-Identifier: Apache-2.0
#include "storage.h"

enum {
    FIRST_ID = 0x1040,  // the PCI device ID of a virtio device is this plus its type
    TIMEOUT_US = 10 * 1000 * 1000,
};

// In the order in which devices are preferred.
static const struct storage *const drivers[] = {&virtio_blk, &virtio_scsi, &virtio_net, &virtio_vsock};

static const struct storage *driver;
static struct virtio_device device;

// Find the first device of the first driver that has one.
static bool find_device(void) {
    for (size_t known = 0; known < sizeof drivers / sizeof *drivers; known++) {
        driver = drivers[known];
        const uint16_t ids[] = {(uint16_t)(FIRST_ID + driver->type), driver->transitional_id};
        device = (struct virtio_device){0};
        if (virtio_find(&device, ids, sizeof ids / sizeof *ids))
            return true;
    }
    return false;
}

uint64_t storage_open(unsigned slots) {
    for (bool reported = false; !find_device(); reported = true) {
        if (!reported)
            report("waiting for=disk");
        if (microseconds() > TIMEOUT_US)
            give_up("no virtio disk, SCSI host, network or socket device was found within 10 s");
    }
    virtio_open(&device, driver->features);
    if (device.features & F_ACCESS_PLATFORM)
        iommu_open(&device.pci);
    uint64_t sectors = driver->open(&device, slots);
    uint64_t type = driver->type;  // in hexadecimal; no driver's type has a digit above 9
    report("virtio-00%lu%lu features=%lu", type / 16, type % 16, device.features);
    return sectors;
}

void storage_reset(void) {
    virtio_reset(&device, driver->features);
    driver->reset();
}

void storage_submit(unsigned slot, struct request *request) {
    driver->submit(slot, request);
}

int storage_poll(uint8_t *status) {
    return driver->poll(status);
}

void storage_report(void) {
    if (driver->report)
        driver->report();
}

// For the drivers of disks ------------------------------------------------------------------------

unsigned add_data(unsigned slot, const struct request *request, struct piece *pieces,
                  unsigned count) {
    uint16_t flags = request->kind == WRITE ? 0 : DESCRIPTOR_WRITE;
    unsigned first = count;
    for (uint32_t piece = 0; piece < pieces_of(request); piece++) {
        uint64_t address = (uint64_t)piece_at(request, piece);
        struct piece *last = &pieces[count - 1];
        bool follows = count > first && address == last->address + last->length;
        if (follows && request->piece_bytes == PAGE_BYTES)
            last->length += request->piece_bytes;
        else if (count - first == MAX_PIECES - 2)
            give_up("a request has too many pieces");
        else
            pieces[count++] = (struct piece){address, request->piece_bytes, flags};
    }
    for (unsigned index = first; index < count; index++)
        pieces[index].address = iommu_map(slot, pieces[index].address, pieces[index].length);
    return count;
}

int poll_slots(struct virtio_queue *queues, unsigned count) {
    static unsigned turn;
    for (unsigned tried = 0; tried < count; tried++) {
        unsigned index = turn++ % count;
        int place = virtqueue_poll(&queues[index].ring);
        if (place < 0)
            continue;
        unsigned slot = (unsigned)place * count + index;
        iommu_unmap(slot);
        return (int)slot;
    }
    return -1;
}
