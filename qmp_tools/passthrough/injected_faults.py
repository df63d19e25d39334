"""Each fault of the module, injected repeatedly: the comparison must catch it every time."""

from __future__ import annotations

import random
from typing import Any, Final

from dmaproof.errors import DmaproofError, UsageError
from dmaproof.units import PAGE_BYTES

from .differential import dma_round, iterator_cases
from .fake_device import injected
from .fake_driver import any_driver
from .outcome import ProofFailedError, require

FAULTS: Final[dict[str, dict[str, int]]] = {
    "drop": {"drop": 50},
    "shift": {"shift": 1},
    "late": {"late": 2000},
    "clear-before-read": {"clear_before_read": 200},
}
"""The module's parameter and its default value, by the fault's name."""
_WRITES: Final = 60
_CASES: Final = 30


def parse_fault(text: str) -> dict[str, int]:
    """Return the module's parameter for 'NAME' or 'NAME=VALUE', where NAME is one of `FAULTS`.

    Raises:
        UsageError: NAME is not a fault, or VALUE is not a positive number of 31 bits.
    """
    name, given, value = text.partition("=")
    if name not in FAULTS:
        raise UsageError(
            f"fault {text}: expected one of {', '.join(sorted(FAULTS))} for the fake VFIO device"
        )
    ((parameter, number),) = FAULTS[name].items()
    if given:
        number = int(value) if value.isdecimal() else 0
    if not 0 < number < 1 << 31:
        raise UsageError(f"fault {text}: expected a whole number from 1 on, got {value!r}")
    return {parameter: number}


def caught(name: str, rounds: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Carry out `rounds` rounds of DMA with the fault injected; each must be caught."""
    choose = random.Random(seed)
    catches: list[str] = []
    for round_number in range(rounds):
        # A new device for each round: a report that a fault delays must not reach the next round.
        with any_driver() as driver:
            driver.device.start_logging([driver.window], PAGE_BYTES)
            dma_round(driver, choose, _WRITES)  # without a fault
            with injected(**FAULTS[name], seed=seed + round_number):
                try:
                    dma_round(driver, choose, _WRITES)
                except (ProofFailedError, DmaproofError) as error:
                    catches.append(str(error))
    require(len(catches) == rounds, f"caught {len(catches)} of {rounds}")
    return f"caught {rounds} of {rounds}; the first: {catches[0]}", {"rounds": rounds, "seed": seed}


def caught_by_the_iterator(rounds: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Compare the iterators while reports are shifted by a page; each comparison must fail."""
    caught_rounds = 0
    for round_number in range(rounds):
        with injected(shift=1):
            try:
                iterator_cases(_CASES, seed + round_number)
            except ProofFailedError:
                caught_rounds += 1
    require(caught_rounds == rounds, f"caught {caught_rounds} of {rounds}")
    return f"caught {rounds} of {rounds}", {"rounds": rounds, "seed": seed}
