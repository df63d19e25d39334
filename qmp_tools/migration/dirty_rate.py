"""How fast a running guest's RAM gets dirty: by QEMU's own measure, and by its devices' log.

QEMU's calc-dirty-rate has modes. 'page-sampling' compares checksums of sampled pages and so sees
every change, whoever wrote; 'dirty-bitmap' and 'dirty-ring' count what the accelerator logs.

What out-of-process devices write stands in QEMU's vhost log, a memfd that exists while dirty
logging is on. It is only read here, never cleared: QEMU takes the bits at its bitmap syncs. So a
page counts once between two syncs, and a bit that is set and taken between two looks is not seen.
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
_LOOK_EVERY_S: Final = 0.05


@dataclass(frozen=True)
class DirtyRates:
    """Rates in bytes a second; `devices_bytes_per_s` is None where there was no log to read.

    `vcpus_bytes_per_s` has a rate for each vCPU where the mode tells them apart.
    """

    mode: str
    seconds: float
    qemu_bytes_per_s: int
    vcpus_bytes_per_s: dict[int, int]
    devices_bytes_per_s: float | None
    devices_seconds: float


async def measure(qemu: Qemu, mode: str, seconds: int) -> DirtyRates:
    """Measure for `seconds`.

    Raises:
        UsageError: the mode needs KVM, and the guest runs without it.
        QmpError: this QEMU does not have the mode, or is measuring already.
        UntestableError: the process may not be looked at, or no result comes.
    """
    require("qemu", qemu, Qemu, "a QEMU from start_qemu() or attach()")
    require("seconds", seconds, int, "whole seconds")
    # Under TCG, QEMU 7.2 dies of dirty-bitmap, and 11.1 always measures 0.
    if mode != _SAMPLING and not (await qemu.qmp.execute("query-kvm"))["enabled"]:
        raise UsageError(
            f"--mode {mode}: it is KVM that logs these pages, and this guest runs without it; "
            f"--mode {_SAMPLING} works everywhere"
        )
    await qemu.qmp.execute("calc-dirty-rate", calc_time=seconds, mode=mode)
    meter = VhostLogMeter(qemu.pid, qemu.name)
    due = time.monotonic() + seconds
    while True:
        meter.look()
        answer = await qemu.qmp.execute("query-dirty-rate")
        if answer["status"] == "measured":
            break
        late_s = time.monotonic() - due
        if late_s > 0 and (status := await qemu.status()) != "running":
            raise UntestableError(
                f"{qemu.name} is {status!r}: only a running guest has a dirty rate"
            )
        if late_s > qemu.qmp.timeout_s:
            raise WaitTimeoutError(
                f"{qemu.name} has not measured its dirty rate within {qemu.qmp.timeout_s:g} s more "
                f"than the {seconds} s that it was given"
            )
        await asyncio.sleep(_LOOK_EVERY_S)
    return DirtyRates(
        mode=mode,
        seconds=seconds,
        qemu_bytes_per_s=answer["dirty-rate"] * MIB,
        vcpus_bytes_per_s={
            it["id"]: it["dirty-rate"] * MIB for it in answer.get("vcpu-dirty-rate", [])
        },
        devices_bytes_per_s=meter.bytes_per_s,
        devices_seconds=meter.seconds,
    )


class VhostLogMeter:
    """Counts the bits that appear in the vhost log of process `pid`, called `name` in messages.

    `seconds` is for how long there was a log to look at.
    """

    def __init__(self, pid: int, name: str) -> None:
        self._pid = pid
        self._name = name
        self._inode = 0
        self._before: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._looked_s = 0.0
        self._pages = 0
        self.seconds = 0.0

    def look(self) -> None:
        """Count what is new since the last look; the first look at a log only remembers it.

        Raises:
            UntestableError: this user may not look at the process.
        """
        found = _read_log(self._pid, self._name)
        if found is None:
            self._inode = 0
            return
        (inode, now), now_s = found, time.monotonic()
        if inode == self._inode and len(now) == len(self._before):  # else QEMU made a new log
            self._pages += int(np.bitwise_count(now & ~self._before).sum())
            self.seconds += now_s - self._looked_s
        self._inode, self._before, self._looked_s = inode, now, now_s

    @property
    def bytes_per_s(self) -> float | None:
        """The rate at which pages appear in the log; None where there was no log."""
        if not self.seconds:
            return None
        return self._pages * LOG_PAGE_BYTES / self.seconds


def _read_log(pid: int, name: str) -> tuple[int, NDArray[np.uint8]] | None:
    """The inode and the bits of the process's vhost log, if it has one."""
    with vhost_log(pid, name, os.O_RDONLY) as fd:
        if fd is None:
            return None
        # By read and not by mapping, which would fill the memfd's holes.
        status = os.fstat(fd)
        return status.st_ino, np.frombuffer(os.pread(fd, status.st_size, 0), np.uint8)


def to_json(rates: DirtyRates) -> dict[str, Any]:
    """The figures for programs."""
    return {
        "mode": rates.mode,
        "seconds": rates.seconds,
        "qemu_bytes_per_s": rates.qemu_bytes_per_s,
        "vcpus_bytes_per_s": {str(vcpu): it for vcpu, it in rates.vcpus_bytes_per_s.items()},
        "devices_bytes_per_s": rates.devices_bytes_per_s,
        "devices_seconds": rates.devices_seconds,
    }


def to_text(rates: DirtyRates) -> str:
    """The figures for people, and what they are figures of."""
    lines = [
        f"QEMU     {rates.qemu_bytes_per_s / MIB:.0f} MiB/s over {rates.seconds} s ({rates.mode}: "
        f"{_MEANINGS[rates.mode]})"
    ]
    lines += [
        f"vCPU {vcpu}   {rate / MIB:.0f} MiB/s" for vcpu, rate in rates.vcpus_bytes_per_s.items()
    ]
    if rates.devices_bytes_per_s is None:
        lines.append(
            "devices  no log to read: QEMU has a vhost log only with an out-of-process device "
            "(vhost-user) and while a migration runs"
        )
    else:
        lines.append(
            f"devices  at least {rates.devices_bytes_per_s / MIB:.1f} MiB/s over "
            f"{rates.devices_seconds:.1f} s (new bits in the vhost log, which QEMU empties at each "
            "sync)"
        )
    return "\n".join(lines)


_MEANINGS: Final = {
    _SAMPLING: "pages whose content changed, whoever wrote them",
    "dirty-bitmap": "pages that were logged dirty",
    "dirty-ring": "pages that the vCPUs dirtied",
}
