"""Our vhost-user disk over the kernel's trackers: proved as any other device of ours, inside L1.

The guest of L2 asks the disk, the disk has the fake VFIO device write guest RAM by DMA, the kernel
tells what was written, and we merge that into QEMU's vhost dirty log. The verdict is that of
`qmp_tools.proof`: every page compared, each lost one attributed. Every way has a control, in which
a injected fault must corrupt, and be placed where it was injected.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

from dmaproof.trace import Link

from ..devices.emulated import EmulatedDevice
from ..devices.process import DeviceOptions
from ..guest.workload import Workload
from ..migration.judgement import Blame
from ..proof.model import Proof as Migrated
from ..proof.model import Setup
from ..proof.options import ProofOptions
from ..proof.run import prove
from ..qemu.machine import MIB, Machine
from .fake_device import injected
from .fake_driver import open_iommufd
from .outcome import Proof, patient, require, require_loss, require_pass
from .vhost_device import BY_IOMMUFD, TRACKERS

_QEMU: Final = Path("/usr/bin/qemu-system-x86_64")
_MEMORY_BYTES: Final = 32 * MIB
_WORKLOAD: Final = Workload(threads=8, hot=64, write_once=256, churn=512, hold=256, huge_every=0)
_REQUESTS_AFTER: Final = 50
_BANDWIDTH_BYTES_PER_S: Final = 4 * MIB
_DOWNTIME_S: Final = 10.0
_DROP_IN_1000: Final = 200
_DROP_PAGES: Final = "drop-pages=0.2"
_CONTROLS: Final = {TRACKERS[0]: Link.TRACKER, TRACKERS[1]: Link.TRACKER, TRACKERS[2]: Link.LOG}
"""Where each way's control loses pages: type1's own log has no fault, so ours is dropped."""


@dataclass(frozen=True)
class _Options(DeviceOptions):
    module: ClassVar[str] = "qmp_tools.passthrough.vhost_device"


def proofs(guest: Path, seed: int, timeout_s: float) -> dict[str, Proof]:
    """Every tracker of the kernel's, each followed by its control; `guest` is the bare one.

    `timeout_s` bounds each wait.
    """
    found: dict[str, Proof] = {}
    for tracker, link in _CONTROLS.items():
        found[tracker] = patient(partial(_equal, guest, tracker, seed, timeout_s))
        found[f"{tracker}, control: lost at the {link}"] = patient(
            partial(_corrupts, guest, tracker, link, seed, timeout_s)
        )
    return found


def _prove(guest: Path, tracker: str, fault: str | None, seed: int, timeout_s: float) -> Migrated:
    if tracker == BY_IOMMUFD:
        open_iommufd().close()  # or fail with what the kernel lacks
    workload = replace(_WORKLOAD, seed=seed)
    setup = Setup(
        options=ProofOptions(
            seed=seed,
            bandwidth=_BANDWIDTH_BYTES_PER_S,
            downtime_limit=_DOWNTIME_S,
            timeout=timeout_s,
            requests_after=_REQUESTS_AFTER,
        ),
        qemu=_QEMU,
        qemu_destination=_QEMU,
        machine=Machine("q35", "tcg", _MEMORY_BYTES, 1, guest, command_line=str(workload)),
        guest="bare",
        workload=workload,
        device=EmulatedDevice(_Options(tracker=tracker, fault=fault, seed=seed)),
    )
    return asyncio.run(prove(setup))


def _equal(guest: Path, tracker: str, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """A proof that passes."""
    proof = _prove(guest, tracker, None, seed, timeout_s)
    require_pass(proof.verdict)
    return f"0 of {proof.verdict.pages} pages differ, {_told(proof)}", _figures(proof)


def _corrupts(
    guest: Path, tracker: str, link: Link, seed: int, timeout_s: float
) -> tuple[str, dict[str, Any]]:
    """The same with a fault at `link`, which must be seen there, and nothing else."""
    if link is Link.TRACKER:
        with injected(drop=_DROP_IN_1000, seed=seed):
            proof = _prove(guest, tracker, None, seed, timeout_s)
    else:
        proof = _prove(guest, tracker, _DROP_PAGES, seed, timeout_s)
    require_loss(proof.verdict, _told(proof))
    lost = proof.verdict.lost
    elsewhere = sum((page.blame, page.link) != (Blame.DEVICE, link) for page in lost)
    require(not elsewhere, f"{elsewhere} of {len(lost)} lost pages are not placed at the {link}")
    return f"{len(lost)} pages differ, all lost at the {link}, {_told(proof)}", _figures(proof)


def _told(proof: Migrated) -> str:
    sensitivity = proof.verdict.sensitivity
    return (
        f"{sensitivity.written} written, {sensitivity.guaranteed_detectable} certain, "
        f"{len(proof.harvests)} harvests, {proof.history[-1].syncs} syncs, "
        f"{proof.migration_s:.1f} s"
    )


def _figures(proof: Migrated) -> dict[str, Any]:
    sensitivity = proof.verdict.sensitivity
    return {
        "differing": len(proof.verdict.lost),
        "guaranteed_detectable": sensitivity.guaranteed_detectable,
        "written": sensitivity.written,
        "unreported": sensitivity.unreported,
        "harvests": len(proof.harvests),
        "syncs": proof.history[-1].syncs,
        "seconds": round(proof.migration_s, 1),
    }
