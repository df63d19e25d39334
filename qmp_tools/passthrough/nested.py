"""Carry out an ordinary proof in L1, for a device that this machine cannot run.

L1 is a machine like any other, with the kernel's devices that this host may not have.
`nested_proof` runs in it: it resolves the same options and carries out the same proof as this
machine would.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from dmaproof.errors import UnsupportedError, UntestableError, UsageError

from ..arch.x86_64 import X86_64
from ..devices.registry import kind_of
from ..guest.bare import bare_guest, vfio_guest
from ..host.run_folder import run_folder
from ..proof.options import OPTIONS, ProofOptions
from ..proof.resolve import chosen_seed, refuse_unsupported_options
from ..qemu.builds import build_folder
from ..qemu.choice import find_qemu
from ..qemu.machine import MIB
from .kinds import fake_device_of, is_fake_vfio
from .l1.kernel import DEFAULT_KERNEL
from .l1.machine import TESTED_QEMU_PATH, l1, run_in_l1

_logger = logging.getLogger(__name__)

REPORT: Final = "report.json"
TEXT: Final = "report.txt"
FAILURE: Final = "failure.json"
OPTIONS_FILE: Final = "options.json"
"""The files in L1's /mnt: what `nested_proof` reads, and what it writes."""
ERRORS: Final = {error.__name__: error for error in (UsageError, UnsupportedError, UntestableError)}
"""The errors that `nested_proof` hands over, by name; a base class is after its subclasses."""
_WAITS_BETWEEN_LINES: Final = 4
"""A proof in L1 may use up this many timeouts before it prints its next line."""
_SEED_BITS: Final = 16
"""The module's parameter holds no more."""
_DEFAULTS: Final[Mapping[str, Any]] = {
    "guest": "bare",
    "accel": "tcg",
    "cpus": 1,
    "memory": 64 * MIB,
    "workload": "threads=8,hot=256,write_once=1024,churn=512,hold=256,huge_every=0",
    "bandwidth": 4 * MIB,
    "downtime_limit": 10.0,
    "requests_after": 50,
}
"""The options of a proof in L1 that are not given: under two layers of TCG, all is slow."""
_NOT_IN_L1: Final = ("arch", "qemu_destination", "kernel", "modules", "initrd", "append")
"""Options of files or machines that L1 does not have."""


def runs_in_l1(options: ProofOptions) -> bool:
    """Return whether the options select a device that this machine cannot run.

    Raises:
        UsageError: the device is unknown.
    """
    return not kind_of(options.devices, options.device_command).runs_here()


def nested_options(options: ProofOptions) -> ProofOptions:
    """Return the options of the proof in L1, whose guest is small and has no kernel.

    Raises:
        UsageError: an option does not apply to the device, or to a proof in L1.
    """
    options = replace(options, seed=chosen_seed(options.seed, _SEED_BITS))
    if is_fake_vfio(options):
        fake_device_of(options)
        return options
    refuse_unsupported_options(options, kind_of(options.devices, options.device_command))
    for name, value in options.changed.items():
        if name in _NOT_IN_L1:
            words = " ".join(OPTIONS[name].words(value))
            raise UsageError(
                f"{words} does not apply to --device {' and '.join(options.devices)} on this "
                "machine: the proof runs in the nested machine L1, which does not have it; leave "
                "it out"
            )
    return replace(options, **{**_DEFAULTS, **options.changed})


async def prove_nested(options: ProofOptions, *, keep: bool = False) -> tuple[dict[str, Any], str]:
    """Carry out the proof in L1.

    Returns:
        The report as for JSON, and as text.

    Raises:
        UsageError: an option does not apply, or has an invalid value.
        UntestableError: L1 does not boot, or the proof ends without a verdict.
    """
    inside = nested_options(options)
    tested = None if options.qemu is None else build_folder(str(options.qemu), X86_64)
    machine = replace(l1(options.l1_kernel or DEFAULT_KERNEL), qemu=tested)
    inside = replace(inside, qemu=TESTED_QEMU_PATH if tested else None, l1_kernel=None)
    with run_folder(keep=keep) as folder:
        if keep:
            _logger.info("keeping the run's folder: %s", folder)
        given = folder / OPTIONS_FILE
        given.write_text(json.dumps(inside.to_json()))
        job = await run_in_l1(
            machine,
            find_qemu(None, X86_64),
            "python3 -m qmp_tools.passthrough.nested_proof /mnt",
            folder,
            _logger.info,
            _WAITS_BETWEEN_LINES * options.timeout,
            files=(given,),
            guests=(bare_guest(X86_64).kernel, vfio_guest()),
        )
        if (job / FAILURE).exists():
            failure = json.loads((job / FAILURE).read_text())
            raise ERRORS[failure["error"]](failure["message"])
        report, text = json.loads((job / REPORT).read_text()), (job / TEXT).read_text()
    repeated = replace(options, seed=inside.seed)
    report["commands"]["dmaproof"] = ["dmaproof", "prove", *repeated.words()]
    return report, text
