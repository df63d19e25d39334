"""The set-ups of the proofs in L1 that are not resolved from options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ..arch.x86_64 import X86_64
from ..devices.device import ProofDevice
from ..guest.workload import Workload
from ..proof.model import Proof, Setup
from ..proof.options import ProofOptions
from ..qemu.machine import MIB, Machine
from .fake_driver import container_driver, iommufd_driver
from .l2 import QEMU
from .proof_device import is_behind_viommu

_REQUESTS_AFTER: Final = 50
_BANDWIDTH_BYTES_PER_S: Final = 4 * MIB
_DOWNTIME_S: Final = 10.0
VFIO_MEMORY_BYTES: Final = 32 * MIB
_VFIO_WORKLOAD: Final = Workload(hot=256, write_once=1024, churn=512)


def require_state_size(*, iommufd: bool) -> None:
    """Fail with the kernel's error if it does not have the interface, or VFIO's MIG_DATA_SIZE.

    Without MIG_DATA_SIZE (before Linux 6.2), QEMU assumes 100 GiB of device state and never stops
    the guest.

    Raises:
        NotSupportedError, VfioError: the kernel does not have one of them.
    """
    with iommufd_driver() if iommufd else container_driver() as driver:
        driver.device.stop_copy_bytes()


def vfio_setup(guest: Path, device: ProofDevice, seed: int, timeout_s: float) -> Setup:
    """Return the set-up of a proof on the VFIO `device`; `guest` is the ELF that drives it."""
    workload = replace(_VFIO_WORKLOAD, seed=seed)
    more = ("iommu=1",) if is_behind_viommu(device) else ()
    return setup_in_l1("vfio", guest, VFIO_MEMORY_BYTES, workload, device, timeout_s, *more)


def common_figures(proof: Proof) -> dict[str, Any]:
    """Return the figures that the outcome of each whole proof has."""
    return {
        "differing": len(proof.verdict.lost),
        "guaranteed_detectable": proof.verdict.sensitivity.guaranteed_detectable,
        "seconds": round(proof.migration_s, 1),
    }


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
        qemu=QEMU,
        qemu_destination=QEMU,
        machine=Machine(X86_64, "q35", "tcg", memory_bytes, 1, elf, command_line=line),
        guest=guest,
        workload=workload,
        device=device,
    )
