// SPDX-License-Identifier: Apache-2.0
/*
 * The whole user space of the Linux guest: reads the disk into random pages, checks all that comes
 * back, and tells what it sees.
 *
 * Every page of the disk is stamped by the device (docs/guests.md): a page is known from its LBA
 * and request number, every word of it. Request numbers rise with each request that the device
 * serves, so whatever a read brings must be newer than anything seen when it was asked for. A page
 * that the device wrote and the migration lost holds an older stamp, and cannot pass.
 *
 * The buffer has two regions. The hot pages are read into again and again. The once pages are each
 * read into a single time, after the tool has asked for it: a dirty bit that is lost there is never
 * made good by a later write. Beside the device, a vCPU keeps dirtying the churn pages.
 *
 * The second serial port is the line to the tool: single bytes in, lines of key=value out.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

enum {
    PAGE_BYTES = 4096,
    PAGE_WORDS = PAGE_BYTES / 8,
    SECTORS_PER_PAGE = PAGE_BYTES / 512,
    MAX_THREADS = 64,
    MAX_SEGMENTS = 16,
    WRITE_BLOCKS = 256,
    ERRORS_TOLD = 64,
    REPORT_EVERY_US = 100 * 1000,
    CHURN_EVERY_US = 5 * 1000,
    DISK_PATIENCE_US = 10 * 1000 * 1000,
};

static const uint64_t DEVICE_MAGIC = 0x464F4F5250414D44;  // "DMAPROOF"
static const uint64_t GUEST_MAGIC = 0x46544E4554495257;   // "WRITENTF"

// Parameters, given as key=value behind the kernel's "--".
static struct parameter {
    const char *name;
    uint64_t value;
} parameters[] = {
    {"threads", 4}, {"hot", 1024},      {"once", 8192},   {"churn", 4096},
    {"seed", 1},    {"write_every", 16}, {"max_pages", 8},
};
enum { THREADS, HOT, ONCE, CHURN, SEED, WRITE_EVERY, MAX_PAGES };
#define PARAMETER(name) (parameters[name].value)

struct page_state {
    atomic_flag busy;
    uint64_t lba, request;  // of the last content that was found right; request 0: none yet
};

static int report_fd = -1, disk_fd = -1;
static uint64_t disk_pages;
static uint8_t *buffer;  // hot pages, then once pages
static struct page_state *states;
static uint32_t *once_order;
static volatile uint64_t *churn_words;
static uint64_t churn_rounds;
static pthread_mutex_t churn_lock = PTHREAD_MUTEX_INITIALIZER;

static atomic_ullong requests, writes, once_used, errors, newest;
static atomic_bool once_wanted, paused, quiet;
static atomic_int in_flight;

static struct {
    pthread_mutex_t lock;
    uint64_t counter;  // of the last write; 0: never written
} blocks[WRITE_BLOCKS];

// Telling ----------------------------------------------------------------------------------------

static void tell(const char *format, ...) {
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

static void give_up(const char *what) {
    tell("fatal message=\"%s: %s\"", what, strerror(errno));
    if (report_fd >= 0)
        tcdrain(report_fd);
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

static void tell_progress(void) {
    tell("progress requests=%llu writes=%llu once=%llu errors=%llu", atomic_load(&requests),
         atomic_load(&writes), atomic_load(&once_used), atomic_load(&errors));
}

static uint64_t gpa_of(const void *address) {
    static int pagemap = -1;
    uint64_t entry = 0;
    if (pagemap < 0)
        pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    off_t position = (uintptr_t)address / PAGE_BYTES * sizeof entry;
    if (pread(pagemap, &entry, sizeof entry, position) != sizeof entry)
        return 0;
    return (entry & ((1ULL << 55) - 1)) * PAGE_BYTES;
}

static void tell_error(const char *kind, uint64_t lba, uint64_t request, uint64_t expected,
                       uint64_t found, const void *page) {
    if (atomic_fetch_add(&errors, 1) < ERRORS_TOLD)
        tell("error kind=%s lba=%llu request=%llu expected=%#llx found=%#llx gpa=%#llx", kind,
             (unsigned long long)lba, (unsigned long long)request, (unsigned long long)expected,
             (unsigned long long)found, (unsigned long long)gpa_of(page));
}

// Stamps -----------------------------------------------------------------------------------------

static uint64_t splitmix64(uint64_t value) {
    value += 0x9E3779B97F4A7C15;
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9;
    value = (value ^ value >> 27) * 0x94D049BB133111EB;
    return value ^ value >> 31;
}

static uint64_t random_below(uint64_t *state, uint64_t bound) {
    *state += 0x9E3779B97F4A7C15;
    return (uint64_t)(((unsigned __int128)splitmix64(*state) * bound) >> 64);
}

static uint64_t checksum(uint64_t lba, uint64_t number) {
    return splitmix64(lba ^ (number << 32 | number >> 32));
}

static void fill(uint64_t *words, uint64_t magic, uint64_t lba, uint64_t number) {
    uint64_t first = checksum(lba, number);
    for (int index = 0; index < PAGE_WORDS; index++)
        words[index] = first + index;
    words[0] = magic;
    words[1] = lba;
    words[2] = number;
}

// Whether a page holds just the stamp (magic, lba, number); tells the first word that does not.
static bool check(const char *kind, const uint64_t *words, uint64_t magic, uint64_t lba,
                  uint64_t number) {
    uint64_t first = checksum(lba, number), head[] = {magic, lba, number};
    for (int index = 0; index < PAGE_WORDS; index++) {
        uint64_t expected = index < 3 ? head[index] : first + index;
        if (words[index] != expected) {
            tell_error(kind, lba, number, expected, words[index], words);
            return false;
        }
    }
    return true;
}

// Requests ---------------------------------------------------------------------------------------

static uint64_t *page_at(uint64_t page) {
    return (uint64_t *)(buffer + page * PAGE_BYTES);
}

static void advance_newest(uint64_t request) {
    unsigned long long seen = atomic_load(&newest);
    while (seen < request && !atomic_compare_exchange_weak(&newest, &seen, request))
        ;
}

// Read `count` disk pages from page `first` on into the given buffer pages, and check them.
static void read_pages(uint64_t first, const uint32_t *pages, int count) {
    struct iovec segments[MAX_SEGMENTS];
    for (int index = 0; index < count; index++)
        segments[index] = (struct iovec){page_at(pages[index]), PAGE_BYTES};
    uint64_t newest_before = atomic_load(&newest);
    ssize_t done = preadv(disk_fd, segments, count, first * PAGE_BYTES);
    if (done != (ssize_t)count * PAGE_BYTES) {
        tell_error("io", first * SECTORS_PER_PAGE, 0, (uint64_t)count * PAGE_BYTES,
                   done < 0 ? (uint64_t)errno : (uint64_t)done, segments[0].iov_base);
        return;
    }
    for (int index = 0; index < count; index++) {
        uint64_t *words = page_at(pages[index]), lba = (first + index) * SECTORS_PER_PAGE;
        uint64_t request = words[2];
        struct page_state *state = &states[pages[index]];
        if (!check("stamp", words, DEVICE_MAGIC, lba, request)) {
            state->request = 0;
            continue;
        }
        if (request <= newest_before)
            tell_error("stale", lba, request, newest_before + 1, request, words);
        state->lba = lba;
        state->request = request;
        advance_newest(request);
    }
}

// Take `count` free hot pages, in a row or scattered.
static int take_hot(uint64_t *state, uint32_t *pages, int count, bool in_a_row) {
    int taken = 0;
    uint64_t next = random_below(state, PARAMETER(HOT));
    for (int tries = 0; taken < count && tries < 4 * count; tries++) {
        uint32_t page = next % PARAMETER(HOT);
        next = in_a_row ? next + 1 : random_below(state, PARAMETER(HOT));
        if (!atomic_flag_test_and_set(&states[page].busy))
            pages[taken++] = page;
        else if (in_a_row && taken)
            break;
    }
    return taken;
}

static int take_once(uint32_t *pages, int count) {
    int taken = 0;
    while (taken < count) {
        unsigned long long position = atomic_fetch_add(&once_used, 1);
        if (position >= PARAMETER(ONCE)) {
            atomic_fetch_sub(&once_used, 1);
            break;
        }
        pages[taken++] = once_order[position];
    }
    return taken;
}

// Write a block of our own, or read one back and check that it holds what was written last.
static void use_block(uint64_t *state, uint64_t *page) {
    uint64_t index = random_below(state, WRITE_BLOCKS);
    uint64_t position = disk_pages - WRITE_BLOCKS + index, lba = position * SECTORS_PER_PAGE;
    pthread_mutex_lock(&blocks[index].lock);
    uint64_t counter = blocks[index].counter;
    if (counter == 0 || random_below(state, 2)) {
        fill(page, GUEST_MAGIC, lba, counter + 1);
        if (pwrite(disk_fd, page, PAGE_BYTES, position * PAGE_BYTES) == PAGE_BYTES)
            blocks[index].counter = counter + 1;
        else
            tell_error("io", lba, counter, PAGE_BYTES, errno, page);
        atomic_fetch_add(&writes, 1);
    } else if (pread(disk_fd, page, PAGE_BYTES, position * PAGE_BYTES) == PAGE_BYTES) {
        check("writeback", page, GUEST_MAGIC, lba, counter);
    } else {
        tell_error("io", lba, counter, PAGE_BYTES, errno, page);
    }
    pthread_mutex_unlock(&blocks[index].lock);
}

static void one_request(uint64_t *state, uint64_t *own_page) {
    if (PARAMETER(WRITE_EVERY) && random_below(state, PARAMETER(WRITE_EVERY)) == 0) {
        use_block(state, own_page);
        return;
    }
    uint32_t pages[MAX_SEGMENTS];
    int count = 1, taken = 0;
    bool hot = !atomic_load(&once_wanted) || random_below(state, 4) == 0;
    if (random_below(state, 4) == 0)
        count += random_below(state, PARAMETER(MAX_PAGES));
    if (!hot)
        taken = take_once(pages, count);
    if (taken == 0) {
        hot = true;
        taken = take_hot(state, pages, count, random_below(state, 2));
    }
    if (taken == 0)
        return;
    // The last eighth of the disk is not read at random: there the blocks are written.
    read_pages(random_below(state, disk_pages / 8 * 7 - taken), pages, taken);
    for (int index = 0; hot && index < taken; index++)
        atomic_flag_clear(&states[pages[index]].busy);
}

static void *map_pages(uint64_t count) {
    void *memory = mmap(NULL, count * PAGE_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        give_up("mapping the buffer");
    mlock(memory, count * PAGE_BYTES);
    return memory;
}

static void *work(void *argument) {
    uint64_t state = splitmix64(PARAMETER(SEED) * MAX_THREADS + (uintptr_t)argument);
    uint64_t *own_page = map_pages(1);
    for (;;) {
        atomic_fetch_add(&in_flight, 1);
        if (!atomic_load(&paused)) {
            one_request(&state, own_page);
            atomic_fetch_add(&requests, 1);
        }
        atomic_fetch_sub(&in_flight, 1);
        while (atomic_load(&paused))
            usleep(1000);
    }
    return NULL;
}

// A vCPU's own steady writing, which the accelerator has to track.
static void *churn(void *argument) {
    for (;; usleep(CHURN_EVERY_US)) {
        if (atomic_load(&quiet))
            continue;
        pthread_mutex_lock(&churn_lock);
        churn_rounds++;
        for (uint64_t page = 0; page < PARAMETER(CHURN); page++)
            churn_words[page * PAGE_WORDS] = churn_rounds;
        pthread_mutex_unlock(&churn_lock);
    }
    return argument;
}

// Commands ---------------------------------------------------------------------------------------

static void pause_requests(bool wanted) {
    atomic_store(&paused, wanted);
    while (wanted && atomic_load(&in_flight))
        usleep(1000);
}

static void sweep(void) {
    pause_requests(true);
    uint64_t pages = 0, before = atomic_load(&errors);
    for (uint64_t page = 0; page < PARAMETER(HOT) + PARAMETER(ONCE); page++) {
        if (states[page].request) {
            pages++;
            check("sweep", page_at(page), DEVICE_MAGIC, states[page].lba, states[page].request);
        }
    }
    pthread_mutex_lock(&churn_lock);
    for (uint64_t page = 0; page < PARAMETER(CHURN); page++, pages++) {
        uint64_t found = churn_words[page * PAGE_WORDS];
        if (found != churn_rounds)
            tell_error("churn", 0, 0, churn_rounds, found,
                       (const void *)&churn_words[page * PAGE_WORDS]);
    }
    pthread_mutex_unlock(&churn_lock);
    tell("sweep pages=%llu errors=%llu", (unsigned long long)pages,
         (unsigned long long)(atomic_load(&errors) - before));
    pause_requests(false);
}

static void *listen(void *argument) {
    char command;
    while (read(report_fd, &command, 1) == 1) {
        switch (command) {
        case 'o':
            atomic_store(&once_wanted, true);
            break;
        case 'q':
            atomic_store(&quiet, true);
            tell("quiet");
            break;
        case 's':
            sweep();
            break;
        case 'p':
            pause_requests(true);
            tell("paused requests=%llu", atomic_load(&requests));
            break;
        case 'r':
            pause_requests(false);
            tell("resumed");
            break;
        }
    }
    return argument;
}

// Setting up -------------------------------------------------------------------------------------

static void open_report(void) {
    struct termios settings;
    report_fd = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (report_fd < 0 || tcgetattr(report_fd, &settings) < 0)
        give_up("opening /dev/ttyS1");
    cfmakeraw(&settings);
    cfsetspeed(&settings, B115200);
    settings.c_cflag |= CLOCAL;
    tcsetattr(report_fd, TCSANOW, &settings);
}

static void load_modules(void) {
    char name[256];
    FILE *list = fopen("/modules/order", "r");
    if (!list)
        give_up("opening /modules/order");
    while (fscanf(list, "%255s", name) == 1) {
        int fd = open(name, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
            give_up(name);
        close(fd);
    }
    fclose(list);
}

static void open_disk(void) {
    uint64_t bytes = 0;
    for (int waited = 0; disk_fd < 0; waited += 1000, usleep(1000)) {
        disk_fd = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
        if (disk_fd < 0 && waited > DISK_PATIENCE_US)
            give_up("opening /dev/vda");
    }
    if (ioctl(disk_fd, BLKGETSIZE64, &bytes) < 0)
        give_up("asking /dev/vda for its size");
    disk_pages = bytes / PAGE_BYTES;
    if (disk_pages < 8 * WRITE_BLOCKS) {
        errno = ENOSPC;
        give_up("using /dev/vda: at least 8 MiB are needed");
    }
}

static void prepare_buffer(void) {
    uint64_t pages = PARAMETER(HOT) + PARAMETER(ONCE), state = PARAMETER(SEED);
    uint64_t available = (uint64_t)sysconf(_SC_AVPHYS_PAGES);
    if (pages + PARAMETER(CHURN) > available / 8 * 7) {
        tell("fatal message=\"%llu pages of buffer do not fit into the %llu that are free\"",
             (unsigned long long)(pages + PARAMETER(CHURN)), (unsigned long long)available);
        tcdrain(report_fd);
        reboot(RB_POWER_OFF);
    }
    buffer = map_pages(pages);
    churn_words = map_pages(PARAMETER(CHURN) + 1);
    states = calloc(pages, sizeof *states);
    once_order = calloc(PARAMETER(ONCE) + 1, sizeof *once_order);
    if (!states || !once_order)
        give_up("allocating the buffer's states");
    for (uint64_t index = 0; index < PARAMETER(ONCE); index++) {  // Fisher and Yates
        uint64_t other = random_below(&state, index + 1);
        once_order[index] = once_order[other];
        once_order[other] = PARAMETER(HOT) + index;
    }
    for (int index = 0; index < WRITE_BLOCKS; index++)
        pthread_mutex_init(&blocks[index].lock, NULL);
}

static void read_parameters(int count, char **arguments) {
    for (int index = 1; index < count; index++) {
        for (size_t known = 0; known < sizeof parameters / sizeof *parameters; known++) {
            size_t length = strlen(parameters[known].name);
            if (strncmp(arguments[index], parameters[known].name, length) == 0 &&
                arguments[index][length] == '=')
                parameters[known].value = strtoull(arguments[index] + length + 1, NULL, 0);
        }
    }
    if (PARAMETER(THREADS) > MAX_THREADS)
        PARAMETER(THREADS) = MAX_THREADS;
    if (PARAMETER(MAX_PAGES) > MAX_SEGMENTS - 1)
        PARAMETER(MAX_PAGES) = MAX_SEGMENTS - 1;
}

static void start_thread(void *(*body)(void *), uintptr_t number) {
    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, body, (void *)number)))
        give_up("starting a thread");
}

int main(int count, char **arguments) {
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    open_report();
    read_parameters(count, arguments);
    load_modules();
    open_disk();
    prepare_buffer();
    start_thread(listen, 0);
    start_thread(churn, 0);
    for (uintptr_t number = 0; number < PARAMETER(THREADS); number++)
        start_thread(work, number);
    while (atomic_load(&requests) == 0)
        usleep(1000);
    tell("ready threads=%llu hot=%llu once=%llu churn=%llu seed=%llu buffer_pages=%llu",
         (unsigned long long)PARAMETER(THREADS), (unsigned long long)PARAMETER(HOT),
         (unsigned long long)PARAMETER(ONCE), (unsigned long long)PARAMETER(CHURN),
         (unsigned long long)PARAMETER(SEED),
         (unsigned long long)(PARAMETER(HOT) + PARAMETER(ONCE)));
    bool once_told = false;
    for (;; usleep(REPORT_EVERY_US)) {
        tell_progress();
        if (!once_told && atomic_load(&once_wanted) && atomic_load(&once_used) >= PARAMETER(ONCE)) {
            tell("once-done pages=%llu", atomic_load(&once_used));
            once_told = true;
        }
    }
}
