"""Load libvirt-python, which is installed only for users of libvirt, and serve its event loop.

libvirt's event loop belongs to the whole program, and events of libvirt arrive only while it runs.
A daemon thread runs it from the first use of libvirt on. If the program has registered another
implementation before, libvirt keeps that one.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from typing import Any, Final

from dmaproof.errors import UntestableError

from ..host import distribution

_MODULES: Final = ("libvirt", "libvirt_qemu")


class LibvirtMissingError(UntestableError):
    """The Python package libvirt-python is not installed."""


@functools.cache
def load_libvirt() -> tuple[Any, Any]:
    """Return the modules `libvirt` and `libvirt_qemu`.

    Raises:
        LibvirtMissingError: libvirt-python is not installed.
    """
    try:
        libvirt, libvirt_qemu = (importlib.import_module(module) for module in _MODULES)
    except ImportError as error:
        headers = distribution.python_headers(sys.version_info.minor)
        needs = (distribution.COMPILER, headers, distribution.LIBVIRT_HEADERS)
        raise LibvirtMissingError(
            f"domains of libvirt need libvirt-python ({error}): install the extra "
            "'dmaproof[libvirt]' with pip, which compiles it and needs a C compiler, pkg-config "
            f"and the headers of libvirt and Python: {distribution.how_to_install(*needs)}"
        ) from None
    # Each error also comes as an exception; by default, libvirt prints it to stderr as well.
    libvirt.registerErrorHandler(_ignore_error, None)
    # Connections that are opened before this call would have no events.
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(
        target=_serve_events, args=(libvirt,), name="dmaproof-libvirt", daemon=True
    ).start()
    return libvirt, libvirt_qemu


def _ignore_error(_context: None, _error: object) -> None:
    pass


def _serve_events(libvirt: Any) -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
