"""Load the library qemu.qmp even if another folder named ``qemu`` hides it.

``qemu`` is a namespace package: qemu.qmp installs no ``qemu/__init__.py``. If a folder ``qemu`` on
`sys.path` has such a file (tp-qemu's does), ``import qemu.qmp`` fails. After an import of qemu.qmp,
that folder cannot be imported. dmaproof therefore loads qemu.qmp from its folder under another
name, and leaves the name ``qemu`` to other packages.

The library is loaded at its first use, so that an `UntestableError` reports that it is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from dmaproof.errors import UntestableError

if TYPE_CHECKING:
    from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

__all__ = ["EventListener", "ExecuteError", "QMPClient", "QMPError", "folder"]

_NAME: Final = f"{__name__}.library"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_library(), name)


@cache
def _library() -> ModuleType:
    package = folder()
    spec = importlib.util.spec_from_file_location(
        _NAME, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = library  # the library's modules use relative imports
    spec.loader.exec_module(library)
    # Under this name, the library's logger is a child of dmaproof's. The library logs only details
    # of QMP, and raises the errors that matter.
    logger = logging.getLogger(_NAME)
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # pytest captures even records that do not propagate
    return library


def folder() -> Path:
    """Return the folder ``qemu/qmp`` of qemu.qmp.

    Raises:
        UntestableError: qemu.qmp is not installed.
    """
    for entry in sys.path:
        package = Path(entry, "qemu", "qmp")
        if (package / "qmp_client.py").is_file():
            return package.absolute()
    with contextlib.suppress(ImportError):  # an editable installation may have a finder instead
        spec = importlib.util.find_spec("qemu.qmp")
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0])
    raise UntestableError("qemu.qmp is not installed: pip install qemu.qmp")
