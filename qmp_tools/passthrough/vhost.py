"""dmaproof's vhost-user disk on the kernel's trackers: an ordinary proof, inside L1.

The guest in L2 sends requests to the disk. The disk has the fake VFIO device write guest RAM by
DMA, the kernel reports what was written, and the disk merges that into QEMU's vhost dirty log. The
verdict is that of `qmp_tools.proof`: every page is compared, and each lost one attributed. Each
tracker has a control, in which an injected fault must lose pages at the link where it was injected.
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
from ..proof.model import Proof as MigrationProof
from ..proof.run import prove
from ..qemu.machine import MIB
from .common_setup import common_figures, setup_in_l1
from .fake_device import injected
from .fake_driver import open_iommufd
from .outcome import Proof, require, require_loss, require_pass, retrying
from .vhost_device import BY_IOMMUFD, TRACKERS

_MEMORY_BYTES: Final = 16 * MIB
_WORKLOAD: Final = Workload(threads=8, hot=64, write_once=256, churn=512, hold=256, huge_every=0)
_DROP_IN_1000: Final = 200
_DROP_PAGES: Final = "drop-pages=0.2"
_CONTROLS: Final = {TRACKERS[0]: Link.TRACKER, TRACKERS[1]: Link.TRACKER, TRACKERS[2]: Link.LOG}
"""The link at which the control of each tracker loses pages.

The module's faults do not affect type1's own log, so that control drops pages before QEMU's log.
"""


@dataclass(frozen=True)
class _Options(DeviceOptions):
    module: ClassVar[str] = "qmp_tools.passthrough.vhost_device"


def proofs(guest: Path, seed: int, timeout_s: float) -> dict[str, Proof]:
    """Return a proof for each of the kernel's trackers, each followed by its control.

    `guest` is the ELF of the bare guest. `timeout_s` bounds each wait.
    """
    found: dict[str, Proof] = {}
    for tracker, link in _CONTROLS.items():
        found[tracker] = retrying(partial(_equal, guest, tracker, seed, timeout_s))
        found[f"{tracker}, control: lost at the {link}"] = retrying(
            partial(_corrupts, guest, tracker, link, seed, timeout_s)
        )
    return found


def _prove(
    guest: Path, tracker: str, fault: str | None, seed: int, timeout_s: float
) -> MigrationProof:
    if tracker == BY_IOMMUFD:
        open_iommufd().close()  # fails with the kernel's error if it has no iommufd
    workload = replace(_WORKLOAD, seed=seed)
    device = EmulatedDevice(_Options(tracker=tracker, fault=fault, seed=seed))
    setup = setup_in_l1("bare", guest, _MEMORY_BYTES, workload, device, timeout_s)
    return asyncio.run(prove(setup))


def _equal(guest: Path, tracker: str, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate, and require a pass."""
    proof = _prove(guest, tracker, None, seed, timeout_s)
    require_pass(proof.verdict)
    return f"0 of {proof.verdict.pages} pages differ, {_summary(proof)}", _figures(proof)


def _corrupts(
    guest: Path, tracker: str, link: Link, seed: int, timeout_s: float
) -> tuple[str, dict[str, Any]]:
    """Migrate with a fault at `link`; every lost page must be attributed to that link."""
    if link is Link.TRACKER:
        with injected(drop=_DROP_IN_1000, seed=seed):
            proof = _prove(guest, tracker, None, seed, timeout_s)
    else:
        proof = _prove(guest, tracker, _DROP_PAGES, seed, timeout_s)
    require_loss(proof.verdict, _summary(proof))
    lost = proof.verdict.lost
    elsewhere = sum((page.blame, page.link) != (Blame.DEVICE, link) for page in lost)
    require(
        not elsewhere, f"{elsewhere} of {len(lost)} lost pages are not attributed to the {link}"
    )
    return f"{len(lost)} pages differ, all lost at the {link}, {_summary(proof)}", _figures(proof)


def _summary(proof: MigrationProof) -> str:
    sensitivity = proof.verdict.sensitivity
    return (
        f"{sensitivity.written} pages written, "
        f"{sensitivity.guaranteed_detectable} guaranteed detectable, "
        f"{len(proof.harvests)} harvests, {proof.history[-1].syncs} syncs, "
        f"{proof.migration_s:.1f} s"
    )


def _figures(proof: MigrationProof) -> dict[str, Any]:
    sensitivity = proof.verdict.sensitivity
    return {
        **common_figures(proof),
        "written": sensitivity.written,
        "unreported": sensitivity.unreported,
        "harvests": len(proof.harvests),
        "syncs": proof.history[-1].syncs,
    }
