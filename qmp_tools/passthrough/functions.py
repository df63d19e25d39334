"""The steps of ``prove --device vfio:…``, tried on the fake device as if it were hardware.

The prerequisites are checked on the real kernel. The proof then knows nothing about the device but
what its guest reports, and it must still notice an injected fault.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, Final

from ..migration.judgement import Blame
from ..proof.model import Proof as MigrationProof
from ..proof.run import prove
from .blocked import require_migration
from .common_setup import VFIO_MEMORY_BYTES, common_figures, require_state_size, vfio_setup
from .fake_device import fake_device, injected
from .fake_driver import DRIVERS
from .host_functions import HostFunctions, MissingError, parse_functions, require_testable
from .outcome import Proof, require, require_loss, require_pass, retrying
from .tracking import TRACKINGS
from .vfio_functions import Host, gather_facts

_DROP_IN_1000: Final = 50


def proofs(guest: Path, seed: int, timeout_s: float) -> dict[str, Proof]:
    """Return the proofs by name: a refusal, one for each VFIO interface, and a control.

    `guest` is the ELF that drives the fake device. `timeout_s` bounds each wait.
    """
    return {
        "a function that is in use": _in_use,
        "iommufd": retrying(partial(_equal, guest, "", seed, timeout_s)),
        "container": retrying(partial(_equal, guest, ",container", seed, timeout_s)),
        "iommufd, control: drop": retrying(partial(_corrupts, guest, "", seed, timeout_s)),
    }


def _prove(guest: Path, suffix: str, seed: int, timeout_s: float) -> tuple[MigrationProof, int]:
    """Return the proof, and the number of prerequisites that were checked.

    `suffix` is the end of ``vfio:SOURCE,DESTINATION``: ",container", or nothing for iommufd.
    """
    require_state_size(iommufd=not suffix)
    require_migration(TRACKINGS["container" if suffix else "iommufd"], timeout_s)
    with fake_device(timeout_s) as source, fake_device(timeout_s) as destination:
        functions = parse_functions(f"vfio:{source.sysfs},{destination.sysfs}{suffix}", Host())
        lines = require_testable(functions, VFIO_MEMORY_BYTES, Host())
        setup = vfio_setup(guest, functions, seed, timeout_s)
        return asyncio.run(prove(setup)), len(lines)


def _equal(guest: Path, suffix: str, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    proof, checked = _prove(guest, suffix, seed, timeout_s)
    require_pass(proof.verdict)
    return f"{checked} prerequisites met; {_summary(proof)}", common_figures(proof)


def _corrupts(guest: Path, suffix: str, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    with injected(drop=_DROP_IN_1000, seed=seed):
        proof, _ = _prove(guest, suffix, seed, timeout_s)
    require_loss(proof.verdict, _summary(proof))
    blamed = sum(page.blame is not Blame.UNKNOWN for page in proof.verdict.lost)
    require(not blamed, f"{blamed} lost pages have a known cause, though there is no journal")
    return _summary(proof), common_figures(proof)


def _summary(proof: MigrationProof) -> str:
    verdict = proof.verdict
    return (
        f"{len(verdict.lost)} of {verdict.pages} pages differ, "
        f"{verdict.sensitivity.guaranteed_detectable} guaranteed detectable, "
        f"{verdict.guest.errors} guest errors, {proof.migration_s:.1f} s"
    )


def _in_use() -> tuple[str, dict[str, Any]]:
    """Check that a function that is in use is refused, through either interface."""
    refusals = []
    for driver_of in DRIVERS.values():
        with driver_of() as driver, fake_device() as other:
            for suffix in ("", ",container"):
                text = f"vfio:{driver.fake.sysfs},{other.sysfs}{suffix}"
                refusals.append(_refusal(parse_functions(text, Host())))
    return f"refused {len(refusals)} times: {refusals[0]}", {}


def _refusal(functions: HostFunctions) -> str:
    facts = gather_facts(functions.source, Host(), iommufd=functions.iommufd)
    require(facts.open_error is not None, "a function that is in use can be opened")
    try:
        require_testable(functions, VFIO_MEMORY_BYTES, Host())
    except MissingError as error:
        remedies = [finding.remedy for finding in error.missing if finding.what == facts.open_error]
        require(any(remedies), f"the refusal names no remedy: {error}")
    else:
        require(False, "a function that is in use passes the check of the prerequisites")
    return str(facts.open_error)
