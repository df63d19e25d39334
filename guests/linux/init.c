// SPDX-License-Identifier: Apache-2.0
/*
 * The whole user space of the Linux guest. It carries out the workload (workload.h) on a disk,
 * bypassing the page cache, or on a network that sends everything back, with a thread for each
 * request in flight.
 *
 * A serial port is the line to dmaproof: the guest reads single bytes as commands, and writes lines
 * of key=value.
 *
 * The kernel's pages may have 4, 16 or 64 KiB. The workload's pages are those of the dirty log,
 * PAGE_BYTES each.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mempolicy.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <termios.h>
#include <unistd.h>

#include "../workload.h"
#include "init.h"
#include "loop.h"
#include "network.h"
#include "virtio_features.h"

enum {
    DEVICE_TIMEOUT_US = 10 * 1000 * 1000,
    SPARE_BYTE = 0x5a,
    USE_WRITE_ONCE = 'o',  // commands; see obey
    DECLARE = 'w',
    MOST_NODES = 8,        // as dmaproof prove --numa
    MEMORY_TIMEOUT_US = 10 * 1000 * 1000,
    LOOP_SECTORS = 1 << 24,
};

const uint32_t piece_alignment = SECTOR_BYTES;  // O_DIRECT requires it

static int report_fd = -1, disk_fd = -1;
static uint64_t kernel_page_bytes;
static const char *report_tty;  // the serial port that is the line to dmaproof
static const char *disk;        // the path of its node or file
static const char *shared_tag;  // the tag of the virtiofs with the disk's file, or NULL
static const char *loop;        // a network interface used instead of a disk, or NULL
static const char *echo_port;   // of the UDP server that sends datagrams back, or NULL: all frames
static const char *packets_interface;  // a network interface used beside the disk, or NULL
static const char *spare_pages;  // the number of pages to free during a migration, or NULL
static uint8_t *buffer, *spare;
static size_t spare_bytes;
static uint64_t ram_end;        // the current end of RAM
static uint64_t first_ram_end;  // the end of RAM before any memory was plugged
static atomic_bool paused;
static atomic_int in_flight;

// The functions that the workload needs ----------------------------------------------------------

void report(const char *format, ...) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length >= (int)sizeof line - 1)
        length = sizeof line - 2;
    line[length++] = '\n';
    pthread_mutex_lock(&lock);
    for (int done = 0; done < length;) {
        ssize_t written = write(report_fd >= 0 ? report_fd : 1, line + done, length - done);
        if (written <= 0)
            break;
        done += written;
    }
    pthread_mutex_unlock(&lock);
}

static _Noreturn void power_off(void) {
    if (report_fd >= 0)
        tcdrain(report_fd);
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

void give_up(const char *action, const char *object) {
    report("fatal message=\"cannot %s %s: %s\"", action, object, strerror(errno));
    power_off();
}

uint8_t *page_at(uint64_t page) {
    return buffer + page * PAGE_BYTES;
}

uint64_t gpa_of(const void *address) {
    static int pagemap = -1;
    uint64_t entry = 0;
    if (pagemap < 0)
        pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    off_t position = (uintptr_t)address / kernel_page_bytes * sizeof entry;
    if (pread(pagemap, &entry, sizeof entry, position) != sizeof entry)
        return 0;
    uint64_t frame = entry & ((1ULL << 55) - 1);
    return frame * kernel_page_bytes + (uintptr_t)address % kernel_page_bytes;
}

// The memory is populated at once, so it is not in memory that is plugged later.
void *allocate(size_t bytes) {
    void *memory = calloc(bytes + 1, 1);
    if (!memory || mlock(memory, bytes + 1) < 0)
        give_up("allocate", "the state of the buffer's pages");
    return memory;
}

// Linux moves locked pages only when it compacts memory, which this setting prevents, or when it
// allocates from a CMA area or unplugs memory, which the kernel's command line and the workload do
// not ask for. A kernel without compaction has no such setting.
uint8_t *allocate_unmoving(size_t bytes) {
    FILE *setting = fopen("/proc/sys/vm/compact_unevictable_allowed", "w");
    if (setting) {
        fputs("0", setting);
        fclose(setting);
    }
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static int by_address(const void *left, const void *right) {
    uint64_t first = *(const uint64_t *)left, second = *(const uint64_t *)right;
    return (first > second) - (first < second);
}

// The kernel may write anywhere except to the pages that only the device writes, which are locked
// and do not move.
void report_own_memory(void) {
    uint64_t first, count = device_pages(&first), start = 0;
    uint64_t *pages = allocate(count * sizeof *pages);
    for (uint64_t index = 0; index < count; index++)
        pages[index] = gpa_of(page_at(first + index));
    qsort(pages, count, sizeof *pages, by_address);
    for (uint64_t index = 0; index < count; index++) {
        report_own(start, pages[index]);
        start = pages[index] + PAGE_BYTES;
    }
    report_own(start, ram_end);
}

void pause_requests(bool wanted) {
    atomic_store(&paused, wanted);
    while (wanted && atomic_load(&in_flight))
        usleep(1000);
}

uint64_t requests_under_way(void) {
    return (uint64_t)atomic_load(&in_flight);
}

static void write_to(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        give_up("write to", path);
    close(fd);
}

// Suspend all devices and resume them at once, as the kernel's self-test of suspending does
// (Documentation/power/basic-pm-debugging.rst). A virtio driver resets its device for that, and
// initialises it again (virtio_device_freeze, virtio_device_restore).
void reset_device(void) {
    write_to("/sys/module/suspend/parameters/pm_test_delay", "0");
    write_to("/sys/power/pm_test", "devices");
    write_to("/sys/power/state", "freeze");
}

// The PCI device of the disk, as a path in /sys.
static void find_pci_device(char path[PATH_MAX]) {
    char name[PATH_MAX], subsystem[PATH_MAX];
    snprintf(name, sizeof name, "/sys/class/block/%s", strrchr(disk, '/') + 1);
    if (!realpath(name, path))
        give_up("find", name);
    do {
        *strrchr(path, '/') = '\0';
        snprintf(name, sizeof name, "%.*s/subsystem", PATH_MAX - 16, path);
    } while (*path && !(realpath(name, subsystem) && strcmp(subsystem, "/sys/bus/pci") == 0));
    if (!*path)
        give_up("find the PCI device of", disk);
}

static uint64_t open_disk(void);

void reload_driver(void) {
    char device[PATH_MAX], driver[PATH_MAX], control[PATH_MAX];
    find_pci_device(device);
    snprintf(control, sizeof control, "%.*s/driver", PATH_MAX - 16, device);
    if (!realpath(control, driver))
        give_up("find the driver of", device);
    pause_requests(true);
    close(disk_fd);
    disk_fd = -1;
    snprintf(control, sizeof control, "%.*s/unbind", PATH_MAX - 16, driver);
    write_to(control, strrchr(device, '/') + 1);
    snprintf(control, sizeof control, "%.*s/bind", PATH_MAX - 16, driver);
    write_to(control, strrchr(device, '/') + 1);
    open_disk();
    pause_requests(false);
}

_Noreturn void reset_machine(void) {
    tcdrain(report_fd);
    reboot(RB_AUTOBOOT);
    give_up("reboot", "the machine");
}

// The first address after all RAM.
static uint64_t end_of_ram(void) {
    char line[256];
    uint64_t start, last, end = 0;
    FILE *map = fopen("/proc/iomem", "r");
    if (!map)
        give_up("open", "/proc/iomem");
    while (fgets(line, sizeof line, map))
        if (strstr(line, ": System RAM") && sscanf(line, "%lx-%lx", &start, &last) == 2)
            end = last + 1 > end ? last + 1 : end;
    fclose(map);
    return end;
}

// Map pages again; return the number of pages that are in plugged memory afterwards. The pages
// before `first` and after the last one are in other pages of the kernel.
static uint64_t remap(uint64_t first, uint64_t count) {
    uint64_t moved = 0;
    if (mmap(page_at(first), count * PAGE_BYTES, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED | MAP_FIXED, -1,
             0) == MAP_FAILED)
        give_up("map", "the write-once pages again");
    for (uint64_t page = first; page < first + count; page++)
        moved += gpa_of(page_at(page)) >= first_ram_end;
    return moved;
}

// The kernel lists plugged memory in /proc/iomem, and a moment later brings it online in
// ZONE_MOVABLE (memhp_default_state). It takes the pages of a new mapping from there first, from
// any of several DIMMs.
uint64_t move_to_new_memory(uint64_t first, uint64_t count) {
    for (int waited = 0; waited <= MEMORY_TIMEOUT_US; waited += 1000, usleep(1000)) {
        uint64_t end = end_of_ram();
        uint64_t moved = end > ram_end ? remap(first, count) : 0;
        if (moved) {
            ram_end = end;
            return moved;
        }
    }
    return 0;
}

// Threads ----------------------------------------------------------------------------------------

static uint64_t transfer(const struct request *request) {
    struct iovec pieces[HUGE_PAGES];
    int count = (int)pieces_of(request);
    for (int index = 0; index < count; index++)
        pieces[index] = (struct iovec){piece_at(request, index), request->piece_bytes};
    off_t position = (off_t)request->sector * SECTOR_BYTES;
    ssize_t done = request->kind == WRITE ? pwritev(disk_fd, pieces, count, position)
                                          : preadv(disk_fd, pieces, count, position);
    return done < 0 ? errno : done;
}

static void *work(void *argument) {
    struct worker worker = new_worker((uintptr_t)argument);
    struct request request;
    uintptr_t thread = (uintptr_t)argument;
    int loop_fd = loop ? loop_open(thread) : -1;
    for (;;) {
        atomic_fetch_add(&in_flight, 1);
        if (!atomic_load(&paused) && plan_request(&worker, &request))
            finish_request(&request, loop ? loop_transfer(loop_fd, &request)
                                          : transfer(&request));
        atomic_fetch_sub(&in_flight, 1);
        while (atomic_load(&paused))
            usleep(1000);
    }
    return NULL;
}

// A vCPU's own continuous writing, which the accelerator must track.
static void *keep_churning(void *argument) {
    for (;; usleep(CHURN_EVERY_US))
        churn();
    return argument;
}

// Fill memory that the guest frees when QEMU has sent it, or when the guest declares its own pages.
static void fill_spare(void) {
    size_t bytes = spare_pages ? strtoul(spare_pages, NULL, 10) * PAGE_BYTES : 0;
    if (!bytes)
        return;
    spare = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (spare == MAP_FAILED)
        give_up("map", "the memory that is freed");
    memset(spare, SPARE_BYTE, bytes);
    spare_bytes = bytes;
}

static void free_spare(void) {
    if (spare_bytes)
        munmap(spare, spare_bytes);
    spare_bytes = 0;
}

static void *take_commands(void *argument) {
    char command;
    while (read(report_fd, &command, 1) == 1) {
        if (command == USE_WRITE_ONCE || command == DECLARE)
            free_spare();
        obey(command);
    }
    return argument;
}

static void start_thread(void *(*body)(void *), uintptr_t number) {
    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, body, (void *)number)))
        give_up("start", "a thread");
}

// Setting up -------------------------------------------------------------------------------------

static void open_report(void) {
    struct termios settings;
    report_fd = report_tty ? open(report_tty, O_RDWR | O_NOCTTY | O_CLOEXEC) : -1;
    if (report_fd < 0 || tcgetattr(report_fd, &settings) < 0)
        give_up("open the line to dmaproof", report_tty ? report_tty : "report=");
    cfmakeraw(&settings);
    cfsetspeed(&settings, B115200);
    settings.c_cflag |= CLOCAL;
    tcsetattr(report_fd, TCSANOW, &settings);
}

static void load_modules(void) {
    char name[256];
    FILE *list = fopen("/modules/order", "r");
    if (!list)
        give_up("open", "/modules/order");
    while (fscanf(list, "%255s", name) == 1) {
        int fd = open(name, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            give_up("load the module", name);
        close(fd);
    }
    fclose(list);
}

static uint64_t open_disk(void) {
    mkdir("/shared", 0755);
    if (shared_tag && mount(shared_tag, "/shared", "virtiofs", 0, NULL) < 0)
        give_up("mount the virtiofs", shared_tag);
    for (int waited = 0; disk_fd < 0; waited += 1000, usleep(1000)) {
        disk_fd = open(disk, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (disk_fd < 0 && waited == 0)
            report("waiting for=disk");
        if (disk_fd < 0 && waited > DEVICE_TIMEOUT_US)
            give_up("open the disk", disk);
    }
    off_t bytes = lseek(disk_fd, 0, SEEK_END);
    if (bytes < 0)
        give_up("get the size of the disk", disk);
    return (uint64_t)bytes / SECTOR_BYTES;
}

// Take the pages of new mappings from all NUMA nodes in turn. A kernel without NUMA refuses this.
static void use_all_nodes(bool wanted) {
    unsigned long nodes = wanted ? (1ul << MOST_NODES) - 1 : 0;
    syscall(SYS_set_mempolicy, wanted ? MPOL_INTERLEAVE : MPOL_DEFAULT, &nodes, MOST_NODES + 1ul);
}

static void map_buffer(void) {
    uint64_t pages = buffer_pages();
    uint64_t free_bytes = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * kernel_page_bytes;
    uint64_t available = free_bytes / 8 * 7 / PAGE_BYTES;
    if (pages > available) {
        report("fatal message=\"the workload needs %lu pages, but only %lu are free; give the "
               "guest more memory\"",
               pages, available);
        power_off();
    }
    use_all_nodes(true);
    buffer = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    use_all_nodes(false);
    if (buffer == MAP_FAILED)
        give_up("map", "the buffer");
    mlock(buffer, pages * PAGE_BYTES);
}

static void report_status(void) {
    report_progress();
    report_network();
    if (loop)
        report_loop();
}

static bool read_option(const char *argument) {
    static const struct {
        const char *name, **value;
    } options[] = {
        {"report=", &report_tty}, {"disk=", &disk},      {"shared=", &shared_tag},
        {"loop=", &loop},         {"echo=", &echo_port}, {"spare=", &spare_pages},
        {"packets=", &packets_interface},
    };
    for (size_t known = 0; known < sizeof options / sizeof *options; known++) {
        size_t length = strlen(options[known].name);
        if (strncmp(argument, options[known].name, length) == 0) {
            *options[known].value = argument + length;
            return true;
        }
    }
    return false;
}

// Read the options after "--" on the kernel's command line. The kernel also passes options that it
// does not know: those with a "=" in init's environment, the others among the arguments.
static void read_parameters(int count, char **arguments) {
    for (int index = 1; index < count; index++)
        read_option(arguments[index]);
    open_report();  // from here on, dmaproof reads what is wrong
    report_boot();
    for (int index = 1; index < count; index++) {
        const char *argument = arguments[index];
        if (strchr(argument, '=') && !read_option(argument) && !read_parameter(argument)) {
            errno = EINVAL;
            give_up("use the parameter", argument);
        }
    }
}

int main(int count, char **arguments) {
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    kernel_page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    read_parameters(count, arguments);
    load_modules();
    if (loop)
        loop_start(loop, echo_port);
    uint64_t sectors = loop ? LOOP_SECTORS : open_disk();
    map_buffer();
    fill_spare();
    ram_end = first_ram_end = end_of_ram();
    const char *problem = prepare_workload(sectors);
    if (problem) {
        report("fatal message=\"%s\"", problem);
        power_off();
    }
    if (packets_interface && !start_network(packets_interface))
        give_up("start the network", packets_interface);
    start_thread(take_commands, 0);
    start_thread(keep_churning, 0);
    for (uintptr_t number = 0; number < parameters.threads; number++)
        start_thread(work, number);
    for (int waited = 0; requests_finished() == 0; waited += 1000, usleep(1000))
        if (waited % REPORT_EVERY_US == 0)
            report_status();
    report_virtio_features();
    report_ready();
    for (;; usleep(REPORT_EVERY_US))
        report_status();
}
