"""One proof of QEMU's own vfio-pci on the fake device, run in L1 by `qmp_tools.proof`.

python3 -m qmp_tools.passthrough.device_proof REPORT GUEST [--tracking NAME] [--fault NAME=VALUE]…

GUEST is the ELF of the guest that drives the device. The proof is written to REPORT as JSON, and as
text to a file of the same name that ends in ``.txt``; progress goes to standard output. The exit
code is 0 if the reports were written, independent of the verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..devices.device import ProofDevice
from ..exit_codes import EXIT_UNTESTED
from ..guest.workload import Workload
from ..host.log import logging_to
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..proof.model import Setup
from ..proof.run import prove
from ..qemu.machine import MIB
from ..reports.report import to_json, to_text
from .clock import Clocks
from .common_setup import setup_in_l1
from .fake_device import injected
from .injected_faults import parse_fault
from .proof_device import FakeProofDevice, is_behind_viommu
from .tracking import TRACKINGS

MEMORY_BYTES: Final = 64 * MIB
_WORKLOAD: Final = Workload(hot=256, write_once=1024, churn=512)


def setup_of(guest: Path, device: ProofDevice, seed: int, timeout_s: float) -> Setup:
    """Return the set-up of a proof in L1 on `device`; `guest` is the ELF that drives it."""
    workload = replace(_WORKLOAD, seed=seed)
    more = ("iommu=1",) if is_behind_viommu(device) else ()
    return setup_in_l1("vfio", guest, MEMORY_BYTES, workload, device, timeout_s, *more)


def main() -> int:
    """Carry out the proof; return 0 if it has a verdict."""
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("guest", type=Path)
    parser.add_argument("--tracking", choices=TRACKINGS, default="iommufd")
    parser.add_argument("--fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S)
    arguments = parser.parse_args()
    fault = parse_fault(arguments.fault) if arguments.fault else {}
    device = FakeProofDevice(arguments.tracking, arguments.fault)
    timeout_s = Clocks(arguments.report.parent).in_l1(arguments.timeout)
    setup = setup_of(arguments.guest, device, arguments.seed, timeout_s)
    try:
        with (
            logging_to(logging.StreamHandler(sys.stdout)),
            injected(**fault, **({"seed": arguments.seed} if fault else {})),
        ):
            proof = asyncio.run(prove(setup))
    except UntestableError as error:
        print(f"untested: {error}", flush=True)
        return EXIT_UNTESTED
    arguments.report.write_text(json.dumps(to_json(proof)))
    arguments.report.with_suffix(".txt").write_text(to_text(proof))
    return 0


if __name__ == "__main__":
    sys.exit(main())
