"""The set-up that all whole proofs in L1 share."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..arch.x86_64 import X86_64
from ..devices.device import ProofDevice
from ..guest.workload import Workload
from ..proof.model import Setup
from ..proof.options import ProofOptions
from ..qemu.machine import MIB, Machine

_QEMU: Final = Path("/usr/bin/qemu-system-x86_64")
_REQUESTS_AFTER: Final = 50
_BANDWIDTH_BYTES_PER_S: Final = 4 * MIB
_DOWNTIME_S: Final = 10.0


def setup_in_l1(
    guest: str,
    elf: Path,
    memory_bytes: int,
    workload: Workload,
    device: ProofDevice,
    timeout_s: float,
    *more: str,
) -> Setup:
    """Return the set-up of a proof in L1 on `device`.

    `elf` is the program of the `guest` ('bare' or 'vfio'), which gets its workload from its command
    line, and the words `more`. The proof has the workload's seed. `timeout_s` bounds each wait.
    """
    line = " ".join([str(workload), *more])
    return Setup(
        options=ProofOptions(
            seed=workload.seed,
            bandwidth=_BANDWIDTH_BYTES_PER_S,
            downtime_limit=_DOWNTIME_S,
            timeout=timeout_s,
            requests_after=_REQUESTS_AFTER,
        ),
        qemu=_QEMU,
        qemu_destination=_QEMU,
        machine=Machine(X86_64, "q35", "tcg", memory_bytes, 1, elf, command_line=line),
        guest=guest,
        workload=workload,
        device=device,
    )
