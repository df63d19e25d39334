"""Open a QEMU in each form in which a caller can name it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from dmaproof.errors import UsageError

from ..arguments import AnyPath
from ..host.timeout import DEFAULT_TIMEOUT_S
from .attachment import attach
from .borrowed_monitor import borrow, is_client
from .qemu import Qemu


class HasCmd(Protocol):
    """A client that executes QMP commands with `cmd`, such as QEMUMachine."""

    @property
    def cmd(self) -> Callable[..., Any]:
        """Execute a command."""


class HasExecute(Protocol):
    """A client that executes QMP commands with `execute`, such as qemu.qmp's QMPClient."""

    @property
    def execute(self) -> Callable[..., Any]:
        """Execute a command."""


class HasMonitor(Protocol):
    """A virtual machine whose `monitor` is a client, as in avocado-vt."""

    @property
    def monitor(self) -> HasCmd | HasExecute:
        """The client."""


AnyQemu: TypeAlias = Qemu | AnyPath | HasCmd | HasExecute | HasMonitor
"""A QEMU as a caller can name it: its handle, the path of its QMP socket, or an object of a test
that executes QMP commands (`borrowed_monitor`)."""


@contextlib.asynccontextmanager
async def open_qemu(
    name: str, given: AnyQemu, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> AsyncIterator[Qemu]:
    """Open the QEMU that the caller has `given`, called `name` in messages.

    Raises:
        UsageError: `given` is not a QEMU in any of these forms.
        UntestableError: the QEMU cannot be reached.
    """
    require_openable(name, given)
    if isinstance(given, Qemu):
        yield given
    elif isinstance(given, (str, os.PathLike)):
        async with attach(name, Path(given), timeout_s=timeout_s) as qemu:
            yield qemu
    else:
        async with borrow(name, given, timeout_s=timeout_s) as qemu:
            yield qemu


def require_openable(name: str, given: object) -> None:
    """Require that `given` has one of the forms of `AnyQemu`.

    Raises:
        UsageError: it has none.
    """
    if not isinstance(given, (Qemu, str, os.PathLike)) and not is_client(given):
        raise UsageError(
            f"{name}: expected the path of a QMP socket, or an object with a method cmd() or "
            f"execute(), such as a QEMUMachine, got {given!r} ({type(given).__name__})"
        )
