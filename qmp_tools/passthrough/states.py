"""The device's migration by VFIO's states: walked, transferred, and failed on purpose.

This is what QEMU relies on in the other proofs; if it is not so, they prove nothing.
"""

from __future__ import annotations

import errno
import os
from typing import Any, Final

import numpy as np

from dmaproof.units import PAGE_BYTES
from dmaproof.vfio.abi import MigrationFlag, MigrationState
from dmaproof.vfio.device import VfioDevice, precopy_bytes
from dmaproof.vfio.requests import VfioError

from .fake_device import injected
from .fake_driver import IOVA, by_either
from .outcome import LackingError, require

_ALL: Final = MigrationFlag.STOP_COPY | MigrationFlag.P2P | MigrationFlag.PRE_COPY


def _one_page(iova: int = IOVA) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.array([iova], dtype=np.uint64), np.array([PAGE_BYTES], dtype=np.uint64)


def _read_all(fd: int) -> tuple[bytes, int]:
    """What a session has to give now, and the errno that ended it (0: the end)."""
    data = b""
    while True:
        try:
            piece = os.read(fd, 65536)
        except OSError as error:
            return data, error.errno or 0
        if not piece:
            return data, 0
        data += piece


def _refused(device: VfioDevice, state: MigrationState) -> int:
    """The errno with which the device refuses to enter `state`; 0 if it does not."""
    try:
        fd = device.set_state(state)
    except VfioError as error:
        return error.number
    if fd is not None:
        os.close(fd)
    return 0


def _save(device: VfioDevice) -> bytes:
    """The device's state by way of PRE_COPY."""
    fd = device.set_state(MigrationState.PRE_COPY)
    require(fd is not None, "entering PRE_COPY gave no session")
    assert fd is not None
    try:
        initial, _ = precopy_bytes(fd)
        require(initial > 0, "PRE_COPY has no initial bytes")
        first, ended_by = _read_all(fd)
        require(len(first) == initial, f"{len(first)} bytes came of {initial} in PRE_COPY")
        require(ended_by == errno.ENOMSG, f"PRE_COPY's data ended by errno {ended_by}, not ENOMSG")
        require(precopy_bytes(fd)[0] == 0, "initial bytes are left that were read")
        require(device.set_state(MigrationState.STOP_COPY) is None, "STOP_COPY: another session")
        last, ended_by = _read_all(fd)
        require(bool(last) and not ended_by, f"STOP_COPY gave {len(last)} bytes, errno {ended_by}")
    finally:
        os.close(fd)
    return first + last


def _load(device: VfioDevice, data: bytes) -> int:
    """Load a state; the errno with which leaving RESUMING is refused, or 0."""
    fd = device.set_state(MigrationState.RESUMING)
    require(fd is not None, "entering RESUMING gave no session")
    assert fd is not None
    try:
        os.write(fd, data)
        return _refused(device, MigrationState.STOP)
    finally:
        os.close(fd)


def _check_flags(device: VfioDevice) -> None:
    flags = device.migration()
    if not flags & MigrationFlag.PRE_COPY:  # before Linux 6.2
        raise LackingError(f"this kernel's devices have no PRE_COPY, but {flags!r}")
    require(flags == _ALL, f"{flags!r}")


def transfer() -> tuple[str, dict[str, Any]]:
    """Save one device, load another: it goes on where the first stopped."""
    with by_either() as source, by_either() as destination:
        _check_flags(source.device)
        source.device.start_logging([source.window], PAGE_BYTES)
        source.fake.write(*_one_page())
        data = _save(source.device)
        try:
            source.fake.write(*_one_page())
        except OSError as error:
            require(error.errno == errno.EBUSY, f"a write in STOP_COPY: errno {error.errno}")
        else:
            require(False, "the device writes in STOP_COPY")
        bits = source.device.report(*source.window, PAGE_BYTES)
        require(int(np.bitwise_count(bits).sum()) == 1, "what was written last is not reported")
        require(_load(destination.device, data) == 0, "the state is refused")
        destination.device.set_state(MigrationState.RUNNING)
        destination.fake.write(*_one_page())
        numbers = [int(it.fake.registers()["sequence"]) for it in (source, destination)]
        require(numbers[1] == numbers[0] + 1, f"writes {numbers}: it did not go on from there")
    return f"{len(data)} bytes of state; the destination went on with write {numbers[1]}", {}


def refusals() -> tuple[str, dict[str, Any]]:
    """Ways that are none, state that is none, and a device that fails on each way."""
    with by_either() as driver, by_either() as other:
        device = driver.device
        _check_flags(device)
        data = _save(device)
        for state in (MigrationState.PRE_COPY, MigrationState.PRE_COPY_P2P):
            require(_refused(device, state) == errno.EINVAL, f"STOP_COPY → {state.name} is a way")
        require(_refused(device, MigrationState.ERROR) == errno.EINVAL, "ERROR can be asked for")
        record = len(data) // 2
        spoilt = (b"x", data[:-1], data[:record], b"\xff" + data[1:], data[record:] * 2)
        for wrong in spoilt:
            require(_load(other.device, wrong) == errno.EINVAL, "a spoilt state is taken")
            other.device.reset()
        device.reset()
        failing = [state for state in MigrationState if state is not MigrationState.ERROR]
        for state in failing:
            if state is MigrationState.RUNNING:  # that is where it is
                device.set_state(MigrationState.STOP)
            with injected(fail_state=int(state)):
                require(_refused(device, state) == errno.EIO, f"{state.name} does not fail")
            require(device.state is MigrationState.ERROR, f"{device.state!r} after a failure")
            require(_refused(device, MigrationState.RUNNING) == errno.EINVAL, "a way leaves ERROR")
            device.reset()
            require(device.state is MigrationState.RUNNING, "reset does not end ERROR")
    return f"{len(spoilt)} spoilt states refused, {len(failing)} failures ended by reset", {}
