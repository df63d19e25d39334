"""Measure how fast a running guest's RAM gets dirty, by QEMU and by the vhost log.

QEMU's calc-dirty-rate has three modes. 'page-sampling' compares checksums of sampled pages, so it
sees the writes of vCPUs and devices alike. 'dirty-bitmap' and 'dirty-ring' count what the
accelerator logs.

Out-of-process devices report their writes in QEMU's vhost log, a memfd that exists while dirty
logging is on. This module only reads the log. QEMU takes the bits at its bitmap syncs, so a page
counts once between two syncs, and a bit that is set and taken between two reads is not counted.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.dirty_log import LOG_PAGE_BYTES
from dmaproof.errors import UntestableError, UsageError, WaitTimeoutError

from ..arguments import require
from ..qemu.machine import MIB
from ..qemu.qemu import Qemu
from .vhost_log import vhost_log

_SAMPLING: Final = "page-sampling"
MODES: Final = (_SAMPLING, "dirty-bitmap", "dirty-ring")
_READ_EVERY_S: Final = 0.05


@dataclass(frozen=True)
class DirtyRates:
    """Dirty rates in bytes a second.

    `vcpus_bytes_per_s` has a rate for each vCPU, in the mode 'dirty-ring' only.
    `devices_bytes_per_s` is None if QEMU had no vhost log.
    """

    mode: str
    seconds: float
    qemu_bytes_per_s: int
    vcpus_bytes_per_s: dict[int, int]
    devices_bytes_per_s: float | None
    devices_seconds: float


async def measure(qemu: Qemu, mode: str, seconds: int) -> DirtyRates:
    """Measure the dirty rate for `seconds`.

    Raises:
        UsageError: the mode needs KVM, and the guest runs without KVM.
        QmpError: this QEMU does not have the mode, or is measuring already.
        UntestableError: this user may not read the process's log, or QEMU returns no result.
    """
    require("qemu", qemu, Qemu, "a QEMU from start_qemu() or attach()")
    require("seconds", seconds, int, "whole seconds")
    # Under TCG, QEMU 7.2 dies of dirty-bitmap, and 11.1 always measures 0.
    if mode != _SAMPLING and not (await qemu.qmp.execute("query-kvm"))["enabled"]:
        raise UsageError(
            f"--mode {mode} needs KVM, and this guest runs without KVM; use --mode {_SAMPLING}"
        )
    await qemu.qmp.execute("calc-dirty-rate", calc_time=seconds, mode=mode)
    meter = VhostLogMeter(qemu.pid, qemu.name)
    deadline_s = time.monotonic() + seconds
    while True:
        meter.read()
        answer = await qemu.qmp.execute("query-dirty-rate")
        if answer["status"] == "measured":
            break
        late_s = time.monotonic() - deadline_s
        if late_s > 0 and (status := await qemu.status()) != "running":
            raise UntestableError(
                f"{qemu.name} is {status!r}, but only a running guest has a dirty rate; continue "
                "the guest and measure again"
            )
        if late_s > qemu.qmp.timeout_s:
            raise WaitTimeoutError(
                f"{qemu.name} has returned no dirty rate within {qemu.qmp.timeout_s:g} s after the "
                f"{seconds} s of the measurement; try again when the host is less busy"
            )
        await asyncio.sleep(_READ_EVERY_S)
    return DirtyRates(
        mode=mode,
        seconds=seconds,
        qemu_bytes_per_s=answer["dirty-rate"] * MIB,
        vcpus_bytes_per_s={
            vcpu["id"]: vcpu["dirty-rate"] * MIB for vcpu in answer.get("vcpu-dirty-rate", [])
        },
        devices_bytes_per_s=meter.bytes_per_s,
        devices_seconds=meter.seconds,
    )


class VhostLogMeter:
    """Counts the bits that appear in the vhost log of process `pid`, called `name` in messages.

    `seconds` is for how long the log existed while the meter read it.
    """

    def __init__(self, pid: int, name: str) -> None:
        self._pid = pid
        self._name = name
        self._inode = 0
        self._before: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._read_s = 0.0
        self._pages = 0
        self.seconds = 0.0

    def read(self) -> None:
        """Count the bits that are new since the last read; the first read of a log counts none.

        Raises:
            UntestableError: this user may not read the process's log.
        """
        found = _read_log(self._pid, self._name)
        if found is None:
            self._inode = 0
            return
        (inode, now), now_s = found, time.monotonic()
        if inode == self._inode and len(now) == len(self._before):  # else QEMU made a new log
            self._pages += int(np.bitwise_count(now & ~self._before).sum())
            self.seconds += now_s - self._read_s
        self._inode, self._before, self._read_s = inode, now, now_s

    @property
    def bytes_per_s(self) -> float | None:
        """The rate at which pages appear in the log; None if there was no log."""
        if not self.seconds:
            return None
        return self._pages * LOG_PAGE_BYTES / self.seconds


def _read_log(pid: int, name: str) -> tuple[int, NDArray[np.uint8]] | None:
    """Return the inode and the bits of the process's vhost log; None if it has no log."""
    with vhost_log(pid, name, os.O_RDONLY) as fd:
        if fd is None:
            return None
        # A mapping would fill the memfd's holes; pread does not.
        status = os.fstat(fd)
        return status.st_ino, np.frombuffer(os.pread(fd, status.st_size, 0), np.uint8)


def to_json(rates: DirtyRates) -> dict[str, Any]:
    """Return the rates as a JSON object."""
    return {
        "mode": rates.mode,
        "seconds": rates.seconds,
        "qemu_bytes_per_s": rates.qemu_bytes_per_s,
        "vcpus_bytes_per_s": {str(vcpu): rate for vcpu, rate in rates.vcpus_bytes_per_s.items()},
        "devices_bytes_per_s": rates.devices_bytes_per_s,
        "devices_seconds": rates.devices_seconds,
    }


def to_text(rates: DirtyRates) -> str:
    """Return the rates as text, with an explanation of what QEMU counted."""
    lines = [
        f"QEMU     {rates.qemu_bytes_per_s / MIB:.0f} MiB/s over {rates.seconds} s ({rates.mode}: "
        f"{_MEANINGS[rates.mode]})"
    ]
    lines += [
        f"vCPU {vcpu}   {rate / MIB:.0f} MiB/s" for vcpu, rate in rates.vcpus_bytes_per_s.items()
    ]
    if rates.devices_bytes_per_s is None:
        lines.append(
            "devices  not measured: QEMU has a vhost log only while it migrates a guest with an "
            "out-of-process device (vhost-user)"
        )
    else:
        lines.append(
            f"devices  at least {rates.devices_bytes_per_s / MIB:.1f} MiB/s over "
            f"{rates.devices_seconds:.1f} s (new bits in the vhost log; QEMU clears the log at "
            "each sync)"
        )
    return "\n".join(lines)


_MEANINGS: Final = {
    _SAMPLING: "pages whose content changed, written by vCPUs or devices",
    "dirty-bitmap": "pages that the accelerator logged as dirty",
    "dirty-ring": "pages that the vCPUs dirtied",
}
