// SPDX-License-Identifier: Apache-2.0
#include "storage.h"

enum {
    FIRST_ID = 0x1040,  // the PCI device ID of a virtio device is this plus its type
    TIMEOUT_US = 10 * 1000 * 1000,
};

// In the order in which devices are preferred.
static const struct storage *const drivers[] = {&virtio_blk, &virtio_net};

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
            give_up("no virtio disk or network was found within 10 s");
    }
    virtio_open(&device, driver->features);
    if (device.features & F_ACCESS_PLATFORM)
        iommu_open(&device.pci);
    uint64_t sectors = driver->open(&device, slots);
    report("virtio-000%lu features=%lu", (uint64_t)driver->type, device.features);
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
