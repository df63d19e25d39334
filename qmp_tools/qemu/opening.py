"""Open a QEMU in each form in which a caller can name it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from dmaproof.errors import UsageError

from ..arguments import AnyPath, require
from ..host.timeout import DEFAULT_TIMEOUT_S
from .attachment import attach
from .borrowed_monitor import borrow, is_client
from .libvirt_domain import domain_address, open_domain
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
"""A QEMU as a caller can name it: its handle, the path of its QMP socket, the URI of a libvirt
domain (`libvirt_domain`), or an object of a test that executes QMP (`borrowed_monitor`)."""


@contextlib.asynccontextmanager
async def open_qemu(
    name: str, given: AnyQemu, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> AsyncIterator[Qemu]:
    """Connect to a running QEMU.

    Args:
        name: the name of the QEMU in messages.
        given: the path of its QMP socket, the URI of its libvirt domain (qemu:///system/NAME), or
            an object that executes QMP commands, such as a QEMUMachine or a QMPClient.
        timeout_s: the bound of the wait for each answer. If `given` is a socket, a tenth of it
            bounds the wait for the greeting, which QEMU sends at once unless the socket serves
            another client.

    Yields:
        The QEMU.

    Raises:
        UsageError: `given` is not a QEMU in any of these forms.
        UntestableError: the QEMU cannot be reached; the message says why.
    """
    require("name", name, str, "a name")
    require("timeout_s", timeout_s, (int, float), "seconds")
    require_openable(name, given)
    if isinstance(given, Qemu):
        yield given
    elif path := socket_path(given):
        async with attach(name, path, timeout_s=timeout_s) as qemu:
            yield qemu
    elif isinstance(given, str) and (domain := domain_address(given)):
        async with open_domain(name, domain, timeout_s=timeout_s) as qemu:
            yield qemu
    else:
        async with borrow(name, given, timeout_s=timeout_s) as qemu:
            yield qemu


def socket_path(given: object) -> Path | None:
    """Return the path of a socket that was `given`; None for all other forms of `AnyQemu`."""
    if not isinstance(given, (str, os.PathLike)):
        return None
    return None if isinstance(given, str) and domain_address(given) else Path(given)


def require_openable(name: str, given: object) -> None:
    """Require that `given` has one of the forms of `AnyQemu`.

    Raises:
        UsageError: it has none.
    """
    if not isinstance(given, (Qemu, str, os.PathLike)) and not is_client(given):
        raise UsageError(
            f"{name}: expected the path of a QMP socket, the URI of a libvirt domain, or an "
            f"object with a method cmd() or execute(), such as a QEMUMachine, got {given!r} "
            f"({type(given).__name__})"
        )
