"""The fake device as if it were a device of the host: the very steps of ``prove --device vfio:…``.

What is looked at beforehand is looked at on the real kernel; the proof then knows nothing of the
device but what its guest tells. A fault that is injected must be seen all the same.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, Final

from ..migration.judgement import Blame
from ..proof.model import Proof as Migrated
from ..proof.run import prove
from .device_proof import MEMORY_BYTES, setup_of
from .fake_device import fake_device, injected
from .fake_driver import by_container, by_iommufd
from .host_functions import HostFunctions, MissingError, parse_functions, require_testable
from .outcome import Proof, patient, require, require_loss, require_pass
from .vfio_functions import Host, look

_DROP_IN_1000: Final = 50


def proofs(guest: Path, seed: int, timeout_s: float) -> dict[str, Proof]:
    """Each way to own them, and a control; `guest` is the one that drives the fake device.

    `timeout_s` bounds each wait.
    """
    return {
        "one that is in use": _in_use,
        "iommufd": patient(partial(_equal, guest, "", seed, timeout_s)),
        "container": patient(partial(_equal, guest, ",container", seed, timeout_s)),
        "iommufd, control: drop": patient(partial(_corrupts, guest, "", seed, timeout_s)),
    }


def _prove(guest: Path, way: str, seed: int, timeout_s: float) -> tuple[Migrated, int]:
    """The proof, and how many things were looked at beforehand."""
    _require_a_kernel_for(way)
    with fake_device(timeout_s) as source, fake_device(timeout_s) as destination:
        functions = parse_functions(f"vfio:{source.sysfs},{destination.sysfs}{way}", Host())
        lines = require_testable(functions, MEMORY_BYTES, Host())
        setup = setup_of(guest, functions, seed, timeout_s)
        return asyncio.run(prove(setup)), len(lines)


def _require_a_kernel_for(way: str) -> None:
    """Fail with what the kernel says where it has no such way, or does not tell how much state a
    device has (before Linux 6.2): QEMU takes that for 100 GiB, and never stops the guest."""
    with by_container() if way else by_iommufd() as driver:
        driver.device.stop_copy_bytes()


def _equal(guest: Path, way: str, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    proof, looked_at = _prove(guest, way, seed, timeout_s)
    require_pass(proof.verdict)
    return f"{looked_at} things are as they must be; {_told(proof)}", _figures(proof)


def _corrupts(guest: Path, way: str, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    with injected(drop=_DROP_IN_1000, seed=seed):
        proof, _ = _prove(guest, way, seed, timeout_s)
    require_loss(proof.verdict, _told(proof))
    known = sum(page.blame is not Blame.UNKNOWN for page in proof.verdict.lost)
    require(not known, f"{known} lost pages are blamed on somebody, without a journal")
    return _told(proof), _figures(proof)


def _told(proof: Migrated) -> str:
    verdict = proof.verdict
    return (
        f"{len(verdict.lost)} of {verdict.pages} pages differ, {verdict.sensitivity.guaranteed_detectable} "
        f"certain, {verdict.guest.errors} errors of the guest, {proof.migration_s:.1f} s"
    )


def _figures(proof: Migrated) -> dict[str, Any]:
    return {
        "differing": len(proof.verdict.lost),
        "guaranteed_detectable": proof.verdict.sensitivity.guaranteed_detectable,
        "seconds": round(proof.migration_s, 1),
    }


def _in_use() -> tuple[str, dict[str, Any]]:
    """A function that somebody has is told, whichever way it is to be opened."""
    told = []
    for owner in (by_iommufd, by_container):
        with owner() as driver, fake_device() as other:
            for iommufd in (True, False):
                text = f"vfio:{driver.fake.sysfs},{other.sysfs}" + ("" if iommufd else ",container")
                functions = parse_functions(text, Host())
                told.append(_refusal(functions))
    return f"refused {len(told)} times: {told[0]}", {}


def _refusal(functions: HostFunctions) -> str:
    facts = look(functions.source, Host(), iommufd=functions.iommufd)
    require(facts.open_error is not None, "a function that is in use can be opened")
    try:
        require_testable(functions, MEMORY_BYTES, Host())
    except MissingError as error:
        remedies = [it.remedy for it in error.missing if it.what == facts.open_error]
        require(any(remedies), f"no remedy is told: {error}")
    else:
        require(False, "a function that is in use is testable")
    return str(facts.open_error)
