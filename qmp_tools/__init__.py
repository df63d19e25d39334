"""Start QEMUs, migrate them and carry out proofs, over QMP.

::

    from qmp_tools import prove

    proof = prove(guest="bare", tracker="dirty-ring")
    assert proof.verdict.exit_code == 0, proof.verdict.sentence

The public API is what this module exports, what `qmp_tools.aio` exports for asynchronous code, and
the test classes and fixtures of `qmp_tools.integrations`. It stays compatible. Everything else is
private and may change at any time. A name's module is imported when the name is first used.

The package logs to the logger ``qmp_tools``, which prints nothing until an application configures
logging, as ``logging.basicConfig(level="INFO")`` does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from dmaproof.public_names import import_on_demand

if TYPE_CHECKING:
    from .blocking import (
        Environment,
        Pair,
        RunningQemu,
        StepwiseProof,
        check,
        check_images,
        prove,
        take_snapshot,
    )
    from .devices.device import AttachedDevice, DeviceFacts, ProofDevice
    from .devices.registry import COMMON_OPTIONS, Control, DeviceKind, DeviceRequest
    from .exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED, EXIT_USAGE
    from .guest.workload import Workload
    from .migration.judgement import Blame
    from .migration.migration import Limits, MigrationError, Progress
    from .migration.scenarios import known_scenarios
    from .migration.scenarios.base import Scenario
    from .proof.attribution import LostPage
    from .proof.model import Proof
    from .proof.options import ProofOptions
    from .proof.sensitivity import Sensitivity
    from .proof.verdict import GuestOutcome, Verdict
    from .qemu.machine import INCOMING
    from .qemu.qmp import QmpError
    from .ram_check.migrated import GuestHasRunError, MigrationFailedError, NotMigratedError
    from .ram_check.outcome import Check, RamDiffersError
    from .ram_check.snapshot import Snapshot

    __version__: str

_HOMES: Final = {
    "blocking": (
        "Environment",
        "Pair",
        "RunningQemu",
        "StepwiseProof",
        "check",
        "check_images",
        "prove",
        "take_snapshot",
    ),
    "devices.device": ("AttachedDevice", "DeviceFacts", "ProofDevice"),
    "devices.registry": ("COMMON_OPTIONS", "Control", "DeviceKind", "DeviceRequest"),
    "exit_codes": ("EXIT_LOST", "EXIT_PASS", "EXIT_UNTESTED", "EXIT_USAGE"),
    "guest.workload": ("Workload",),
    "migration.migration": ("Limits", "MigrationError", "Progress"),
    "migration.scenarios": ("known_scenarios",),
    "migration.scenarios.base": ("Scenario",),
    "proof.model": ("Proof",),
    "proof.options": ("ProofOptions",),
    "migration.judgement": ("Blame",),
    "proof.attribution": ("LostPage",),
    "proof.sensitivity": ("Sensitivity",),
    "proof.verdict": ("GuestOutcome", "Verdict"),
    "qemu.machine": ("INCOMING",),
    "qemu.qmp": ("QmpError",),
    "ram_check.migrated": ("GuestHasRunError", "MigrationFailedError", "NotMigratedError"),
    "ram_check.outcome": ("Check", "RamDiffersError"),
    "ram_check.snapshot": ("Snapshot",),
}
"""Public names by the module that defines them."""

__all__ = [
    "COMMON_OPTIONS",
    "EXIT_LOST",
    "EXIT_PASS",
    "EXIT_UNTESTED",
    "EXIT_USAGE",
    "INCOMING",
    "AttachedDevice",
    "Blame",
    "Check",
    "Control",
    "DeviceFacts",
    "DeviceKind",
    "DeviceRequest",
    "Environment",
    "GuestHasRunError",
    "GuestOutcome",
    "Limits",
    "LostPage",
    "MigrationError",
    "MigrationFailedError",
    "NotMigratedError",
    "Pair",
    "Progress",
    "Proof",
    "ProofDevice",
    "ProofOptions",
    "QmpError",
    "RamDiffersError",
    "RunningQemu",
    "Scenario",
    "Sensitivity",
    "Snapshot",
    "StepwiseProof",
    "Verdict",
    "Workload",
    "check",
    "check_images",
    "known_scenarios",
    "prove",
    "take_snapshot",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())

if not TYPE_CHECKING:  # otherwise a type checker would accept any misspelt name
    __getattr__, __dir__ = import_on_demand(globals(), _HOMES)
