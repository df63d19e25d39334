"""The program in L1: runs the proofs, prints a line as each one ends, and writes them as JSON.

python3 -m qmp_tools.passthrough.inside RESULTS TAKEN BARE VFIO [--seed N] [--quick] [--controls N]
    [--only GROUP…] [--proofs NAME…] [--timeout SECONDS]

Several machines may run it side by side. Each claims the next unclaimed proof by making a folder
for it in TAKEN. BARE and VFIO are the ELFs of the guests of these names.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from dmaproof.errors import DmaproofError

from ..host.timeout import DEFAULT_TIMEOUT_S
from . import GROUPS, differential, functions, hwpt, injected_faults, migrations, states, vhost
from .clock import Clocks
from .fake_driver import DRIVERS
from .outcome import Proof, State, run
from .rules import rules


class Guests(NamedTuple):
    """The ELFs of the guests in L2."""

    bare: Path
    vfio: Path


def _differential(seed: int, quick: bool) -> dict[str, Proof]:
    cases, rounds = (200, 5) if quick else (3000, 40)

    def with_driver(interface: str, kind: str) -> Proof:
        def carry_out() -> tuple[str, dict[str, object]]:
            with DRIVERS[interface]() as driver:
                if kind == "dma":
                    return differential.dma_cases(driver, rounds, seed)
                return differential.tracker_cases(driver, rounds // 2, seed)

        return carry_out

    proofs: dict[str, Proof] = {
        "the kernel's iterator and IovaBitmap": partial(differential.iterator_cases, cases, seed),
        "the page table's dirty bits and IovaBitmap": partial(hwpt.hwpt_cases, rounds * 7, seed),
        "the page table as a tracker": partial(hwpt.hwpt_tracker_cases, rounds, seed),
    }
    for interface in DRIVERS:
        proofs[f"random DMA, {interface}"] = with_driver(interface, "dma")
        proofs[f"the kernel's trackers, {interface}"] = with_driver(interface, "trackers")
    return proofs


_TAGS: Final = {
    State.HOLDS: "ok",
    State.FAILS: "FAILED",
    State.NOT_SUPPORTED: "unsupported",
    State.UNTESTED: "untested",
}
"""The first word of a proof's line."""


def _proofs(
    group: str, guests: Guests, seed: int, quick: bool, controls: int, timeout_s: float
) -> dict[str, Proof]:
    if group == "rules":
        return rules()
    if group == "states":
        return {"transfer": states.transfer, "refusals": states.refusals}
    if group == "differential":
        return _differential(seed, quick)
    if group == "faults":
        rounds = 2 if quick else 10
        proofs: dict[str, Proof] = {
            name: partial(injected_faults.caught, name, rounds, seed)
            for name in injected_faults.FAULTS
        }
        proofs["shift, in the comparison of iterators"] = partial(
            injected_faults.caught_by_the_iterator, rounds, seed
        )
        return proofs
    if group == "vhost":
        return vhost.proofs(guests.bare, seed, timeout_s)
    if group == "functions":
        return functions.proofs(guests.vfio, seed, timeout_s)
    return migrations.proofs(seed, timeout_s, controls, quick=quick)


def _all_proofs(
    groups: list[str], guests: Guests, seed: int, quick: bool, controls: int, timeout_s: float
) -> Iterator[tuple[str, str, Proof]]:
    """Yield the group, the name and the proof of each proof of `groups`, in order."""
    for group in groups:
        for name, proof in _proofs(group, guests, seed, quick, controls, timeout_s).items():
            yield group, name, proof


def claimed(count: int, taken: Path) -> Iterator[int]:
    """Claim each proof number below `count` that no machine has claimed yet, and yield it."""
    for number in range(count):
        try:
            (taken / str(number)).mkdir()
        except FileExistsError:
            continue
        yield number


def _qemu_version(timeout_s: float) -> str:
    try:
        return migrations.tested_qemu(timeout_s).version
    except DmaproofError:  # each migration has reported the reason
        return "unknown, it does not run"


def main() -> int:
    """Carry out the proofs, and return 0 when their outcomes are written."""
    parser = argparse.ArgumentParser()
    for name in ("results", "taken", "bare", "vfio"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--controls", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=[])
    parser.add_argument("--proofs", nargs="*", default=[])
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S)
    arguments = parser.parse_args()
    groups = arguments.only or list(GROUPS)
    guests = Guests(arguments.bare, arguments.vfio)
    choices = (arguments.seed, arguments.quick, arguments.controls)
    clocks = Clocks(arguments.taken)

    def proofs() -> list[tuple[str, str, Proof]]:
        """Return all proofs, with the timeout that fits the present rate of L1's clock."""
        timeout_s = clocks.in_l1(arguments.timeout)
        return [
            (group, name, proof)
            for group, name, proof in _all_proofs(groups, guests, *choices, timeout_s)
            if not arguments.proofs or name in arguments.proofs
        ]

    outcomes = {}
    for number in claimed(len(proofs()), arguments.taken):
        outcomes[number] = outcome = run(*proofs()[number])
        text = f"{outcome.group}: {outcome.name}: {outcome.found} ({outcome.seconds:.1f} s)"
        print(f"{_TAGS[outcome.state]}\t{text}", flush=True)
    results = {
        "kernel": platform.release(),
        "qemu": _qemu_version(arguments.timeout),
        "seed": arguments.seed,
        "seconds": round(time.monotonic(), 1),  # since L1's boot
        "outcomes": {number: outcome.to_json() for number, outcome in outcomes.items()},
    }
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
