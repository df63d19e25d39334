"""VFIO's migration states of the fake device: a transfer, refused transitions, injected failures.

In the other proofs QEMU relies on these states, so those proofs are meaningless if these fail.
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
from .fake_driver import IOVA, any_driver
from .outcome import NotSupportedError, require

_ALL: Final = MigrationFlag.STOP_COPY | MigrationFlag.P2P | MigrationFlag.PRE_COPY


def _one_page(iova: int = IOVA) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.array([iova], dtype=np.uint64), np.array([PAGE_BYTES], dtype=np.uint64)


def _read_all(fd: int) -> tuple[bytes, int]:
    """Return the data that a session has now, and the errno that ended it (0: end of file)."""
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
    """Return the errno with which the device refuses to enter `state`, or 0 if it enters it."""
    try:
        fd = device.set_state(state)
    except VfioError as error:
        return error.number
    if fd is not None:
        os.close(fd)
    return 0


def _save(device: VfioDevice) -> bytes:
    """Save the device's state by way of PRE_COPY."""
    fd = device.set_state(MigrationState.PRE_COPY)
    require(fd is not None, "entering PRE_COPY returned no file")
    assert fd is not None
    try:
        initial, _ = precopy_bytes(fd)
        require(initial > 0, "PRE_COPY has no initial bytes")
        first, ended_by = _read_all(fd)
        require(len(first) == initial, f"PRE_COPY: read {len(first)} of {initial} initial bytes")
        require(
            ended_by == errno.ENOMSG,
            f"PRE_COPY's data ended with errno {ended_by}, expected ENOMSG",
        )
        require(precopy_bytes(fd)[0] == 0, "PRE_COPY still has initial bytes after all were read")
        require(
            device.set_state(MigrationState.STOP_COPY) is None,
            "entering STOP_COPY returned a second file",
        )
        last, ended_by = _read_all(fd)
        require(bool(last) and not ended_by, f"STOP_COPY: read {len(last)} bytes, errno {ended_by}")
    finally:
        os.close(fd)
    return first + last


def _load(device: VfioDevice, data: bytes) -> int:
    """Load a state; return the errno with which the device refuses to leave RESUMING, or 0."""
    fd = device.set_state(MigrationState.RESUMING)
    require(fd is not None, "entering RESUMING returned no file")
    assert fd is not None
    try:
        os.write(fd, data)
        return _refused(device, MigrationState.STOP)
    finally:
        os.close(fd)


def _check_flags(device: VfioDevice) -> None:
    flags = device.migration()
    if not flags & MigrationFlag.PRE_COPY:  # before Linux 6.2
        names = ", ".join(flag.name or "" for flag in flags)
        raise NotSupportedError(f"this kernel has no PRE_COPY: the device has only {names}")
    require(flags == _ALL, f"expected {_ALL!r}, got {flags!r}")


def transfer() -> tuple[str, dict[str, Any]]:
    """Save one device and load another, which must continue where the first one stopped."""
    with any_driver() as source, any_driver() as destination:
        _check_flags(source.device)
        source.device.start_logging([source.window], PAGE_BYTES)
        source.fake.write(*_one_page())
        data = _save(source.device)
        try:
            source.fake.write(*_one_page())
        except OSError as error:
            require(
                error.errno == errno.EBUSY,
                f"a write in STOP_COPY failed with errno {error.errno}, expected EBUSY",
            )
        else:
            require(False, "the device writes in STOP_COPY")
        bits = source.device.report(*source.window, PAGE_BYTES)
        require(
            int(np.bitwise_count(bits).sum()) == 1,
            "the last write before STOP_COPY is not reported",
        )
        require(_load(destination.device, data) == 0, "the destination refuses the state")
        destination.device.set_state(MigrationState.RUNNING)
        destination.fake.write(*_one_page())
        numbers = [int(side.fake.registers()["sequence"]) for side in (source, destination)]
        require(
            numbers[1] == numbers[0] + 1,
            f"the source ended with write {numbers[0]}, the destination began with {numbers[1]}",
        )
    return f"{len(data)} bytes of state; the destination continued with write {numbers[1]}", {}


def refusals() -> tuple[str, dict[str, Any]]:
    """Try invalid transitions, invalid state data, and a failure of every transition."""
    with any_driver() as driver, any_driver() as other:
        device = driver.device
        _check_flags(device)
        data = _save(device)
        for state in (MigrationState.PRE_COPY, MigrationState.PRE_COPY_P2P):
            require(
                _refused(device, state) == errno.EINVAL, f"STOP_COPY → {state.name} is accepted"
            )
        require(
            _refused(device, MigrationState.ERROR) == errno.EINVAL,
            "a transition to ERROR is accepted",
        )
        record = len(data) // 2
        corrupt = (b"x", data[:-1], data[:record], b"\xff" + data[1:], data[record:] * 2)
        for wrong in corrupt:
            require(_load(other.device, wrong) == errno.EINVAL, "corrupt state data is accepted")
            other.device.reset()
        device.reset()
        failing = [state for state in MigrationState if state is not MigrationState.ERROR]
        for state in failing:
            if state is MigrationState.RUNNING:  # the device is in RUNNING already
                device.set_state(MigrationState.STOP)
            with injected(fail_state=int(state)):
                require(
                    _refused(device, state) == errno.EIO,
                    f"the transition to {state.name} does not fail",
                )
            require(
                device.state is MigrationState.ERROR,
                f"the device is in {device.state!r} after a failure, expected ERROR",
            )
            require(
                _refused(device, MigrationState.RUNNING) == errno.EINVAL,
                "a transition from ERROR is accepted",
            )
            device.reset()
            require(device.state is MigrationState.RUNNING, "a reset does not end ERROR")
    return f"{len(corrupt)} corrupt states refused, {len(failing)} failures ended by reset", {}
