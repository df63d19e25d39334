// SPDX-License-Identifier: Apache-2.0
/* The workload of both guests; see workload.h. It works with threads, and needs no C library. */
#include "workload.h"

#include <stdatomic.h>

enum {
    PAGE_WORDS = PAGE_BYTES / 8,
    SECTORS_PER_PAGE = PAGE_BYTES / SECTOR_BYTES,
    WRITE_BLOCKS = 256,
    ERRORS_REPORTED = 64,
    BLOCK_PAGE = OWN_PAGES - 1,  // of a worker's own pages; unaligned data go to the pages before
    HOT_SET_SHARE = 16,
    LAST_EVERY = 16,
    REGION_ALIGNMENT = 16,  // pages: 64 KiB, the largest page of a kernel
};

static const uint64_t DEVICE_MAGIC = 0x464F4F5250414D44;  // "DMAPROOF"
static const uint64_t GUEST_MAGIC = 0x46544E4554495257;   // "WRITENTF"

struct parameters parameters;

static const struct {
    const char *name;
    uint64_t *value;
} parameter_names[] = {
    {"threads=", &parameters.threads},
    {"hot=", &parameters.hot},
    {"write_once=", &parameters.write_once},
    {"churn=", &parameters.churn},
    {"hold=", &parameters.hold},
    {"seed=", &parameters.seed},
    {"write_every=", &parameters.write_every},
    {"max_pages=", &parameters.max_pages},
    {"huge_every=", &parameters.huge_every},
    {"unaligned_every=", &parameters.unaligned_every},
    {"image=", &parameters.image},
    {"last=", &parameters.last},
};
static const char *const pattern_names[] = {"random", "sequential", "hot-set"};

// The last correct content of a page; request 0 means none yet.
struct page_state {
    atomic_flag busy;
    uint32_t offset;
    uint64_t lba, request;
};

static uint64_t first_hot, first_write_once, first_churn;
static uint64_t write_once_in_a_row;  // the number of first write-once pages adjacent in memory
static uint64_t disk_pages;
static struct page_state *states;
static uint32_t *write_once_order;
static uint8_t *hold;

static struct {
    atomic_flag busy;
    uint64_t counter;  // of the last write; 0: never written
} blocks[WRITE_BLOCKS];

static atomic_ulong requests, writes, errors, newest;
static atomic_ulong write_once_taken, last_taken, write_once_finished;
static atomic_ulong write_once_left_out;  // pages that are not written a single time
static atomic_ulong disk_cursor, hot_cursor, churn_rounds;
static atomic_bool write_once_wanted, last_wanted, quiet;

// Parameters -------------------------------------------------------------------------------------

// The part of `text` after the prefix `start`; NULL if `text` does not start with it.
static const char *after_prefix(const char *text, const char *start) {
    while (*start)
        if (*text++ != *start++)
            return NULL;
    return text;
}

bool read_parameter(const char *text) {
    const char *value = after_prefix(text, "pattern=");
    for (size_t known = 0; value && known < sizeof pattern_names / sizeof *pattern_names; known++) {
        const char *rest = after_prefix(value, pattern_names[known]);
        if (rest && *rest == '\0') {
            parameters.pattern = known;
            return true;
        }
    }
    for (size_t known = 0; known < sizeof parameter_names / sizeof *parameter_names; known++) {
        value = after_prefix(text, parameter_names[known].name);
        if (!value || *value == '\0')
            continue;
        uint64_t number = 0;
        for (; *value >= '0' && *value <= '9'; value++)
            number = number * 10 + (uint64_t)(*value - '0');
        *parameter_names[known].value = number;
        return *value == '\0';
    }
    return false;
}

// Stamps -----------------------------------------------------------------------------------------

static uint64_t splitmix64(uint64_t value) {
    return splitmix64_mix(value + SPLITMIX64_STEP);
}

static uint64_t random_below(uint64_t *state, uint64_t bound) {
    *state += SPLITMIX64_STEP;
    return (uint64_t)(((unsigned __int128)splitmix64(*state) * bound) >> 64);
}

static bool one_of(uint64_t *state, uint64_t many) {
    return many && random_below(state, many) == 0;
}

// A word of a stamp, which is little-endian on every machine.
static uint64_t little_endian(uint64_t word) {
    return __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? __builtin_bswap64(word) : word;
}

static uint64_t checksum(uint64_t lba, uint64_t number) {
    return splitmix64(lba ^ (number << 32 | number >> 32));
}

static void fill(uint64_t *words, uint64_t magic, uint64_t lba, uint64_t number) {
    uint64_t first = checksum(lba, number);
    for (uint64_t index = 0; index < PAGE_WORDS; index++)
        words[index] = little_endian(first + index);
    words[0] = little_endian(magic);
    words[1] = little_endian(lba);
    words[2] = little_endian(number);
}

void stamp_page(uint64_t *words, uint64_t lba, uint64_t number) {
    fill(words, DEVICE_MAGIC, lba, number);
}

static void report_error(const char *kind, uint64_t lba, uint64_t request, uint64_t expected,
                         uint64_t found, const void *place) {
    if (atomic_fetch_add(&errors, 1) < ERRORS_REPORTED)
        report("error kind=%s lba=%lu request=%lu expected=%#lx found=%#lx gpa=%#lx", kind, lba,
               request, expected, found, gpa_of(place));
}

// Whether the first `count` words of a page hold the stamp (magic, lba, number); report the first
// word that differs.
static bool check_words(const char *kind, const uint64_t *words, uint64_t count, uint64_t magic,
                        uint64_t lba, uint64_t number) {
    uint64_t first = checksum(lba, number), head[] = {magic, lba, number};
    for (uint64_t index = 0; index < count; index++) {
        uint64_t expected = index < 3 ? head[index] : first + index;
        uint64_t found = little_endian(words[index]);
        if (found != expected) {
            report_error(kind, lba, number, expected, found, words);
            return false;
        }
    }
    return true;
}

static bool check(const char *kind, const uint64_t *words, uint64_t magic, uint64_t lba,
                  uint64_t number) {
    return check_words(kind, words, PAGE_WORDS, magic, lba, number);
}

// Planning ---------------------------------------------------------------------------------------

// The number of write-once pages that are used before the last ones.
static uint64_t early_write_once(void) {
    return parameters.write_once - parameters.last;
}

static uint64_t region_after(uint64_t first, uint64_t pages) {
    return (first + pages + REGION_ALIGNMENT - 1) / REGION_ALIGNMENT * REGION_ALIGNMENT;
}

static void lay_out_regions(void) {
    first_hot = region_after(0, parameters.threads * OWN_PAGES);
    first_write_once = region_after(first_hot, parameters.hot);
    first_churn = region_after(first_write_once, parameters.write_once);
}

uint64_t buffer_pages(void) {
    lay_out_regions();
    return first_churn + parameters.churn;
}

// A compressed migration of pages that compress well would end at once.
static void fill_with_noise(volatile uint64_t *words, uint64_t seed) {
    for (uint64_t word = 0; word < PAGE_WORDS; word++)
        words[word] = splitmix64(seed * PAGE_WORDS + word);
}

static void prepare_hold_pages(void) {
    if (parameters.hold)
        hold = allocate_unmoving(parameters.hold * PAGE_BYTES);
    for (uint64_t page = 0; hold && page < parameters.hold; page++)
        fill_with_noise((void *)(hold + page * PAGE_BYTES), ~page);
}

static void report_hold_pages(void) {
    uint64_t first = 0;
    for (uint64_t page = 1; hold && page <= parameters.hold; page++) {
        uint64_t start = gpa_of(hold + first * PAGE_BYTES);
        if (page < parameters.hold &&
            gpa_of(hold + page * PAGE_BYTES) == start + (page - first) * PAGE_BYTES)
            continue;
        report("hold gpa=%#lx pages=%lu", start, page - first);
        first = page;
    }
}

const char *prepare_workload(uint64_t disk_sectors) {
    disk_pages = disk_sectors / SECTORS_PER_PAGE;
    if (disk_pages < 8 * WRITE_BLOCKS)
        return "the disk is too small; expected at least 8 MiB";
    if (parameters.threads > MAX_WORKERS || parameters.max_pages > MAX_SMALL_PAGES ||
        !parameters.threads || !parameters.max_pages || !parameters.hot)
        return "threads, max_pages or hot is out of bounds";
    if (parameters.last > parameters.write_once)
        return "last is greater than write_once";
    lay_out_regions();
    states = allocate(first_churn * sizeof *states);
    write_once_order = allocate(parameters.write_once * sizeof *write_once_order);
    for (uint64_t index = 0; index < parameters.write_once; index++)
        write_once_order[index] = (uint32_t)(first_write_once + index);
    // The first half stays in order, so that the pages of a request are one piece of memory. The
    // second half is shuffled (Fisher and Yates).
    uint64_t early = early_write_once();
    write_once_in_a_row = parameters.pattern == SEQUENTIAL ? early : early / 2;
    uint64_t state = parameters.seed;
    for (uint64_t index = write_once_in_a_row; index < parameters.write_once; index++) {
        uint64_t shuffled = index - write_once_in_a_row + 1;
        uint64_t other = write_once_in_a_row + random_below(&state, shuffled);
        uint32_t page = write_once_order[other];
        write_once_order[other] = write_once_order[index];
        write_once_order[index] = page;
    }
    prepare_hold_pages();
    return NULL;
}

struct worker new_worker(uint64_t number) {
    return (struct worker){
        .random = splitmix64(parameters.seed * MAX_WORKERS + number),
        .own = (uint32_t)(number * OWN_PAGES),
    };
}

// The start of a request for `count` of `span` pages, by the pattern.
static uint64_t place(uint64_t *random, uint64_t span, uint64_t count, atomic_ulong *cursor) {
    if (parameters.pattern == SEQUENTIAL)
        return atomic_fetch_add(cursor, count) % span;
    if (parameters.pattern == HOT_SET && span > HOT_SET_SHARE && random_below(random, 8))
        span /= HOT_SET_SHARE;
    return random_below(random, span);
}

// The start of a read of `count` pages. The disk's last eighth is reserved for written blocks.
static uint64_t sector_for(uint64_t *random, uint64_t count) {
    uint64_t span = disk_pages / 8 * 7 - HUGE_PAGES;
    return place(random, span, count, &disk_cursor) * SECTORS_PER_PAGE;
}

// Take up to `count` free hot pages, in a row or scattered.
static uint32_t take_hot(uint64_t *random, uint32_t *pages, uint32_t count, bool in_a_row) {
    uint32_t taken = 0;
    uint64_t next = place(random, parameters.hot, count, &hot_cursor);
    for (uint32_t tries = 0; taken < count && tries < 4 * count; tries++) {
        uint32_t page = (uint32_t)(first_hot + next % parameters.hot);
        next = in_a_row ? next + 1 : place(random, parameters.hot, 1, &hot_cursor);
        if (!atomic_flag_test_and_set(&states[page].busy))
            pages[taken++] = page;
        else if (in_a_row && taken)
            break;
    }
    return taken;
}

static uint32_t take_write_once(uint32_t *pages, uint32_t count) {
    uint64_t first = atomic_fetch_add(&write_once_taken, count);
    uint32_t taken = 0;
    while (taken < count && first + taken < early_write_once()) {
        pages[taken] = write_once_order[first + taken];
        taken++;
    }
    return taken;
}

static uint32_t take_last(uint32_t *page) {
    uint64_t index = early_write_once() + atomic_fetch_add(&last_taken, 1);
    if (index >= parameters.write_once)
        return 0;
    *page = write_once_order[index];
    return 1;
}

// Write a block, or read one back to check that it holds the data written last.
static bool plan_block(struct worker *worker, struct request *request) {
    uint32_t block = (uint32_t)random_below(&worker->random, WRITE_BLOCKS);
    if (atomic_flag_test_and_set(&blocks[block].busy))
        return false;
    uint64_t counter = blocks[block].counter;
    bool writes_it = counter == 0 || random_below(&worker->random, 2);
    request->kind = writes_it ? WRITE : READ_BACK;
    request->region = OWN;
    request->block = block;
    request->sector = (disk_pages - WRITE_BLOCKS + block) * SECTORS_PER_PAGE;
    request->count = 1;
    request->pages[0] = worker->own + BLOCK_PAGE;
    if (writes_it)
        fill((uint64_t *)piece_at(request, 0), GUEST_MAGIC, request->sector, counter + 1);
    return true;
}

// Read a page into 512-byte pieces that begin anywhere.
static void plan_unaligned(struct worker *worker, struct request *request) {
    uint32_t places = (BLOCK_PAGE - 1) * PAGE_BYTES / piece_alignment;
    request->region = OWN;
    request->sector = sector_for(&worker->random, 1);
    request->count = 1;
    request->offset = (uint32_t)random_below(&worker->random, places) * piece_alignment;
    request->piece_bytes = SECTOR_BYTES;
    request->pages[0] = worker->own;
}

static bool plan_read(uint64_t *random, struct request *request) {
    uint32_t count = 1;
    bool huge = one_of(random, parameters.huge_every);
    if (huge)
        count = HUGE_PAGES;
    else if (random_below(random, 4) == 0)
        count += (uint32_t)random_below(random, parameters.max_pages);
    request->count = 0;
    bool fits = !huge || atomic_load(&write_once_taken) + HUGE_PAGES <= write_once_in_a_row;
    if (atomic_load(&write_once_wanted) && fits && random_below(random, 4)) {
        request->region = WRITE_ONCE;
        request->count = take_write_once(request->pages, count);
    }
    if (request->count == 0 && atomic_load(&last_wanted) && one_of(random, LAST_EVERY)) {
        request->region = WRITE_ONCE;
        request->count = take_last(request->pages);
    }
    if (request->count == 0) {
        bool in_a_row = huge || parameters.pattern == SEQUENTIAL || random_below(random, 2);
        request->region = HOT;
        request->count = take_hot(random, request->pages, count, in_a_row);
    }
    if (request->count)
        request->sector = sector_for(random, request->count);
    return request->count;
}

bool plan_request(struct worker *worker, struct request *request) {
    request->kind = READ;
    request->offset = 0;
    request->piece_bytes = PAGE_BYTES;
    request->newest_before = atomic_load(&newest);
    if (one_of(&worker->random, parameters.write_every) && plan_block(worker, request))
        return true;
    if (one_of(&worker->random, parameters.unaligned_every)) {
        plan_unaligned(worker, request);
        return true;
    }
    return plan_read(&worker->random, request);
}

uint64_t bytes_of(const struct request *request) {
    return (uint64_t)request->count * PAGE_BYTES;
}

uint32_t pieces_of(const struct request *request) {
    return request->count * (PAGE_BYTES / request->piece_bytes);
}

uint8_t *piece_at(const struct request *request, uint32_t piece) {
    uint32_t position = piece * request->piece_bytes;
    return page_at(request->pages[position / PAGE_BYTES]) + request->offset + position % PAGE_BYTES;
}

// Checking ---------------------------------------------------------------------------------------

static void advance_newest(uint64_t request) {
    uint64_t seen = atomic_load(&newest);
    while (seen < request && !atomic_compare_exchange_weak(&newest, &seen, request))
        ;
}

static void check_page(const struct request *request, uint32_t index) {
    struct page_state *state = &states[request->pages[index]];
    const uint64_t *words = (void *)(page_at(request->pages[index]) + request->offset);
    uint64_t lba = request->sector + (uint64_t)index * SECTORS_PER_PAGE;
    uint64_t number = little_endian(words[2]);
    if (!check("stamp", words, DEVICE_MAGIC, lba, number)) {
        state->request = 0;
        return;
    }
    if (!parameters.image && number <= request->newest_before)
        report_error("stale", lba, number, request->newest_before + 1, number, words);
    state->lba = lba;
    state->request = number;
    state->offset = request->offset;
    advance_newest(number);
}

void check_packet(const uint64_t *words, uint64_t count) {
    static uint64_t newest_packet;
    if (count < 3) {
        report_error("packet", 0, 0, 3, count, words);
        return;
    }
    uint64_t number = little_endian(words[2]);
    if (!check_words("packet", words, count, DEVICE_MAGIC, 0, number))
        return;
    if (number <= newest_packet)
        report_error("stale-packet", 0, number, newest_packet + 1, number, words);
    newest_packet = number;
}

static void finish_block(const struct request *request, bool moved) {
    uint64_t *counter = &blocks[request->block].counter;
    if (moved && request->kind == WRITE)
        ++*counter;
    else if (moved)
        check("writeback", (uint64_t *)piece_at(request, 0), GUEST_MAGIC, request->sector,
              *counter);
    if (request->kind == WRITE)
        atomic_fetch_add(&writes, 1);
    atomic_flag_clear(&blocks[request->block].busy);
}

static void count_write_once(uint64_t pages) {
    uint64_t wanted = early_write_once() - atomic_load(&write_once_left_out);
    if (atomic_fetch_add(&write_once_finished, pages) + pages == wanted)
        report("write-once-done pages=%lu", wanted);
}

// The device may have written the request's pages already, so they are no longer write-once pages.
void repeat_request(struct request *request) {
    if (request->region != WRITE_ONCE)
        return;
    request->region = OWN;
    atomic_fetch_add(&write_once_left_out, request->count);
    count_write_once(0);
}

void finish_request(struct request *request, uint64_t done) {
    bool moved = done == bytes_of(request);
    if (!moved)
        report_error("io", request->sector, 0, bytes_of(request), done, piece_at(request, 0));
    if (request->kind != READ)
        finish_block(request, moved);
    for (uint32_t index = 0; request->kind == READ && index < request->count; index++) {
        if (moved)
            check_page(request, index);
        else
            states[request->pages[index]].request = 0;
        if (request->region == HOT)
            atomic_flag_clear(&states[request->pages[index]].busy);
    }
    if (request->region == WRITE_ONCE)
        count_write_once(request->count);
    atomic_fetch_add(&requests, 1);
}

uint64_t requests_finished(void) {
    return atomic_load(&requests);
}

static volatile uint64_t *churn_word(uint64_t page) {
    return (volatile uint64_t *)page_at(first_churn + page);
}

static void fill_churn(void) {
    for (uint64_t page = 0; page < parameters.churn; page++)
        fill_with_noise(churn_word(page), page);
}

void churn(void) {
    if (atomic_load(&quiet))
        return;
    uint64_t round = atomic_load(&churn_rounds) + 1;
    if (round == 1)
        fill_churn();
    for (uint64_t page = 0; page < parameters.churn; page++)
        *churn_word(page) = round;
    atomic_store(&churn_rounds, round);
}

// Check every page in RAM again.
static void recheck(void) {
    uint64_t pages = 0, before = atomic_load(&errors), round = atomic_load(&churn_rounds);
    pause_requests(true);
    for (uint64_t page = 0; page < first_churn; page++) {
        const struct page_state *state = &states[page];
        if (state->request) {
            pages++;
            check("recheck", (void *)(page_at(page) + state->offset), DEVICE_MAGIC, state->lba,
                  state->request);
        }
    }
    // Churn may continue meanwhile: a word may be newer than the last whole round, never older.
    for (uint64_t page = 0; page < parameters.churn; page++, pages++) {
        uint64_t found = *churn_word(page);
        if (found < round)
            report_error("churn", 0, 0, round, found, (const void *)churn_word(page));
    }
    report("recheck pages=%lu errors=%lu", pages, atomic_load(&errors) - before);
    pause_requests(false);
}

// Return to the state before the first migration: empty the write-once pages, and wait for
// dmaproof's command to use them again, a single time.
static void start_over(void) {
    pause_requests(true);
    for (uint64_t page = first_write_once; page < first_churn; page++) {
        states[page].request = 0;
        __builtin_memset(page_at(page), 0, PAGE_BYTES);
    }
    atomic_store(&write_once_wanted, false);
    atomic_store(&last_wanted, false);
    atomic_store(&write_once_taken, 0);
    atomic_store(&last_taken, 0);
    atomic_store(&write_once_finished, 0);
    atomic_store(&write_once_left_out, 0);
    atomic_store(&quiet, false);
    report("again");
    pause_requests(false);
}

// The guest may have used the first half of its write-once pages before it rebooted.
static void leave_out_half(void) {
    uint64_t half = early_write_once() / 2;
    atomic_store(&write_once_taken, half);
    atomic_store(&write_once_left_out, half);
}

static void use_new_memory(void) {
    pause_requests(true);
    for (uint64_t page = first_write_once; page < first_churn; page++)
        states[page].request = 0;
    report("memory pages=%lu", move_to_new_memory(first_write_once, parameters.write_once));
    pause_requests(false);
}

// The serial line to dmaproof --------------------------------------------------------------------

void obey(char command) {
    switch (command) {
    case 'o':
        if (!atomic_exchange(&write_once_wanted, true))
            count_write_once(0);  // the guest may have no write-once pages
        break;
    case 'l':
        atomic_store(&last_wanted, true);
        break;
    case 'q':
        atomic_store(&quiet, true);
        report("quiet");
        break;
    case 's':
        recheck();
        break;
    case 'a':
        start_over();
        break;
    case 'm':
        use_new_memory();
        break;
    case 'w':
        report_own_memory();
        report("declared");
        break;
    case 'h':
        leave_out_half();
        break;
    case 'd':
        reset_device();
        report("device-reset");
        break;
    case 'u':
        reload_driver();
        report("driver-reloaded");
        break;
    case 'b':
        reset_machine();
        break;
    case 'p':
        pause_requests(true);
        report("paused requests=%lu", atomic_load(&requests));
        break;
    case 'r':
        pause_requests(false);
        report("resumed");
        break;
    }
}

void report_own(uint64_t start, uint64_t end) {
    uint64_t first = start / PAGE_BYTES, pages = (end + PAGE_BYTES - 1) / PAGE_BYTES - first;
    if (pages)
        report("own gpa=%#lx pages=%lu", first * PAGE_BYTES, pages);
}

uint64_t device_pages(uint64_t *first) {
    *first = first_hot;
    return first_churn - first_hot;
}

// A reset of the machine may have interrupted a line, which the empty line ends.
void report_boot(void) {
    report("\nboot");
}

void report_ready(void) {
    report_hold_pages();
    report("ready threads=%lu hot=%lu write_once=%lu churn=%lu seed=%lu buffer_pages=%lu",
           parameters.threads, parameters.hot, parameters.write_once, parameters.churn,
           parameters.seed, parameters.hot + parameters.write_once);
}

void report_progress(void) {
    report("progress requests=%lu under_way=%lu writes=%lu write_once=%lu errors=%lu",
           atomic_load(&requests), requests_under_way(), atomic_load(&writes),
           atomic_load(&write_once_finished), atomic_load(&errors));
}
