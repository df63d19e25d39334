"""L2 with a vIOMMU in front of vfio-pci.

Whether QEMU migrates such a machine depends on its version, and on how the device is tracked. If it
does, the guest maps IOVAs that are not its guest-physical addresses. QEMU must then translate each
dirty IOVA, and every page that the device has written must arrive. If QEMU refuses, its words are
the outcome.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, Final

from dmaproof.trace import Link

from ..migration.judgement import Blame
from ..proof.model import Proof as MigrationProof
from ..proof.run import prove
from .blocked import blocked_reasons, require_start
from .common_setup import common_figures, require_state_size, vfio_setup
from .fake_device import injected
from .l2 import Plan
from .outcome import (
    NotSupportedError,
    Proof,
    repeated,
    require,
    require_loss,
    require_pass,
    retrying,
)
from .proof_device import FakeProofDevice
from .tracking import INTEL_IOMMU, TRACKINGS

_MAPPED: Final = "container-type1-viommu"
_VIOMMUS: Final = {"intel-iommu": INTEL_IOMMU, "virtio-iommu": "virtio-iommu-pci"}
_LOGS: Final = ("iommufd", "container")
_WRITTEN_AFTER_STOP: Final = 16


def proofs(guest: Path, seed: int, timeout_s: float, controls: int = 1) -> dict[str, Proof]:
    """Return the proofs by name, and a control; see `migrations.proofs`.

    `guest` is the ELF that drives the fake device.
    """
    found: dict[str, Proof] = {
        f"{viommu} and the device log, {short}": partial(_refused, option, short, timeout_s)
        for viommu, option in _VIOMMUS.items()
        for short in _LOGS
    }
    found["intel-iommu and type1's log"] = retrying(partial(_equal, guest, seed, timeout_s))
    found["intel-iommu and type1's log, control: writes after stop"] = repeated(
        partial(_writes_after_stop, guest, timeout_s=timeout_s), seed, controls
    )
    return found


def _refused(option: str, short: str, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Check that QEMU refuses to migrate a device with its own log behind a vIOMMU."""
    reasons = blocked_reasons(Plan((TRACKINGS[short],)), timeout_s, "-device", option)
    if not reasons:
        raise NotSupportedError("this QEMU does not refuse it, and dmaproof does not test it yet")
    return f"QEMU refuses: {'; '.join(reasons)}", {"refused": True}


def _prove(guest: Path, seed: int, timeout_s: float) -> MigrationProof:
    require_state_size(iommufd=TRACKINGS[_MAPPED].iommufd)
    require_start(Plan((TRACKINGS[_MAPPED],)), timeout_s)  # QEMU 10.0 refuses
    device = FakeProofDevice(_MAPPED)
    return asyncio.run(prove(vfio_setup(guest, device, seed, timeout_s)))


def _equal(guest: Path, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate, and require a pass."""
    proof = _prove(guest, seed, timeout_s)
    require_pass(proof.verdict)
    return f"0 of {proof.verdict.pages} pages differ, {_summary(proof)}", _figures(proof)


def _writes_after_stop(guest: Path, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate while the device writes after it was stopped.

    Exactly these pages must differ, at the guest-physical addresses that the guest has mapped.
    """
    with injected(write_after_stop=_WRITTEN_AFTER_STOP):
        proof = _prove(guest, seed, timeout_s)
    require_loss(proof.verdict, _summary(proof))
    lost = proof.verdict.lost
    others = sum((page.blame, page.link) != (Blame.DEVICE, Link.TRACKER) for page in lost)
    require(not others, f"{others} of {len(lost)} lost pages are not attributed to the device")
    require(len(lost) == _WRITTEN_AFTER_STOP, f"{len(lost)} pages differ")
    return f"{len(lost)} of {len(lost)} withheld pages differ, {_summary(proof)}", {
        **_figures(proof),
        "kept_back": len(lost),
    }


def _summary(proof: MigrationProof) -> str:
    verdict = proof.verdict
    return (
        f"{verdict.sensitivity.guaranteed_detectable} guaranteed detectable, "
        f"{verdict.guest.errors} guest errors, {proof.history[-1].syncs} syncs, "
        f"{proof.migration_s:.1f} s"
    )


def _figures(proof: MigrationProof) -> dict[str, Any]:
    return {**common_figures(proof), "syncs": proof.history[-1].syncs}
