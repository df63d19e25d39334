// SPDX-License-Identifier: Apache-2.0
/*
 * A recorder between the kernel's vhost devices and QEMU, loaded into QEMU (LD_PRELOAD, or the
 * loader's --preload).
 *
 * QEMU gives the kernel the address of its dirty log (VHOST_SET_LOG_BASE), and the kernel sets bits
 * there. The recorder gives the kernel a log of its own instead, and hands the bits on to QEMU's log.
 * So it sees each page that the kernel logs, and can withhold pages from QEMU.
 *
 * The bits are handed on all the time by a thread, and completely before any vhost ioctl returns to
 * QEMU. That includes those after which a bit would be too late: the ioctls that stop a ring, and
 * those that replace or remove QEMU's log, which QEMU reads for the last time after them. To QEMU
 * the recorder is a kernel that takes somewhat longer to set a bit.
 *
 * The kernel logs only between these ioctls. So the thread never writes to a log that QEMU has freed,
 * because after a device has stopped it finds no bits, and `mutex` ends its pass before.
 *
 * It is linked without a libc and uses that of QEMU, which may be another version than the
 * compiler's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vhost.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../workload.h"
#include "recorder.h"

enum {
    MOST_DEVICES = 64,
    PASS_EVERY_NS = 2 * 1000 * 1000,
    WORD_PAGES = 64,
};

struct device {
    int fd;
    bool in_use;
    uint64_t words;     // the size of the log that covers the device's memory table
    uint64_t *kernels;  // the log that the kernel writes
    uint64_t *qemus;    // the log that QEMU reads; NULL if the device does not log
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct device devices[MOST_DEVICES];
static struct recorder_header *header;  // NULL: the recorder does nothing
static uint64_t words;                 // of each bitmap
static uint64_t *logged, *withheld;

__attribute__((constructor)) static void open_file(void) {
    const char *path = getenv("DMAPROOF_VHOST_RECORDER");
    struct stat status;
    int file = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    if (file < 0)
        return;
    if (fstat(file, &status) == 0 && status.st_size > RECORDER_HEADER_BYTES) {
        char *start = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (start != MAP_FAILED) {
            header = (struct recorder_header *)start;
            words = ((uint64_t)status.st_size - RECORDER_HEADER_BYTES) / 2 / sizeof(uint64_t);
            logged = (uint64_t *)(start + RECORDER_HEADER_BYTES);
            withheld = logged + words;
            header->is_loaded = 1;
        }
    }
    close(file);
}

/* Return those of the `bits` of a word whose pages are withheld: the only place of that decision. */
static uint64_t withheld_bits(uint64_t index, uint64_t bits) {
    uint64_t found = 0;
    for (uint64_t bit = 0; header->share && bit < WORD_PAGES; bit++) {
        uint64_t page = index * WORD_PAGES + bit;
        uint64_t draw = splitmix64_mix(header->seed + (page + 1) * SPLITMIX64_STEP);
        if (draw <= header->share)
            found |= bits & 1ull << bit;
    }
    return found;
}

static void hand_on(struct device *device) {
    if (device->qemus == NULL)
        return;
    for (uint64_t index = 0; index < device->words; index++) {
        if (__atomic_load_n(&device->kernels[index], __ATOMIC_RELAXED) == 0)
            continue;
        uint64_t bits = __atomic_exchange_n(&device->kernels[index], 0, __ATOMIC_SEQ_CST);
        uint64_t kept = withheld_bits(index, bits);
        logged[index] |= bits;
        withheld[index] |= kept;
        __atomic_fetch_or(&device->qemus[index], bits & ~kept, __ATOMIC_SEQ_CST);
    }
}

static void *hand_on_for_ever(void *unused) {
    const struct timespec pause = {.tv_nsec = PASS_EVERY_NS};
    for (;;) {
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&mutex);
        for (int number = 0; number < MOST_DEVICES; number++)
            if (devices[number].in_use)
                hand_on(&devices[number]);
        pthread_mutex_unlock(&mutex);
    }
    return unused;
}

static struct device *device_of(int fd, bool make) {
    struct device *unused = NULL;
    for (int number = MOST_DEVICES; number-- > 0;) {
        if (devices[number].in_use && devices[number].fd == fd)
            return &devices[number];
        if (!devices[number].in_use)
            unused = &devices[number];
    }
    if (make && unused != NULL)
        *unused = (struct device){.fd = fd, .in_use = true, .kernels = unused->kernels};
    return make ? unused : NULL;
}

static uint64_t words_of(const struct vhost_memory *memory) {
    uint64_t end = 0;
    for (uint32_t number = 0; number < memory->nregions; number++) {
        const struct vhost_memory_region *region = &memory->regions[number];
        if (region->guest_phys_addr + region->memory_size > end)
            end = region->guest_phys_addr + region->memory_size;
    }
    uint64_t word_bytes = (uint64_t)LOG_PAGE_BYTES * WORD_PAGES;
    return end / word_bytes + (end % word_bytes != 0);
}

static bool start(struct device *device) {
    static bool is_running;
    if (device->words > words) {
        header->too_large = 1;
        return false;
    }
    if (device->kernels == NULL) {
        void *log = mmap(NULL, words * sizeof(uint64_t), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (log == MAP_FAILED)
            return false;
        device->kernels = log;
    }
    pthread_t thread;
    is_running = is_running || pthread_create(&thread, NULL, hand_on_for_ever, NULL) == 0;
    return is_running;
}

/* Make a vhost ioctl, and hand on what the kernel has logged by its end. */
static int vhost_ioctl(int fd, unsigned long request, void *argument) {
    pthread_mutex_lock(&mutex);
    bool begins = request == VHOST_SET_OWNER;
    struct device *device = device_of(fd, begins);
    uint64_t *new_log = NULL, own_log;
    if (device != NULL && begins)
        device->qemus = NULL;
    if (device != NULL && request == VHOST_SET_LOG_BASE && start(device)) {
        new_log = (uint64_t *)(uintptr_t) * (uint64_t *)argument;
        own_log = (uint64_t)(uintptr_t)device->kernels;
        argument = &own_log;
    }
    int result = (int)syscall(SYS_ioctl, fd, request, argument);
    int error = errno;
    if (device != NULL) {
        hand_on(device);
        if (result >= 0 && new_log != NULL) {
            device->qemus = new_log;
            header->logs++;
        } else if (request == VHOST_SET_MEM_TABLE) {
            // The log may shrink only with a new SET_LOG_BASE; QEMU sets that after the table.
            device->words = words_of(argument);
        } else if (request == VHOST_SET_FEATURES &&
                   !(*(uint64_t *)argument & 1ull << VHOST_F_LOG_ALL)) {
            device->qemus = NULL;
        }
    }
    pthread_mutex_unlock(&mutex);
    errno = error;
    return result;
}

int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (header != NULL && _IOC_TYPE(request) == VHOST_VIRTIO)
        return vhost_ioctl(fd, request, argument);
    return (int)syscall(SYS_ioctl, fd, request, argument);
}
