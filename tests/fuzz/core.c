// SPDX-License-Identifier: Apache-2.0
/*
 * A libFuzzer target for plugin/dmaproof/core. It calls the functions as Python does, with any
 * arguments, on buffers that end where the address sanitizer's red zones begin, and compares the
 * results with loops over single bits. README.md says how to build and run it.
 */
#include "../../plugin/dmaproof/core/module.c"

#include "../../plugin/dmaproof/core/merge.c"
#include "../../plugin/dmaproof/core/page_compare.c"
#include "../../plugin/dmaproof/core/page_table.c"
#include "../../plugin/dmaproof/core/ranges.c"
#include "../../plugin/dmaproof/core/runs.c"

#include <stdio.h>

static const uint8_t *input, *input_end;

static uint64_t bytes_of_input(unsigned count) {
    uint64_t value = 0;
    while (count-- && input < input_end)
        value = value << 8 | *input++;
    return value;
}

static unsigned below(unsigned limit) {
    return (unsigned)bytes_of_input(2) % limit;
}

// Return a number that is usually small, and sometimes so large that sums overflow.
static uint64_t number(unsigned likely) {
    unsigned kind = below(16);
    if (kind < 13)
        return below(likely + 1);
    if (kind == 13)
        return UINT64_MAX - below(70);
    return kind == 14 ? (UINT64_C(1) << below(64)) + below(3) - 1 : bytes_of_input(8);
}

struct buffer {
    uint8_t *memory, *bytes, *before;
    size_t size;
    PyObject *view;
};

// Make a buffer of `size` bytes at any alignment, which ends just before a red zone.
static struct buffer make_buffer(size_t size, unsigned skew) {
    struct buffer buffer = {.memory = malloc(size + skew), .before = malloc(size + 1), .size = size};
    buffer.bytes = buffer.memory + skew;
    memset(buffer.memory, 0x5a, skew);
    unsigned density = below(4);
    for (size_t i = 0; i < size; i++)
        buffer.bytes[i] = density == 0 ? 0 : density == 1 ? 0xff : (uint8_t)bytes_of_input(1);
    memcpy(buffer.before, buffer.bytes, size);
    buffer.view = PyMemoryView_FromMemory((char *)buffer.bytes, (Py_ssize_t)size, PyBUF_WRITE);
    return buffer;
}

static struct buffer some_buffer(void) {
    unsigned skew = below(9), size = below(200);
    return make_buffer(size, skew);
}

static void drop_buffer(struct buffer *buffer) {
    for (uint8_t *byte = buffer->memory; byte < buffer->bytes; byte++) {
        if (*byte != 0x5a)
            abort();
    }
    Py_DECREF(buffer->view);
    free(buffer->memory);
    free(buffer->before);
}

static bool bit(const uint8_t *bytes, uint64_t index) {
    return bytes[index / 8] >> index % 8 & 1;
}

static void expect(bool truth, const char *what) {
    if (truth)
        return;
    fprintf(stderr, "_core is wrong: %s\n", what);
    abort();
}

// Call `function`; return false if it raised an error, after which nothing may have changed.
static bool called(PyObject *(*function)(PyObject *, PyObject *), PyObject *args,
                   const struct buffer *target, PyObject **answer) {
    expect(args != NULL, "arguments");
    *answer = function(NULL, args);
    Py_DECREF(args);
    if (*answer)
        return true;
    PyErr_Clear();
    expect(!memcmp(target->bytes, target->before, target->size), "refused, but written");
    return false;
}

static uint64_t as_number(PyObject *answer) {
    uint64_t value = PyLong_AsUnsignedLongLong(answer);
    Py_DECREF(answer);
    return value;
}

static bool inside(const struct buffer *buffer, uint64_t first, uint64_t count) {
    return first <= buffer->size * 8 && count <= buffer->size * 8 - first;
}

// Check that no bit of `target` outside [first, first + count) changed; return how many inside did.
static uint64_t count_new(const struct buffer *target, uint64_t first, uint64_t count) {
    uint64_t added = 0;
    for (uint64_t i = 0; i < target->size * 8; i++) {
        bool was = bit(target->before, i), is = bit(target->bytes, i);
        expect(was == is || (is && i >= first && i - first < count), "a bit outside was changed");
        added += was != is;
    }
    return added;
}

static void try_set_bits(void) {
    struct buffer data = some_buffer();
    uint64_t first = number(1600), count = number(1600);
    PyObject *answer, *args = Py_BuildValue("OKKi", data.view, first, count, (int)below(2));
    if (called(set_bits, args, &data, &answer)) {
        expect(inside(&data, first, count), "set_bits took a range outside");
        expect(as_number(answer) == count_new(&data, first, count), "set_bits, bits added");
        for (uint64_t i = 0; i < count; i++)
            expect(bit(data.bytes, first + i), "set_bits left a bit out");
    } else {
        expect(!inside(&data, first, count), "set_bits refused a range inside");
    }
    drop_buffer(&data);
}

static void try_or_bits(void) {
    struct buffer into = some_buffer(), from = some_buffer();
    uint64_t first = number(1600), start = number(1600), count = number(1600);
    PyObject *answer, *args = Py_BuildValue("OKOKKi", into.view, first, from.view, start, count,
                                            (int)below(2));
    bool right = inside(&into, first, count) && inside(&from, start, count);
    if (called(or_bits, args, &into, &answer)) {
        expect(right, "or_bits took a range outside");
        expect(as_number(answer) == count_new(&into, first, count), "or_bits, bits added");
        for (uint64_t i = 0; i < count; i++)
            expect(bit(into.bytes, first + i) ==
                       (bit(into.before, first + i) || bit(from.bytes, start + i)),
                   "or_bits, a bit");
    } else {
        expect(!right, "or_bits refused ranges inside");
    }
    drop_buffer(&into);
    drop_buffer(&from);
}

static void try_runs(bool take) {
    struct buffer data = some_buffer();
    uint64_t first = number(1600), count = number(1600);
    PyObject *answer, *args = Py_BuildValue("OKK", data.view, first, count);
    if (called(take ? take_set : find_set, args, &data, &answer)) {
        expect(inside(&data, first, count), "runs outside");
        uint64_t at = 0;
        const uint8_t *pairs = (const uint8_t *)PyBytes_AsString(answer);
        for (Py_ssize_t i = 0; i < PyBytes_Size(answer) / 16; i++) {
            uint64_t start = load_unaligned(pairs + 16 * i), length = load_unaligned(pairs + 16 * i + 8);
            expect(start >= at && length > 0 && start + length <= count, "runs in order");
            for (; at < start; at++)
                expect(!bit(data.before, first + at), "a run left out");
            for (; at < start + length; at++)
                expect(bit(data.before, first + at), "a run of clear bits");
        }
        for (; at < count; at++)
            expect(!bit(data.before, first + at), "the last run left out");
        for (uint64_t i = 0; i < data.size * 8; i++) {
            bool taken = take && i >= first && i - first < count;
            expect(bit(data.bytes, i) == (!taken && bit(data.before, i)), "the bits taken");
        }
        Py_DECREF(answer);
    }
    drop_buffer(&data);
}

static void try_count_bits(void) {
    struct buffer data = some_buffer();
    uint64_t first = number(1600), count = number(1600), total = 0;
    PyObject *answer, *args = Py_BuildValue("OKK", data.view, first, count);
    if (called(count_bits, args, &data, &answer)) {
        for (uint64_t i = 0; i < count; i++)
            total += bit(data.bytes, first + i);
        expect(as_number(answer) == total, "count_bits");
    }
    drop_buffer(&data);
}

static void try_set_ranges(void) {
    enum { MOST = 40 };
    struct buffer data = some_buffer();
    unsigned shift = (unsigned)number(20), count = below(MOST);
    uint64_t base = number(5) << (shift & 63), *iovas = malloc(8 * count + 1),
             *lengths = malloc(8 * count + 1), all = number(300);
    uint64_t last = below(4) ? base + ((uint64_t)data.size * 8 << (shift & 63)) - 1 - below(9) : number(99);
    bool alike = below(2), good = true;
    for (unsigned i = 0; i < count; i++) {
        iovas[i] = below(8) ? base + number(1600) * (below(2) ? 1 : UINT64_C(1) << (shift & 63)) : number(9);
        lengths[i] = alike ? all : number(300);
        good &= lengths[i] && iovas[i] >= base && iovas[i] <= last && lengths[i] - 1 <= last - iovas[i];
    }
    PyObject *starts = PyMemoryView_FromMemory((char *)iovas, 8 * count, PyBUF_READ);
    PyObject *sizes = alike ? PyLong_FromUnsignedLongLong(all)
                            : PyMemoryView_FromMemory((char *)lengths, 8 * count, PyBUF_READ);
    PyObject *answer, *args = Py_BuildValue("OKKIOOi", data.view, base, last, shift, starts, sizes,
                                            (int)below(2));
    if (called(set_ranges, args, &data, &answer)) {
        expect(good, "set_ranges took a range outside");
        expect(as_number(answer) == count_new(&data, 0, UINT64_MAX), "set_ranges, bits added");
        for (uint64_t page = 0; page < data.size * 8; page++) {
            bool touched = bit(data.before, page);
            for (unsigned i = 0; i < count; i++)
                touched |= (iovas[i] >> shift) - (base >> shift) <= page &&
                           page <= ((iovas[i] + (lengths[i] - 1)) >> shift) - (base >> shift);
            expect(bit(data.bytes, page) == touched, "set_ranges, a page");
        }
    }
    Py_DECREF(starts);
    Py_DECREF(sizes);
    free(iovas);
    free(lengths);
    drop_buffer(&data);
}

static void try_or_pages(void) {
    struct buffer into = some_buffer(), from = some_buffer();
    unsigned into_shift = (unsigned)number(14), from_shift = (unsigned)number(14);
    uint64_t iova = number(20000), last = below(4) ? iova + below(60000) : number(20000);
    uint64_t into_page = below(2) ? number(9) : iova >> (into_shift & 63);
    uint64_t from_page = below(2) ? number(9) : iova >> (from_shift & 63);
    PyObject *answer, *args = Py_BuildValue("OKIOKIKKi", into.view, into_page, into_shift, from.view,
                                            from_page, from_shift, iova, last, (int)below(2));
    if (called(or_pages, args, &into, &answer)) {
        uint64_t low = (iova >> into_shift) - into_page, high = (last >> into_shift) - into_page;
        expect(as_number(answer) == count_new(&into, low, high - low + 1), "or_pages, bits added");
        for (uint64_t page = low; page <= high; page++) {
            // The requested bytes of this page, and the source's pages that contain them.
            uint64_t start = (page + into_page) << into_shift;
            uint64_t end = start + ((UINT64_C(1) << into_shift) - 1);
            uint64_t first = ((start > iova ? start : iova) >> from_shift) - from_page;
            uint64_t final = ((end < last ? end : last) >> from_shift) - from_page;
            bool touched = bit(into.before, page);
            for (uint64_t i = first; i <= final && !touched; i++)
                touched = bit(from.bytes, i);
            expect(bit(into.bytes, page) == touched, "or_pages, a page");
        }
    }
    drop_buffer(&into);
    drop_buffer(&from);
}

// Walk tables of random content: no byte outside them is accessed; runs are in order and inside.
static void try_tables(void) {
    enum { NODES = 3 };
    struct buffer memory = make_buffer(0, 0);
    drop_buffer(&memory);
    size_t size = (size_t)TABLE_BYTES * (1 + below(NODES)) + (below(8) ? 0 : 8 * below(512));
    memory = (struct buffer){.memory = calloc(1, size), .before = calloc(1, size), .size = size};
    memory.bytes = memory.memory;
    uint64_t *entries = (uint64_t *)memory.bytes;
    unsigned filled = below(12);
    for (unsigned i = 0; i < filled; i++)
        entries[below(8) ? below(6) + 512 * below((unsigned)(size / TABLE_BYTES)) : below((unsigned)size / 8)] =
            below(3) ? (uint64_t)below(NODES + 1) << 12 | bytes_of_input(2) % 4096 : bytes_of_input(8);
    memory.view = PyMemoryView_FromMemory((char *)memory.bytes, (Py_ssize_t)size, PyBUF_WRITE);
    uint64_t iova = number(6) << 12, last = below(4) ? iova + (number(6) << (12 + 9 * below(4))) : number(99);
    uint64_t root = below(6) ? 0 : number(9000), group = below(2) ? 0xe00 : 0;
    unsigned levels = below(6) ? 1 + below(4) : (unsigned)number(9);
    bool marks = below(2);
    PyObject *layout = Py_BuildValue("KIKKKKKK", root, levels, UINT64_C(1), UINT64_C(0x40),
                                     UINT64_C(0xffffffffff000), UINT64_C(0xe00), UINT64_C(0x200),
                                     group);
    PyObject *args = marks ? Py_BuildValue("ONKK", memory.view, layout, iova, last)
                           : Py_BuildValue("ONKKi", memory.view, layout, iova, last, (int)below(2));
    PyObject *answer = (marks ? mark_table : read_table)(NULL, args);
    Py_DECREF(args);
    PyErr_Clear();
    if (answer && !marks) {
        const uint8_t *pairs = (const uint8_t *)PyBytes_AsString(answer);
        for (Py_ssize_t i = 0; i < PyBytes_Size(answer) / 16; i++) {
            uint64_t start = load_unaligned(pairs + 16 * i), length = load_unaligned(pairs + 16 * i + 8);
            expect(start >= iova && length - 1 <= last - start, "a mapping outside the range");
        }
    }
    Py_XDECREF(answer);
    Py_DECREF(memory.view);
    free(memory.memory);
    free(memory.before);
}

static void try_differing_pages(void) {
    struct buffer a = some_buffer(), b = below(4) ? make_buffer(a.size, below(9)) : some_buffer();
    struct buffer bits = some_buffer();
    uint64_t page = number(20), total = 0;
    bool zeros = below(2);
    if (below(2) && b.size == a.size)
        memcpy(b.bytes, a.bytes, a.size);
    PyObject *answer, *args = Py_BuildValue("OOLO", a.view, zeros ? Py_None : b.view, (long long)page,
                                            bits.view);
    if (called(differing_pages, args, &bits, &answer)) {
        for (uint64_t i = 0; i < a.size / page; i++) {
            bool differs = false;
            for (uint64_t at = i * page; at < (i + 1) * page; at++)
                differs |= a.bytes[at] != (zeros ? 0 : b.bytes[at]);
            expect(bit(bits.bytes, i) == (differs || bit(bits.before, i)), "a page's bit");
            total += differs;
        }
        expect(as_number(answer) == total, "pages that differ");
    }
    drop_buffer(&a);
    drop_buffer(&b);
    drop_buffer(&bits);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    Py_InitializeEx(0);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data;
    input_end = data + size;
    switch (below(9)) {
    case 0: try_set_bits(); break;
    case 1: try_or_bits(); break;
    case 2: try_runs(false); break;
    case 3: try_runs(true); break;
    case 4: try_count_bits(); break;
    case 5: try_set_ranges(); break;
    case 6: try_or_pages(); break;
    case 7: try_tables(); break;
    default: try_differing_pages(); break;
    }
    return 0;
}
