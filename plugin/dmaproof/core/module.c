// SPDX-License-Identifier: Apache-2.0
/*
 * The module `_core`: only atomics and memory-bandwidth loops. This file converts their arguments
 * from Python; each kind of loop has its own file.
 *
 * Every function checks its bounds before it writes, and releases the GIL. A bit that is already
 * set is not set again. The fence before the check of the bit makes this sound: a process that
 * takes the bit later finds the data that was written before the fence. Without the fence the data
 * might still be in a store buffer while another process takes the old bit and reads the old data.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "merge.h"
#include "page_compare.h"
#include "page_table.h"
#include "ranges.h"
#include "runs.h"

#include <stdlib.h>

static int refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return -1;
}

static struct bitmap bitmap_of_buffer(const Py_buffer *view) {
    return bitmap_of(view->buf, (size_t)view->len);
}

static int check_bits(const Py_buffer *view, uint64_t first, uint64_t count, const char *name) {
    uint64_t bits = (uint64_t)view->len * 8;
    if (first > bits || count > bits - first) {
        PyErr_Format(PyExc_ValueError, "%s: %llu bits from bit %llu on exceed a bitmap of %llu bits",
                     name, (unsigned long long)count, (unsigned long long)first,
                     (unsigned long long)bits);
        return -1;
    }
    return 0;
}

// Check the last bit, which is included: a count would overflow for all of 2^64 pages.
static int check_last_bit(const Py_buffer *view, uint64_t last, const char *name) {
    return check_bits(view, last, 1, name);
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
    int refused = check_bits(&data, first, count, "set_bits");
    if (!refused) {
        struct bitmap map = bitmap_of_buffer(&data);
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        added = set_run(&map, first, count, shared);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return refused ? NULL : PyLong_FromUnsignedLongLong(added);
}

static PyObject *set_ranges(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer data, iovas, lengths = {0};
    unsigned long long first, last, length = 0;
    unsigned shift;
    int shared;
    PyObject *of_each;
    if (!PyArg_ParseTuple(args, "w*KKIy*Op", &data, &first, &last, &shift, &iovas, &of_each,
                          &shared))
        return NULL;
    uint64_t added = 0;
    int refused = 0;
    if (PyLong_Check(of_each)) {
        length = PyLong_AsUnsignedLongLong(of_each);
        refused = PyErr_Occurred() != NULL;
    } else {
        refused = PyObject_GetBuffer(of_each, &lengths, PyBUF_SIMPLE);
    }
    if (!refused && ((lengths.obj && iovas.len != lengths.len) || iovas.len % 8 || shift > 63 ||
                     last < first))
        refused = refuse("set_ranges: expected two arrays of 64-bit words with the same length");
    if (!refused)
        refused = check_last_bit(&data, (last >> shift) - (first >> shift), "set_ranges");
    if (!refused) {
        struct bitmap map = bitmap_of_buffer(&data);
        struct ranges ranges = {iovas.buf, lengths.buf, length, (size_t)iovas.len / 8,
                                first,     last,        shift};
        struct survey survey;
        Py_BEGIN_ALLOW_THREADS
        survey = survey_ranges(&ranges);
        if (survey.inside) {
            atomic_thread_fence(memory_order_seq_cst);
            added = set_each_range(&map, &ranges, survey, shared);
        }
        Py_END_ALLOW_THREADS
        if (!survey.inside)
            refused = refuse("set_ranges: a range is empty or not wholly inside the bitmap");
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&iovas);
    PyBuffer_Release(&lengths);
    return refused ? NULL : PyLong_FromUnsignedLongLong(added);
}

static PyObject *or_bits(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer into, from;
    unsigned long long into_bit, from_bit, count;
    int shared = 1;
    if (!PyArg_ParseTuple(args, "w*Ky*KK|p", &into, &into_bit, &from, &from_bit, &count, &shared))
        return NULL;
    uint64_t added = 0;
    int refused = check_bits(&into, into_bit, count, "or_bits, target") ||
                  check_bits(&from, from_bit, count, "or_bits, source");
    if (!refused) {
        struct bitmap target = bitmap_of_buffer(&into), source = bitmap_of_buffer(&from);
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        added = merge(&target, into_bit, &source, from_bit, count, shared);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&into);
    PyBuffer_Release(&from);
    return refused ? NULL : PyLong_FromUnsignedLongLong(added);
}

// OR by IOVA, into a bitmap with another page size.
static PyObject *or_pages(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer into, from;
    unsigned long long into_page, from_page, iova, last;
    unsigned into_shift, from_shift;
    int shared = 1;
    if (!PyArg_ParseTuple(args, "w*KIy*KIKK|p", &into, &into_page, &into_shift, &from, &from_page,
                          &from_shift, &iova, &last, &shared))
        return NULL;
    uint64_t added = 0;
    bool done = true;
    int refused = 0;
    if (into_shift > 63 || from_shift > 63 || last < iova || iova >> into_shift < into_page ||
        iova >> from_shift < from_page)
        refused = refuse("or_pages: the range begins before a bitmap, or is empty");
    if (!refused)
        refused = check_last_bit(&into, (last >> into_shift) - into_page, "or_pages, target") ||
                  check_last_bit(&from, (last >> from_shift) - from_page, "or_pages, source");
    if (!refused) {
        struct page_bitmap target = {bitmap_of_buffer(&into), into_page, into_shift};
        struct page_bitmap source = {bitmap_of_buffer(&from), from_page, from_shift};
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        done = merge_pages(&target, &source, iova, last, shared, &added);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&into);
    PyBuffer_Release(&from);
    if (!done)
        PyErr_NoMemory();
    return refused || !done ? NULL : PyLong_FromUnsignedLongLong(added);
}

static PyObject *give_runs(struct runs *runs, bool refused) {
    PyObject *answer = NULL;
    if (runs->failed)
        PyErr_NoMemory();
    else if (!refused)
        answer = PyBytes_FromStringAndSize((const char *)runs->pairs,
                                           (Py_ssize_t)(runs->count * 2 * sizeof *runs->pairs));
    free(runs->pairs);
    return answer;
}

static PyObject *runs_of(PyObject *args, const char *format, bool take) {
    Py_buffer data;
    unsigned long long first, count;
    if (!PyArg_ParseTuple(args, format, &data, &first, &count))
        return NULL;
    struct runs runs = {0};
    int refused = check_bits(&data, first, count, "runs");
    if (!refused) {
        struct bitmap map = bitmap_of_buffer(&data);
        Py_BEGIN_ALLOW_THREADS
        find_runs(&runs, &map, first, count, take);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return give_runs(&runs, refused);
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
    int refused = check_bits(&data, first, count, "count_bits");
    if (!refused) {
        struct bitmap map = bitmap_of_buffer(&data);
        Py_BEGIN_ALLOW_THREADS
        total = count_set(&map, first, count);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return refused ? NULL : PyLong_FromUnsignedLongLong(total);
}

// `layout` is a TableLayout (page_table.py), which is a tuple. `clear` is the optional last
// argument.
static int walk_table(PyObject *args, const char *format, struct page_table *table) {
    Py_buffer memory;
    unsigned long long root, present, dirty, address, kind, table_kind, group_kind, iova, last;
    unsigned levels;
    int clear = 0;
    if (!PyArg_ParseTuple(args, format, &memory, &root, &levels, &present, &dirty, &address, &kind,
                          &table_kind, &group_kind, &iova, &last, &clear))
        return -1;
    table->memory = memory.buf;
    table->size = (uint64_t)memory.len;
    table->present = present;
    table->dirty = dirty;
    table->address = address;
    table->kind = kind;
    table->table_kind = table_kind;
    table->group_kind = group_kind;
    table->iova = iova;
    table->last = last;
    table->clear = clear;
    int refused = 0;
    if (levels < 1 || levels > 6 || (uintptr_t)memory.buf % 8 || last < iova)
        refused = refuse("walk: expected 1 to 6 levels, memory aligned to 8 bytes and a range of "
                         "at least 1 byte");
    if (!refused) {
        Py_BEGIN_ALLOW_THREADS
        atomic_thread_fence(memory_order_seq_cst);
        walk_page_table(table, root, levels, 0);
        Py_END_ALLOW_THREADS
        if (table->corrupt)
            refused = refuse("walk: an entry points to a table outside the tables' memory");
    }
    PyBuffer_Release(&memory);
    return refused;
}

static PyObject *mark_table(PyObject *module, PyObject *args) {
    (void)module;
    struct page_table table = {.mark = true};
    if (walk_table(args, "w*(KIKKKKKK)KK", &table))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *read_table(PyObject *module, PyObject *args) {
    (void)module;
    struct page_table table = {0};
    int refused = walk_table(args, "w*(KIKKKKKK)KKp", &table);
    return give_runs(&table.runs, refused);
}

/*
 * differing_pages(a, b, page_size, differing) -> pages that differ
 *
 * Set the bit of each page that differs in `a` and `b`; None for `b` stands for zeros.
 */
static PyObject *differing_pages(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer a, b = {0}, differing;
    PyObject *other;
    Py_ssize_t page_size;
    if (!PyArg_ParseTuple(args, "y*Onw*", &a, &other, &page_size, &differing))
        return NULL;
    int refused = 0;
    uint64_t total = 0;
    if (other != Py_None)
        refused = PyObject_GetBuffer(other, &b, PyBUF_SIMPLE);
    if (!refused && (page_size < 1 || a.len % page_size || (b.obj && b.len != a.len)))
        refused = refuse("differing_pages: expected two buffers of whole pages with the same size");
    if (!refused)
        refused = check_bits(&differing, 0, (uint64_t)(a.len / page_size), "differing_pages");
    if (!refused) {
        Py_BEGIN_ALLOW_THREADS
        total = compare_pages(a.buf, b.buf, (size_t)page_size, (size_t)(a.len / page_size),
                              differing.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    PyBuffer_Release(&differing);
    return refused ? NULL : PyLong_FromUnsignedLongLong(total);
}

static PyMethodDef methods[] = {
    {"fence", fence, METH_NOARGS, "A full memory barrier (C11 seq_cst)."},
    {"set_bits", set_bits, METH_VARARGS,
     "set_bits(data, first_bit, bits, shared=True) -> bits newly set"},
    {"set_ranges", set_ranges, METH_VARARGS,
     "set_ranges(data, iova, last, page_shift, iovas, lengths, shared) -> bits newly set; "
     "lengths: an array, or one number for all ranges"},
    {"or_bits", or_bits, METH_VARARGS,
     "or_bits(into, into_bit, source, source_bit, bits, shared=True) -> bits newly set"},
    {"or_pages", or_pages, METH_VARARGS,
     "or_pages(into, page, shift, source, page, shift, iova, last, shared=True) -> newly set"},
    {"find_set", find_set, METH_VARARGS, "find_set(data, first_bit, bits) -> (start, length) pairs"},
    {"take_set", take_set, METH_VARARGS,
     "take_set(data, first_bit, bits) -> (start, length) pairs, cleared atomically"},
    {"count_bits", count_bits, METH_VARARGS, "count_bits(data, first_bit, bits) -> set bits"},
    {"mark_table", mark_table, METH_VARARGS,
     "mark_table(memory, layout, iova, last): set dirty bits"},
    {"read_table", read_table, METH_VARARGS,
     "read_table(memory, layout, iova, last, clear) -> (iova, length) pairs"},
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
