"""One whole proof, run in L1 by `nested`.

python3 -m qmp_tools.passthrough.nested_proof FOLDER

FOLDER has the options of the proof as JSON. The report is written to the same folder as JSON and as
text, or else the error that prevented a verdict; progress goes to standard output. The exit code is
0 if one of them was written, independent of the verdict.
"""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dmaproof.errors import UnsupportedError, UntestableError, UsageError
from dmaproof.vfio.requests import VfioError

from ..guest.bare import vfio_guest
from ..host.log import logging_to
from ..proof.model import Setup
from ..proof.options import ProofOptions
from ..proof.resolve import resolve
from ..proof.run import prove
from ..reports.report import to_json, to_text
from .clock import Clocks
from .common_setup import require_state_size, vfio_setup
from .fake_device import injected
from .injected_faults import parse_fault
from .kinds import fake_device_of, is_fake_vfio
from .nested import ERRORS, FAILURE, OPTIONS_FILE, REPORT, TEXT
from .outcome import NotSupportedError
from .tracking import TRACKINGS


async def _setup_of(options: ProofOptions, faults: ExitStack) -> Setup:
    """Return the set-up; the fault of a fake VFIO device is injected until `faults` ends."""
    if not is_fake_vfio(options):
        return await resolve(options)
    device, seed = fake_device_of(options), options.seed or 0
    try:
        require_state_size(iommufd=TRACKINGS[device.tracking].iommufd)
    except (NotSupportedError, VfioError) as error:
        raise UnsupportedError(f"L1's kernel cannot migrate the device: {error}") from error
    if device.fault:
        faults.enter_context(injected(**parse_fault(device.fault), seed=seed))
    setup = vfio_setup(vfio_guest(), device, seed, options.timeout)
    if options.qemu is None:
        return setup
    return replace(setup, qemu=Path(options.qemu), qemu_destination=Path(options.qemu))


async def _prove(options: ProofOptions) -> tuple[str, str]:
    with ExitStack() as faults:
        setup = await _setup_of(options, faults)
        proof = await prove(setup)
    report, release = to_json(proof), platform.release()
    report["setup"]["l1_kernel"] = release
    return json.dumps(report), f"{to_text(proof)}\n  L1           kernel {release}"


def main() -> int:
    """Carry out the proof; return 0 if a report or an error was written."""
    folder = Path(sys.argv[1])
    options = ProofOptions.of(json.loads((folder / OPTIONS_FILE).read_text()))
    options = replace(options, timeout=Clocks(folder).in_l1(options.timeout))
    try:
        with logging_to(logging.StreamHandler(sys.stdout)):
            report, text = asyncio.run(_prove(options))
    except (UsageError, UntestableError) as error:
        name = next(name for name, kind in ERRORS.items() if isinstance(error, kind))
        failure = {"error": name, "message": str(error)}
        (folder / FAILURE).write_text(json.dumps(failure))
        return 0
    (folder / TEXT).write_text(text)
    (folder / REPORT).write_text(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
