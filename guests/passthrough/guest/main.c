// SPDX-License-Identifier: Apache-2.0
/*
 * The freestanding guest that drives the fake VFIO device (../module). It lets the device's engine
 * write its memory and checks what was written, without a kernel and without interrupts.
 *
 * There are three windows. The engine writes the hot pages round after round. It writes the
 * write-once pages a single time, when the tool asks for it, so no later write hides a dirty bit
 * that is lost there. The CPU keeps the churn pages dirty. The content of a page identifies the
 * engine's write that left it (../module/control.h), so the guest can check that the page is
 * complete, in the right place, and not stale.
 *
 * With iommu=1 on the command line, the device is behind a vIOMMU, and its IOVAs are those of iova.c.
 *
 * The line to the tool is that of the other guests (docs/guests.md).
 */
#include "iova.h"

enum {
    VENDOR = 0xfffd,
    DEVICE = 0xd3a0,

    // Registers of BAR 0 (../module/control.h).
    MAGIC = 0,
    IOVA = 8,
    LENGTH = 16,
    DONE = 24,
    SEQUENCE = 32,
    PIECE = 40,
    SKEW = 44,
    STRIDE = 48,
    BURST = 52,
    PERIOD_US = 56,
    LIMIT = 60,
    RUN = 64,
    ERROR = 68,

    RUN_SCATTERED = 3,
    HOT_BURST = 2,  // so slow that a page stays unchanged for longer than its check takes
    ONCE_BURST = 16,
    TICK_US = 4000,

    PAGE_WORDS = PAGE_BYTES / 8,
    TORN_TRIES = 4,  // the engine may be writing a page while the guest checks it
    MOST_ERROR_REPORTS = 64,
};

static const uint64_t DEVICE_MAGIC = 0x464f5250414d44;
static const uint64_t SCATTER = 2654435761;
static const uint64_t STEP_INVERSE = 0xF1DE83E19937733D;  // SPLITMIX64_STEP's, modulo 2^64

static struct window {
    const char *name;
    uint64_t pages;
    uint64_t (*words)[PAGE_WORDS];
    uint64_t *written;  // for each page the number of the write that was last found in it
} hot = {.name = "hot="}, write_once = {.name = "write_once="}, churned = {.name = "churn="};

static volatile uint8_t *bar;
static uint64_t hot_start;  // the number of the last write before the engine's first hot one
static uint64_t finished, errors, once_written, churn_rounds, random_state;
static bool quiet, writing_once;

// Content ----------------------------------------------------------------------------------------

// The inverse of splitmix64_mix.
static uint64_t unmix(uint64_t value) {
    value = (value ^ value >> 31 ^ value >> 62) * 0x319642B2D24D8EC3;
    value = (value ^ value >> 27 ^ value >> 54) * 0x96DE1B173F119089;
    return value ^ value >> 30 ^ value >> 60;
}

// The word that write `number` puts at `at` (control.h).
static uint64_t written_word(uint64_t number, const volatile uint64_t *at) {
    return splitmix64_mix(number * SPLITMIX64_STEP ^ iova_of(at) / 8);
}

// The number of the write that left a page's first word, if the engine wrote it.
static uint64_t writer_of(const volatile uint64_t *words) {
    return (unmix(words[0]) ^ iova_of(words) / 8) * STEP_INVERSE;
}

// The index of the first word that is not of write `number`, or PAGE_WORDS.
static unsigned first_mismatch(const volatile uint64_t *words, uint64_t number) {
    unsigned index = 0;
    while (index < PAGE_WORDS && words[index] == written_word(number, &words[index]))
        index++;
    return index;
}

static void report_error(const char *kind, uint64_t expected, uint64_t found,
                         const volatile void *place) {
    if (errors++ < MOST_ERROR_REPORTS)
        report("error kind=%s expected=%#lx found=%#lx gpa=%#lx", kind, expected, found,
               (uint64_t)place);
}

// The engine -------------------------------------------------------------------------------------

static uint32_t read32(unsigned offset) {
    return *(volatile uint32_t *)(bar + offset);
}

static uint64_t read64(unsigned offset) {
    return read32(offset) | (uint64_t)read32(offset + 4) << 32;
}

static void write32(unsigned offset, uint32_t value) {
    *(volatile uint32_t *)(bar + offset) = value;
}

static void write64(unsigned offset, uint64_t value) {
    write32(offset, (uint32_t)value);
    write32(offset + 4, (uint32_t)(value >> 32));
}

// Let the engine write a window, page by page in a scattered order, `burst` pages in a tick. It
// stops after `limit` pages, or never if `limit` is 0.
static void run_engine(const struct window *window, uint32_t burst, uint32_t limit) {
    write64(IOVA, iova_of_blocks(window->words));
    write64(LENGTH, window->pages * PAGE_BYTES);
    write32(PIECE, PAGE_BYTES);
    write32(SKEW, 0);
    write32(STRIDE, PAGE_BYTES);
    write32(BURST, burst);
    write32(PERIOD_US, TICK_US);
    write32(LIMIT, limit);
    write32(RUN, RUN_SCATTERED);
}

static void write_hot(void) {
    hot_start = read64(SEQUENCE);
    run_engine(&hot, HOT_BURST, 0);
}

// After this has returned, the engine does not write until it is started again.
static void stop_engine(void) {
    write32(RUN, 0);
    if (read32(ERROR))
        give_up("the device's engine has failed");
}

static void find_engine(bool behind_iommu) {
    static const uint16_t ids[] = {DEVICE};
    struct pci_device device = {0};
    if (!pci_find(VENDOR, ids, 1, &device))
        give_up("fake VFIO device not found");
    bar = pci_map_bar(&device, 0);
    pci_enable(&device);
    if (behind_iommu) {
        iova_map(hot.words, hot.pages * PAGE_BYTES);
        iova_map(write_once.words, write_once.pages * PAGE_BYTES);
        iova_start(&device);
    }
    if (read64(MAGIC) != DEVICE_MAGIC)
        give_up("the fake VFIO device has no valid magic register");
}

// Checking ---------------------------------------------------------------------------------------

// Check a random hot page: it must never become older. A page that changes during the check is
// skipped; `recheck` checks all pages while the engine is stopped.
static void check_hot(void) {
    random_state += SPLITMIX64_STEP;
    uint64_t page = splitmix64_mix(random_state) % hot.pages;
    const volatile uint64_t *words = hot.words[page];
    for (unsigned tries = 0; tries < TORN_TRIES; tries++) {
        uint64_t number = writer_of(words);
        if (first_mismatch(words, number) < PAGE_WORDS && words[0])
            continue;
        if (!words[0])  // not yet written
            return;
        if (number < hot.written[page])
            report_error("stale", hot.written[page], number, words);
        finished += number > hot.written[page];
        hot.written[page] = number;
        return;
    }
}

static void check_exactly(const struct window *window, uint64_t page, uint64_t number) {
    const volatile uint64_t *words = window->words[page];
    unsigned mismatch = first_mismatch(words, number);
    if (mismatch < PAGE_WORDS)
        report_error("recheck", number, writer_of(words), &words[mismatch]);
}

// Check every page while the engine is stopped: each must have every byte of its last write.
static void recheck(void) {
    uint64_t before = errors, pages = 0;
    stop_engine();
    uint64_t done = read64(DONE), first = done < hot.pages ? 0 : done - hot.pages;
    for (uint64_t piece = first; piece < done; piece++, pages++) {
        uint64_t page = iova_page(piece % hot.pages * SCATTER % hot.pages);
        check_exactly(&hot, page, hot_start + piece + 1);
        hot.written[page] = hot_start + piece + 1;
    }
    for (uint64_t page = 0; page < once_written; page++, pages++)
        check_exactly(&write_once, page, write_once.written[page]);
    for (uint64_t page = 0; page < churned.pages; page++, pages++)
        if (churned.words[page][0] < churn_rounds)
            report_error("churn", churn_rounds, churned.words[page][0], churned.words[page]);
    report("recheck pages=%lu errors=%lu", pages, errors - before);
    write_hot();
}

// The write-once pages ---------------------------------------------------------------------------

static void begin_write_once(void) {
    stop_engine();
    writing_once = true;
    if (write_once.pages)
        run_engine(&write_once, ONCE_BURST, (uint32_t)write_once.pages);
}

static void finish_write_once(void) {
    if (!writing_once || read32(RUN))
        return;
    writing_once = false;
    stop_engine();
    for (; once_written < write_once.pages; once_written++)
        write_once.written[once_written] = writer_of(write_once.words[once_written]);
    report("write-once-done pages=%lu", write_once.pages);
    write_hot();
}

// The CPU's own pages ----------------------------------------------------------------------------

// Random content, because pages that compress well would make a compressed migration too short.
static void fill_churn(void) {
    for (uint64_t page = 0; page < churned.pages; page++)
        for (unsigned word = 1; word < PAGE_WORDS; word++)
            churned.words[page][word] = splitmix64_mix(page * PAGE_WORDS + word);
}

void churn(void) {
    if (quiet)
        return;
    churn_rounds++;
    for (uint64_t page = 0; page < churned.pages; page++)
        *(volatile uint64_t *)churned.words[page] = churn_rounds;
}

// The line to the tool ---------------------------------------------------------------------------

void obey(char command) {
    switch (command) {
    case 'o':
        begin_write_once();
        break;
    case 'q':
        quiet = true;
        report("quiet");
        break;
    case 's':
        recheck();
        break;
    }
}

// The number after `name` on the command line, or 0 if the line has no `name`.
static uint64_t parameter(const char *line, const char *name) {
    for (bool begins = true; *line; begins = *line++ == ' ') {
        const char *at = line, *wanted = name;
        while (begins && *wanted && *at == *wanted)
            at++, wanted++;
        if (!begins || *wanted)
            continue;
        uint64_t number = 0;
        for (; *at >= '0' && *at <= '9'; at++)
            number = number * 10 + (uint64_t)(*at - '0');
        return number;
    }
    return 0;
}

static void prepare(struct window *window, const char *line) {
    window->pages = parameter(line, window->name);
    window->words = allocate_aligned(window->pages * PAGE_BYTES, IOVA_BLOCK_BYTES);
    window->written = allocate(window->pages * sizeof *window->written);
}

static bool is_due(uint64_t *next, uint64_t every_us) {
    uint64_t now = microseconds();
    if (now < *next)
        return false;
    *next = now + every_us;
    return true;
}

void guest_main(const void *start_info);

void guest_main(const void *start_info) {
    uint64_t next_churn = 0, next_report = 0;
    bool ready = false;
    catch_exceptions();
    start_clock();
    find_memory(start_info);
    const char *line = command_line(start_info);
    prepare(&hot, line);
    prepare(&write_once, line);
    prepare(&churned, line);
    random_state = parameter(line, "seed=");
    if (!hot.pages)
        give_up("the command line has no hot= with at least one page");
    fill_churn();
    find_engine(parameter(line, "iommu="));
    write_hot();
    for (;;) {
        check_hot();
        finish_write_once();
        listen();
        if (is_due(&next_churn, CHURN_EVERY_US))
            churn();
        if (!ready && finished) {
            report("ready hot=%lu write_once=%lu churn=%lu", hot.pages, write_once.pages,
                   churned.pages);
            ready = true;
        }
        if (ready && is_due(&next_report, REPORT_EVERY_US)) {
            if (read32(ERROR))
                give_up("the device's engine has failed");
            report("progress requests=%lu write_once=%lu errors=%lu", finished, once_written,
                   errors);
        }
    }
}
