"""The program in L1: runs the proofs, and reports each one as it ends.

python3 -m qmp_tools.passthrough.inside FOLDER

FOLDER, which the host shares, has the request (`catalog.Request`) as JSON. Several machines may run
the program side by side: each claims the next unclaimed proof by making a folder for it, and the
environment variable MACHINE has its number. The
outcome of a proof is written to a file of its own before its line is printed, so that the host can
keep it even if the machine ends early.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmaproof.errors import DmaproofError

from ..arch.x86_64 import X86_64
from ..guest.bare import bare_guest, vfio_guest
from .catalog import SELFTESTS, Guests, NamedProof, Request, proofs
from .clock import Clocks
from .l1.machine import FIRST
from .l2 import tested_qemu
from .outcome import State, run

REQUEST: Final = "request.json"
OUTCOMES: Final = "outcomes"
CLAIMED: Final = "claimed"
MACHINE: Final = "machine.json"
"""The names in FOLDER: the request, the outcomes as NUMBER.json, the claims, and L1's versions."""
_TAGS: Final = {
    State.HOLDS: "ok",
    State.FAILS: "FAILED",
    State.NOT_SUPPORTED: "unsupported",
    State.UNTESTED: "untested",
}
"""The first word of a proof's line, which its number and its text follow, separated by tabs."""


def order(groups: Sequence[str], machine: int) -> list[int]:
    """Return the numbers of the proofs that `machine` may carry out, in its order.

    `groups` has the group of each proof. The first machine begins with the kernel's selftests,
    which need most of its memory.
    """
    rest = [number for number, group in enumerate(groups) if group != SELFTESTS]
    if machine != FIRST:
        return rest
    return [*(number for number, group in enumerate(groups) if group == SELFTESTS), *rest]


def claimed(numbers: Iterable[int], taken: Path) -> Iterator[int]:
    """Claim each proof of `numbers` that no machine has claimed yet, and yield its number."""
    for number in numbers:
        try:
            (taken / str(number)).mkdir()
        except FileExistsError:
            continue
        yield number


def _qemu_version(timeout_s: float) -> str:
    try:
        return tested_qemu(timeout_s).version
    except DmaproofError:  # each migration reports the reason
        return "unknown, it does not run"


def main() -> int:
    """Carry out the proofs, and return 0 when their outcomes are written."""
    folder = Path(sys.argv[1])
    request = Request.of(json.loads((folder / REQUEST).read_text()))
    guests = Guests(bare_guest(X86_64).kernel, vfio_guest())
    clocks = Clocks(folder)

    def all_proofs() -> list[NamedProof]:
        """Return all proofs, with the timeout that fits the present rate of L1's clock."""
        timeout_s = clocks.in_l1(request.timeout_s)
        return proofs(replace(request, timeout_s=timeout_s), guests)

    groups = [named.group for named in all_proofs()]
    numbers = order(groups, int(os.environ["MACHINE"]))
    for number in claimed(numbers, folder / CLAIMED):
        named = all_proofs()[number]
        outcome = run(named.group, named.name, named.proof)
        (folder / OUTCOMES / f"{number}.json").write_text(json.dumps(outcome.to_json()))
        text = f"{named}: {outcome.found} ({outcome.seconds:.1f} s)"
        print(f"{_TAGS[outcome.state]}\t{number}\t{text}", flush=True)
    machine = {
        "kernel": platform.release(),
        "qemu": _qemu_version(request.timeout_s),
        "seconds": round(time.monotonic(), 1),  # since L1's boot
    }
    (folder / MACHINE).write_text(json.dumps(machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
