// SPDX-License-Identifier: Apache-2.0
/*
 * Memory that is shared with an untrusted process.
 *
 * The owner of a file can truncate it at any moment. An access to a mapping beyond the end of its
 * file raises SIGBUS, which ends the process: one front end could kill the device of another. The
 * seal F_SEAL_SHRINK would forbid truncation, but only memfds have seals, and not every QEMU's RAM
 * is a memfd. A check of the size does not help: the file can still shrink before the access.
 *
 * So the signal is caught. Its handler replaces the whole mapping with private zero pages and marks
 * the mapping as lost. The access continues in this private memory, and its caller checks
 * afterwards whether the mapping was still whole. Wayland's compositors treat the buffers of their
 * clients in the same way.
 *
 * A SIGBUS at any other address goes to the previous handler.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

// Python's slots convert pointers to functions into pointers to data. POSIX defines this
// conversion, ISO C does not.
#define SLOT(function) (__extension__(void *)(function))

// A mapping for the signal handler, which may interrupt any thread. It is never freed; an `end` of
// 0 means that the entry is unused.
struct place {
    _Atomic uintptr_t start, end;
    atomic_bool lost;
};

enum { MAX_MAPPINGS = 1024 };

static struct place places[MAX_MAPPINGS];
static struct sigaction before;

static void on_bus_error(int number, siginfo_t *info, void *context) {
    (void)context;
    int saved_errno = errno;
    uintptr_t address = (uintptr_t)info->si_addr;
    for (size_t i = 0; info->si_code == BUS_ADRERR && i < MAX_MAPPINGS; i++) {
        uintptr_t start = places[i].start, end = places[i].end;
        if (address < start || address >= end)
            continue;
        places[i].lost = true;
        if (mmap((void *)start, end - start, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
            break;
        errno = saved_errno;
        return;
    }
    sigaction(number, &before, NULL);  // the access is repeated, and `before` handles its signal
    errno = saved_errno;
}

// Install the handler again for each mapping: Python's faulthandler, for example, may have replaced
// it since.
static bool catch_bus_errors(void) {
    struct sigaction now, wanted = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    sigemptyset(&wanted.sa_mask);
    if (sigaction(SIGBUS, NULL, &now))
        return false;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_bus_error)
        return true;
    before = now;
    return sigaction(SIGBUS, &wanted, NULL) == 0;
}

// The mapping ----------------------------------------------------------------------------------

typedef struct {
    PyObject_HEAD
    struct place *place;
    char *bytes;
    Py_ssize_t length;
} SharedMapping;

// The GIL is held, so two mappings cannot take the same entry.
static struct place *take_place(char *start, size_t size) {
    for (size_t i = 0; i < MAX_MAPPINGS; i++) {
        if (places[i].end)
            continue;
        places[i].lost = false;
        places[i].start = (uintptr_t)start;
        places[i].end = (uintptr_t)start + size;
        return places + i;
    }
    errno = ENOMEM;
    return NULL;
}

// Return the page size in which mappings of a file begin and end; 0 for an error.
static uint64_t page_bytes(int fd) {
    struct statfs status;
    if (fstatfs(fd, &status))
        return 0;
    return status.f_type == HUGETLBFS_MAGIC ? (uint64_t)status.f_bsize : (uint64_t)getpagesize();
}

static bool map(SharedMapping *self, int fd, uint64_t length, uint64_t offset) {
    uint64_t page = page_bytes(fd);
    if (!page || !catch_bus_errors())
        return false;
    uint64_t skipped = offset % page, size = (skipped + length + page - 1) / page * page;
    char *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(offset - skipped));
    if (start == MAP_FAILED)
        return false;
    self->place = take_place(start, size);
    if (!self->place) {
        munmap(start, size);
        return false;
    }
    self->bytes = start + skipped;
    self->length = (Py_ssize_t)length;
    return true;
}

static PyObject *new_mapping(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    int fd;
    Py_ssize_t length;
    long long offset;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "SharedMapping takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "inL", &fd, &length, &offset))
        return NULL;
    if (length < 1 || offset < 0) {
        PyErr_SetString(PyExc_ValueError, "SharedMapping: expected a length > 0 and an offset >= 0");
        return NULL;
    }
    allocfunc allocate = __extension__(allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    SharedMapping *self = (SharedMapping *)allocate(type, 0);
    if (self && !map(self, fd, (uint64_t)length, (uint64_t)offset)) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void free_mapping(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    struct place *place = ((SharedMapping *)object)->place;
    if (place) {
        char *start = (char *)place->start;
        size_t size = place->end - place->start;
        place->end = 0;
        munmap(start, size);
    }
    (__extension__(freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static int get_buffer(PyObject *object, Py_buffer *view, int flags) {
    SharedMapping *self = (SharedMapping *)object;
    return PyBuffer_FillInfo(view, object, self->bytes, self->length, 0, flags);
}

static PyObject *is_lost(PyObject *object, void *closure) {
    (void)closure;
    return PyBool_FromLong(((SharedMapping *)object)->place->lost);
}

static PyGetSetDef attributes[] = {
    {"lost", is_lost, NULL, "Whether the file was truncated under the mapping.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot mapping_slots[] = {
    {Py_tp_doc, "SharedMapping(fd, length, offset): a writable mapping of a file."},
    {Py_tp_new, SLOT(new_mapping)},
    {Py_tp_dealloc, SLOT(free_mapping)},
    {Py_tp_getset, attributes},
    {Py_bf_getbuffer, SLOT(get_buffer)},
    {0, NULL},
};

static PyType_Spec mapping_type = {
    .name = "dmaproof._mapping.SharedMapping",
    .basicsize = sizeof(SharedMapping),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = mapping_slots,
};

static int add_type(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &mapping_type, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, SLOT(add_type)}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_mapping", "Memory shared with an untrusted process.", 0, NULL,
    slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__mapping(void) {
    return PyModuleDef_Init(&definition);
}
