// SPDX-License-Identifier: Apache-2.0
/*
 * Atomics and memory-bandwidth loops, and nothing else.
 *
 * A bitmap is a run of bytes: bit n is bit n % 8 of byte n / 8. On the little-endian machines that
 * this is written for, that is the same as bit n % 64 of 64-bit word n / 64, wherever the words
 * begin, so a bitmap may start and end at any address: aligned words that lie wholly inside it are
 * used whole, the bytes at its ragged ends one by one. Nothing outside is ever touched.
 *
 * Bits of a shared bitmap are set with an atomic OR and taken with an atomic exchange. A bit that
 * is already set is not set again: the fence before that look is what makes it sound. Whoever takes
 * the bit later then finds the data that was written before the fence; without it the data might
 * still sit in a store buffer while the old bit is taken and the old data read.
 *
 * Every function checks its bounds before it writes, and works without the GIL.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bitmaps of little-endian words need a little-endian machine"
#endif

#define LIKELY(condition) __builtin_expect(!!(condition), 1)

enum { PREFETCH_AHEAD = 24 };

// Bitmaps ----------------------------------------------------------------------------------------

struct bitmap {
    uint8_t *bytes;
    uint64_t size;  // in bytes
};

// The mask of `count` bits from bit `first` of a word; first + count <= 64, count > 0.
static inline uint64_t mask_of(unsigned first, unsigned count) {
    return (~UINT64_C(0) >> (64 - count)) << first;
}

static inline unsigned or_byte(uint8_t *byte, uint8_t mask, bool shared) {
    uint8_t old = shared ? atomic_fetch_or((_Atomic uint8_t *)byte, mask) : *byte;
    if (!shared)
        *byte = old | mask;
    return __builtin_popcount(mask & ~old & 0xff);
}

static inline unsigned or_word(uint64_t *word, uint64_t mask, bool shared) {
    uint64_t old = atomic_load_explicit((_Atomic uint64_t *)word, memory_order_relaxed);
    if ((old & mask) == mask)
        return 0;
    if (shared)
        old = atomic_fetch_or((_Atomic uint64_t *)word, mask);
    else
        *word = old | mask;
    return __builtin_popcountll(mask & ~old);
}

/*
 * A bitmap cut at the machine's aligned words. `skew` bits of the first word lie before the bitmap;
 * words [whole, whole_end) lie wholly inside it.
 */
struct words {
    uint64_t *base;
    unsigned skew;
    uint64_t whole, whole_end;
};

static inline struct words words_of(struct bitmap map) {
    uintptr_t start = (uintptr_t)map.bytes, base = start & ~(uintptr_t)7;
    return (struct words){
        .base = (uint64_t *)base,
        .skew = (unsigned)(start - base) * 8,
        .whole = start != base,
        .whole_end = (start + map.size - base) / 8,
    };
}

// OR `mask` into word number `index`, byte by byte where the word is not wholly inside the bitmap.
static unsigned or_any_word(const struct words *words, uint64_t index, uint64_t mask, bool shared) {
    if (LIKELY(index >= words->whole && index < words->whole_end))
        return or_word(words->base + index, mask, shared);
    unsigned added = 0;
    uint8_t *bytes = (uint8_t *)(words->base + index);
    for (unsigned byte = 0; byte < 8; byte++) {
        uint8_t part = (uint8_t)(mask >> (8 * byte));
        if (part)
            added += or_byte(bytes + byte, part, shared);
    }
    return added;
}

static uint64_t load_any_word(const struct words *words, uint64_t index, uint64_t mask) {
    if (LIKELY(index >= words->whole && index < words->whole_end))
        return atomic_load_explicit((_Atomic uint64_t *)(words->base + index),
                                    memory_order_relaxed) & mask;
    uint64_t value = 0;
    const uint8_t *bytes = (const uint8_t *)(words->base + index);
    for (unsigned byte = 0; byte < 8; byte++) {
        if ((uint8_t)(mask >> (8 * byte)))
            value |= (uint64_t)bytes[byte] << (8 * byte);
    }
    return value & mask;
}

// Take the bits of `mask` out of word number `index`; returns those that were set.
static uint64_t take_any_word(const struct words *words, uint64_t index, uint64_t mask) {
    if (LIKELY(index >= words->whole && index < words->whole_end)) {
        _Atomic uint64_t *word = (_Atomic uint64_t *)(words->base + index);
        if (!(atomic_load_explicit(word, memory_order_relaxed) & mask))
            return 0;
        if (mask == ~UINT64_C(0))
            return atomic_exchange(word, 0);
        return atomic_fetch_and(word, ~mask) & mask;
    }
    uint64_t value = 0;
    uint8_t *bytes = (uint8_t *)(words->base + index);
    for (unsigned byte = 0; byte < 8; byte++) {
        uint8_t part = (uint8_t)(mask >> (8 * byte));
        if (part) {
            uint8_t old = atomic_fetch_and((_Atomic uint8_t *)(bytes + byte), (uint8_t)~part);
            value |= (uint64_t)(old & part) << (8 * byte);
        }
    }
    return value;
}

// Set `count` bits from `first` on; returns how many were not set before.
static uint64_t set_run(const struct words *words, uint64_t first, uint64_t count, bool shared) {
    uint64_t added = 0, bit = first + words->skew;
    while (count) {
        unsigned offset = bit % 64;
        unsigned here = count < 64 - offset ? (unsigned)count : 64 - offset;
        added += or_any_word(words, bit / 64, mask_of(offset, here), shared);
        bit += here;
        count -= here;
    }
    return added;
}

// The 64 bits (or the `count` that are wanted) from bit `first` on, which may lie across two words.
static inline uint64_t gather(const struct words *words, uint64_t first, unsigned count) {
    uint64_t bit = first + words->skew;
    unsigned offset = bit % 64;
    unsigned here = count < 64 - offset ? count : 64 - offset;
    uint64_t value = load_any_word(words, bit / 64, mask_of(offset, here)) >> offset;
    if (here < count)
        value |= load_any_word(words, bit / 64 + 1, mask_of(0, count - here)) << here;
    return value;
}

// How many words from `index` up to `end`, all inside the bitmap, are zero.
static inline uint64_t zero_words(const uint64_t *base, uint64_t index, uint64_t end) {
    uint64_t start = index;
    while (index + 8 <= end) {
        const uint64_t *w = base + index;
        if (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7])
            break;
        index += 8;
    }
    while (index < end && !base[index])
        index++;
    return index - start;
}

// Runs of set bits -------------------------------------------------------------------------------

struct runs {
    uint64_t *pairs;  // start, length
    size_t count, room;
    bool failed;
};

static void add_run(struct runs *runs, uint64_t start, uint64_t length) {
    if (runs->count) {
        uint64_t *last = runs->pairs + 2 * (runs->count - 1);
        if (last[0] + last[1] == start) {
            last[1] += length;
            return;
        }
    }
    if (runs->count == runs->room) {
        size_t room = runs->room ? 2 * runs->room : 256;
        uint64_t *pairs = realloc(runs->pairs, room * 2 * sizeof *pairs);
        if (!pairs) {
            runs->failed = true;
            return;
        }
        runs->pairs = pairs;
        runs->room = room;
    }
    runs->pairs[2 * runs->count] = start;
    runs->pairs[2 * runs->count + 1] = length;
    runs->count++;
}

// The runs of set bits among `count` bits from `first`, relative to it; taken out if `take`.
static struct runs find_runs(struct bitmap map, uint64_t first, uint64_t count, bool take) {
    struct words words = words_of(map);
    struct runs runs = {0};
    uint64_t bit = first + words.skew, end = bit + count, origin = bit;
    while (bit < end && !runs.failed) {
        unsigned offset = bit % 64;
        uint64_t index = bit / 64;
        if (offset == 0 && index >= words.whole) {
            uint64_t last = end / 64 < words.whole_end ? end / 64 : words.whole_end;
            if (index < last) {
                bit += 64 * zero_words(words.base, index, last);
                index = bit / 64;
                if (bit >= end)
                    break;
            }
        }
        unsigned here = end - bit < 64 - offset ? (unsigned)(end - bit) : 64 - offset;
        uint64_t mask = mask_of(offset, here);
        uint64_t value = take ? take_any_word(&words, index, mask)
                              : load_any_word(&words, index, mask);
        while (value) {
            unsigned start = (unsigned)__builtin_ctzll(value);
            uint64_t rest = ~(value >> start);
            unsigned length = rest ? (unsigned)__builtin_ctzll(rest) : 64;
            if (length > 64 - start)
                length = 64 - start;
            add_run(&runs, index * 64 + start - origin, length);
            value &= ~mask_of(start, length);
        }
        bit += here;
    }
    return runs;
}

// Arguments --------------------------------------------------------------------------------------

static int refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return -1;
}

static int check_bits(const Py_buffer *view, uint64_t first, uint64_t count, const char *name) {
    uint64_t bits = (uint64_t)view->len * 8;
    if (first > bits || count > bits - first) {
        PyErr_Format(PyExc_ValueError, "%s: %llu bits from bit %llu on, of a bitmap with %llu", name,
                     (unsigned long long)count, (unsigned long long)first,
                     (unsigned long long)bits);
        return -1;
    }
    return 0;
}

static struct bitmap bitmap_of(const Py_buffer *view) {
    return (struct bitmap){view->buf, (uint64_t)view->len};
}

static PyObject *fence(PyObject *module, PyObject *none) {
    (void)module, (void)none;
    atomic_thread_fence(memory_order_seq_cst);
    Py_RETURN_NONE;
}

static PyObject *set_bits(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer data;
    unsigned long long first, count;
    int shared = 1;
    if (!PyArg_ParseTuple(args, "w*KK|p", &data, &first, &count, &shared))
        return NULL;
    uint64_t added = 0;
    int bad = check_bits(&data, first, count, "set_bits");
    if (!bad) {
        struct words words = words_of(bitmap_of(&data));
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        added = set_run(&words, first, count, shared);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return bad ? NULL : PyLong_FromUnsignedLongLong(added);
}

/*
 * set_ranges(data, iova, last, page_shift, iovas, lengths, shared) -> bits newly set
 *
 * For a bitmap over the bytes [iova, last], both included so that 2^64 can be the end.
 */
static PyObject *set_ranges(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer data, iovas, lengths;
    unsigned long long base, last;
    unsigned shift;
    int shared;
    if (!PyArg_ParseTuple(args, "w*KKIy*y*p", &data, &base, &last, &shift, &iovas, &lengths,
                          &shared))
        return NULL;
    uint64_t added = 0;
    const uint64_t *starts = iovas.buf, *sizes = lengths.buf;
    size_t count = (size_t)iovas.len / 8, outside = count;
    int bad = 0;
    if (iovas.len != lengths.len || iovas.len % 8 || shift > 63 || last < base)
        bad = refuse("set_ranges: arrays of 64-bit words, of one length, are due");
    else
        bad = check_bits(&data, 0, (last >> shift) - (base >> shift) + 1, "set_ranges");
    if (!bad) {
        Py_BEGIN_ALLOW_THREADS
        for (size_t i = 0; i < count; i++) {
            if (starts[i] < base || starts[i] > last || !sizes[i] || sizes[i] - 1 > last - starts[i]) {
                outside = i;
                break;
            }
        }
        if (outside == count) {
            struct words words = words_of(bitmap_of(&data));
            uint64_t origin = base >> shift;
            atomic_thread_fence(memory_order_seq_cst);
            for (size_t i = 0; i < count; i++) {
                if (i + PREFETCH_AHEAD < count) {
                    uint64_t ahead = (starts[i + PREFETCH_AHEAD] >> shift) - origin + words.skew;
                    __builtin_prefetch(words.base + ahead / 64, 1);
                }
                uint64_t first = starts[i] >> shift;
                uint64_t end = (starts[i] + (sizes[i] - 1)) >> shift;
                if (LIKELY(first == end)) {
                    uint64_t bit = first - origin + words.skew;
                    added += or_any_word(&words, bit / 64, UINT64_C(1) << bit % 64, shared);
                } else {
                    added += set_run(&words, first - origin, end - first + 1, shared);
                }
            }
        }
        Py_END_ALLOW_THREADS
        if (outside < count) {
            PyErr_Format(PyExc_ValueError,
                         "range %zu (IOVA %#llx + %#llx) is empty or not inside [%#llx, %#llx]",
                         outside, (unsigned long long)starts[outside],
                         (unsigned long long)sizes[outside], base, last);
            bad = -1;
        }
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&iovas);
    PyBuffer_Release(&lengths);
    return bad ? NULL : PyLong_FromUnsignedLongLong(added);
}

static uint64_t or_bitmap(struct bitmap into, uint64_t into_bit, struct bitmap from,
                          uint64_t from_bit, uint64_t count) {
    struct words to = words_of(into), source = words_of(from);
    uint64_t added = 0, done = 0;
    atomic_thread_fence(memory_order_seq_cst);
    while (done < count) {
        uint64_t bit = into_bit + done + to.skew, source_bit = from_bit + done + source.skew;
        unsigned offset = bit % 64;
        if (source_bit % 64 == 0 && source_bit / 64 >= source.whole) {
            uint64_t end = (source_bit + (count - done)) / 64;
            if (end > source.whole_end)
                end = source.whole_end;
            if (source_bit / 64 < end) {
                done += 64 * zero_words(source.base, source_bit / 64, end);
                if (done >= count)
                    break;
                bit = into_bit + done + to.skew;
            }
        }
        unsigned here = count - done < 64 - offset ? (unsigned)(count - done) : 64 - offset;
        uint64_t value = gather(&source, from_bit + done, here);
        if (value)
            added += or_any_word(&to, bit / 64, value << offset, true);
        done += here;
    }
    return added;
}

static PyObject *or_bits(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer into, from;
    unsigned long long into_bit, from_bit, count;
    if (!PyArg_ParseTuple(args, "w*Ky*KK", &into, &into_bit, &from, &from_bit, &count))
        return NULL;
    uint64_t added = 0;
    int bad = check_bits(&into, into_bit, count, "or_bits, target") ||
              check_bits(&from, from_bit, count, "or_bits, source");
    if (!bad) {
        Py_BEGIN_ALLOW_THREADS
        added = or_bitmap(bitmap_of(&into), into_bit, bitmap_of(&from), from_bit, count);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&into);
    PyBuffer_Release(&from);
    return bad ? NULL : PyLong_FromUnsignedLongLong(added);
}

static PyObject *runs_of(PyObject *args, const char *format, bool take) {
    Py_buffer data;
    unsigned long long first, count;
    if (!PyArg_ParseTuple(args, format, &data, &first, &count))
        return NULL;
    struct runs runs = {0};
    int bad = check_bits(&data, first, count, "runs");
    if (!bad) {
        Py_BEGIN_ALLOW_THREADS
        runs = find_runs(bitmap_of(&data), first, count, take);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    PyObject *answer = NULL;
    if (runs.failed)
        PyErr_NoMemory();
    else if (!bad)
        answer = PyBytes_FromStringAndSize((const char *)runs.pairs,
                                           (Py_ssize_t)(runs.count * 2 * sizeof *runs.pairs));
    free(runs.pairs);
    return answer;
}

static PyObject *find_set(PyObject *module, PyObject *args) {
    (void)module;
    return runs_of(args, "y*KK", false);
}

static PyObject *take_set(PyObject *module, PyObject *args) {
    (void)module;
    return runs_of(args, "w*KK", true);
}

static PyObject *count_bits(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer data;
    unsigned long long first, count;
    if (!PyArg_ParseTuple(args, "y*KK", &data, &first, &count))
        return NULL;
    uint64_t total = 0;
    int bad = check_bits(&data, first, count, "count_bits");
    if (!bad) {
        struct words words = words_of(bitmap_of(&data));
        Py_BEGIN_ALLOW_THREADS
        uint64_t bit = first + words.skew, end = bit + count;
        while (bit < end) {
            unsigned offset = bit % 64;
            unsigned here = end - bit < 64 - offset ? (unsigned)(end - bit) : 64 - offset;
            total += (unsigned)__builtin_popcountll(
                load_any_word(&words, bit / 64, mask_of(offset, here)));
            bit += here;
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return bad ? NULL : PyLong_FromUnsignedLongLong(total);
}

static bool all_zero(const uint8_t *page, size_t size) {
    return size == 0 || (page[0] == 0 && memcmp(page, page + 1, size - 1) == 0);
}

/*
 * differing_pages(a, b, page_size, differing) -> pages that differ
 *
 * Sets the bit of each page of `a` that differs from `b`'s; `b` None stands for zeros.
 */
static PyObject *differing_pages(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer a, b = {0}, differing;
    PyObject *other;
    Py_ssize_t page_size;
    if (!PyArg_ParseTuple(args, "y*Onw*", &a, &other, &page_size, &differing))
        return NULL;
    int bad = 0;
    uint64_t total = 0;
    if (other != Py_None)
        bad = PyObject_GetBuffer(other, &b, PyBUF_SIMPLE);
    if (!bad && (page_size < 1 || a.len % page_size || (b.obj && b.len != a.len)))
        bad = refuse("differing_pages: two runs of whole pages, of one size, are due");
    if (!bad)
        bad = check_bits(&differing, 0, (uint64_t)(a.len / page_size), "differing_pages");
    if (!bad) {
        const uint8_t *left = a.buf, *right = b.buf;
        uint8_t *bits = differing.buf;
        size_t size = (size_t)page_size, pages = (size_t)a.len / size;
        Py_BEGIN_ALLOW_THREADS
        for (size_t page = 0; page < pages; page++) {
            bool equal = right ? memcmp(left + page * size, right + page * size, size) == 0
                               : all_zero(left + page * size, size);
            if (!equal) {
                bits[page / 8] |= (uint8_t)(1 << page % 8);
                total++;
            }
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    PyBuffer_Release(&differing);
    return bad ? NULL : PyLong_FromUnsignedLongLong(total);
}

static PyMethodDef methods[] = {
    {"fence", fence, METH_NOARGS, "A full memory barrier (C11 seq_cst)."},
    {"set_bits", set_bits, METH_VARARGS,
     "set_bits(data, first_bit, bits, shared=True) -> bits newly set"},
    {"set_ranges", set_ranges, METH_VARARGS,
     "set_ranges(data, iova, last, page_shift, iovas, lengths, shared) -> bits newly set"},
    {"or_bits", or_bits, METH_VARARGS,
     "or_bits(into, into_bit, from, from_bit, bits) -> bits newly set"},
    {"find_set", find_set, METH_VARARGS, "find_set(data, first_bit, bits) -> (start, length) pairs"},
    {"take_set", take_set, METH_VARARGS,
     "take_set(data, first_bit, bits) -> (start, length) pairs, cleared atomically"},
    {"count_bits", count_bits, METH_VARARGS, "count_bits(data, first_bit, bits) -> set bits"},
    {"differing_pages", differing_pages, METH_VARARGS,
     "differing_pages(a, b, page_size, differing) -> pages that differ"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_core", "Atomics and memory-bandwidth loops.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&definition);
}
