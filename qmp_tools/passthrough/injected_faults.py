"""Each fault of the module, injected again and again: the comparison must catch it every time."""

from __future__ import annotations

import random
from typing import Any, Final

from dmaproof.errors import DmaproofError, UsageError
from dmaproof.units import PAGE_BYTES

from .differential import dma_round, iterator_cases
from .fake_device import injected
from .fake_driver import by_either
from .outcome import ProofFailedError, require

FAULTS: Final[dict[str, dict[str, int]]] = {
    "drop": {"drop": 50},
    "shift": {"shift": 1},
    "late": {"late": 2000},
    "clear-before-read": {"clear_before_read": 200},
}
"""Parameters of the module by the fault's name."""
_WRITES: Final = 60
_CASES: Final = 30


def parse_fault(text: str) -> dict[str, int]:
    """The module's parameters for 'NAME' or 'NAME=VALUE', one of `FAULTS`.

    Raises:
        UsageError: there is no such fault, or it cannot have that value.
    """
    name, given, value = text.partition("=")
    if name not in FAULTS:
        raise UsageError(f"fault {text}: the fake VFIO device has {', '.join(sorted(FAULTS))}")
    ((parameter, number),) = FAULTS[name].items()
    if given:
        number = int(value) if value.isdecimal() else 0
    if not 0 < number < 1 << 31:
        raise UsageError(f"fault {text}: a whole number from 1 on is due")
    return {parameter: number}


def caught(name: str, rounds: int, seed: int) -> tuple[str, dict[str, Any]]:
    """`rounds` rounds of DMA with the fault injected; each must be told from a clean one."""
    choose = random.Random(seed)
    told: list[str] = []
    for round_number in range(rounds):
        # A device for each: what a fault holds back must not heal the next round.
        with by_either() as driver:
            driver.device.start_logging([driver.window], PAGE_BYTES)
            dma_round(driver, choose, _WRITES)  # clean, in the same set-up
            with injected(**FAULTS[name], seed=seed + round_number):
                try:
                    dma_round(driver, choose, _WRITES)
                except (ProofFailedError, DmaproofError) as error:
                    told.append(str(error))
    require(len(told) == rounds, f"caught {len(told)} of {rounds}")
    return f"caught {rounds} of {rounds}; the first: {told[0]}", {"rounds": rounds, "seed": seed}


def caught_by_the_iterator(rounds: int, seed: int) -> tuple[str, dict[str, Any]]:
    """The comparison of iterators, with reports beside the place."""
    told = 0
    for round_number in range(rounds):
        with injected(shift=1):
            try:
                iterator_cases(_CASES, seed + round_number)
            except ProofFailedError:
                told += 1
    require(told == rounds, f"caught {told} of {rounds}")
    return f"caught {rounds} of {rounds}", {"rounds": rounds, "seed": seed}
