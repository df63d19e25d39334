// SPDX-License-Identifier: Apache-2.0
/*
 * Guest RAM that arrives while the device runs: the back end's userfaultfd of a postcopy migration.
 *
 * QEMU resolves the faults (vhost-user specification, VHOST_USER_POSTCOPY_ADVISE): the back end only
 * opens the userfaultfd, passes it on and registers its mappings. An access to a page that has not
 * arrived stops the thread in the kernel until QEMU has placed the page. The thread holds Python's
 * global lock, so the whole process waits.
 *
 * If QEMU dies meanwhile, no process is left to end that wait, because the back end's own descriptor
 * keeps the userfaultfd open. So a thread that needs no Python watches the front end's socket, and
 * closes the descriptor when the front end hangs up. The kernel then serves the fault with zeros
 * (userfaultfd_release), and the session finds the end of the connection.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// Python's slots convert pointers to functions into pointers to data. POSIX defines this
// conversion, ISO C does not.
#define SLOT(function) (__extension__(void *)(function))

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

typedef struct {
    PyObject_HEAD
    pthread_mutex_t lock;  // protects `fd`
    int fd;                // -1 after it was closed
    int socket, stop;      // what the thread waits for
    pthread_t thread;
    bool watched;
} Userfault;

static void close_fd(Userfault *self) {
    pthread_mutex_lock(&self->lock);
    if (self->fd >= 0)
        close(self->fd);
    self->fd = -1;
    pthread_mutex_unlock(&self->lock);
}

static void *watch(void *argument) {
    Userfault *self = argument;
    struct pollfd waited[] = {
        {.fd = self->socket, .events = POLLRDHUP},
        {.fd = self->stop, .events = POLLIN},
    };
    while (poll(waited, 2, -1) < 0 && errno == EINTR)
        ;
    if (waited[0].revents)
        close_fd(self);
    return NULL;
}

// Close the userfaultfd and end the thread. No access waits any more afterwards.
static void end(Userfault *self) {
    close_fd(self);
    if (self->watched) {
        eventfd_write(self->stop, 1);
        pthread_join(self->thread, NULL);
        self->watched = false;
    }
    if (self->socket >= 0)
        close(self->socket);
    if (self->stop >= 0)
        close(self->stop);
    self->socket = self->stop = -1;
}

static bool begin(Userfault *self, int socket) {
    self->socket = fcntl(socket, F_DUPFD_CLOEXEC, 0);
    self->stop = eventfd(0, EFD_CLOEXEC);
    self->fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (self->socket < 0 || self->stop < 0 || self->fd < 0)
        return false;
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(self->fd, UFFDIO_API, &api))
        return false;
    errno = pthread_create(&self->thread, NULL, watch, self);
    self->watched = errno == 0;
    return self->watched;
}

static PyObject *new_userfault(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    int socket;
    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Userfault takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "i", &socket))
        return NULL;
    allocfunc allocate = __extension__(allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Userfault *self = (Userfault *)allocate(type, 0);
    if (!self)
        return NULL;
    pthread_mutex_init(&self->lock, NULL);
    self->fd = self->socket = self->stop = -1;
    if (!begin(self, socket)) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void free_userfault(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    end((Userfault *)object);
    pthread_mutex_destroy(&((Userfault *)object)->lock);
    (__extension__(freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyObject *userfault_fileno(PyObject *object, PyObject *unused) {
    (void)unused;
    return PyLong_FromLong(((Userfault *)object)->fd);
}

// The pages that the mapping has so far are those of before the postcopy; the device must not use
// them. Transparent huge pages would hide missing pages in their neighbours.
static bool register_range(Userfault *self, void *start, size_t length) {
    struct uffdio_register range = {
        .range = {.start = (uintptr_t)start, .len = length},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (madvise(start, length, MADV_DONTNEED))
        return false;
    if (madvise(start, length, MADV_NOHUGEPAGE) && errno != EINVAL)  // a kernel without them
        return false;
    pthread_mutex_lock(&self->lock);
    int failed = ioctl(self->fd, UFFDIO_REGISTER, &range);
    pthread_mutex_unlock(&self->lock);
    return !failed;
}

static PyObject *userfault_register(PyObject *object, PyObject *mapping) {
    Py_buffer view;
    if (PyObject_GetBuffer(mapping, &view, PyBUF_WRITABLE))
        return NULL;
    bool done = register_range((Userfault *)object, view.buf, (size_t)view.len);
    int saved_errno = errno;
    PyBuffer_Release(&view);
    if (!done) {
        errno = saved_errno;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyObject *userfault_close(PyObject *object, PyObject *unused) {
    (void)unused;
    end((Userfault *)object);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"fileno", userfault_fileno, METH_NOARGS, "Return the file descriptor; -1 after it was closed."},
    {"register", userfault_register, METH_O, "Have accesses to missing pages of a mapping wait."},
    {"close", userfault_close, METH_NOARGS, "Close the file descriptor; no access waits any more."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot userfault_slots[] = {
    {Py_tp_doc, "Userfault(socket): a userfaultfd that is closed when the peer hangs up."},
    {Py_tp_new, SLOT(new_userfault)},
    {Py_tp_dealloc, SLOT(free_userfault)},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec userfault_type = {
    .name = "dmaproof._userfault.Userfault",
    .basicsize = sizeof(Userfault),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = userfault_slots,
};

static int add_type(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &userfault_type, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, SLOT(add_type)}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_userfault", "The userfaultfd of a postcopy migration.", 0, NULL,
    slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__userfault(void) {
    return PyModuleDef_Init(&definition);
}
