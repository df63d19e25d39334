"""Try every injected fault, and report which were caught, by what, and at which link.

A fault is tried on the test bed, where each one can be detected within a second. If it can also be
detected with one device on one QEMU, it is tried in a real proof too. A fault counts as caught only
if the verdict names the link that was broken. The control does the same without a fault: any result
other than a pass is then a false alarm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import RefusedError, UntestableError, UsageError
from dmaproof.faults import known_faults, summary

from ..devices.process import DeviceOptions
from ..exit_codes import EXIT_PASS
from ..host.timeout import DEFAULT_TIMEOUT_S
from ..migration.judgement import Blame
from ..proof.model import Setup
from ..proof.run import prove
from ..proof.verdict import Verdict
from .simulation import simulate

_logger = logging.getLogger(__name__)

CONTROL: Final = "none"
_CAUGHT_OF_20: Final = 19

_PROCESSORS_OF_A_PROOF: Final = 4
"""Two QEMUs, one of which has two busy vCPUs, and the device."""

MakeSetup = Callable[[str | None, int], Awaitable[Setup]]


class Bench(StrEnum):
    """The environment in which a fault is tried."""

    TESTBED = "testbed"
    QEMU = "qemu"


@dataclass(frozen=True)
class TestbedForm:
    """The form of a fault on the test bed, where everything is faster than with QEMU.

    `value` and `harvest` are the fault's value and the harvest policy. The other members are those
    of `simulate`.
    """

    value: str = ""
    harvest: str = "0.01"
    devices: int = 1
    killed: bool = False
    reset: bool = False
    iommu: bool = False


TESTBED_FORMS: Final = {
    "bit-before-data": TestbedForm("=0.01"),
    "forgotten-at-restart": TestbedForm(harvest="final", killed=True),
    "index-kept-at-reset": TestbedForm(reset=True),
    "iova-as-gpa": TestbedForm(iommu=True),
    "log-forgotten-at-reset": TestbedForm(reset=True),
    "non-atomic-or": TestbedForm(harvest="0.002", devices=2),
    "tracker-after-log": TestbedForm("=1", harvest="final"),
    "unmap-unharvested": TestbedForm(iommu=True),
}


class Means(StrEnum):
    """The means by which a fault is caught."""

    COMPARISON = "comparison"
    GUEST = "guest"
    JOURNAL = "journal"
    REFUSAL = "refusal"
    """The device refused what QEMU or the guest sent."""
    RING = "ring"
    """The index of a ring is impossible."""


@dataclass(frozen=True)
class Trial:
    """One run with a fault. `caught_by` is empty if the fault was not caught.

    `links` counts the lost pages by the link at which they were lost, according to the verdict.
    `untested` is the whole reason for which there is no verdict; None if there is one.
    """

    seed: int
    caught_by: Sequence[Means] = ()
    links: dict[str, int] = field(default_factory=dict)
    lost_pages: int = 0
    guaranteed_detectable_pages: int = 0
    untested: str | None = None


@dataclass(frozen=True)
class Row:
    """All trials of a fault, or of the control, on one bench."""

    fault: str
    link: str
    summary: str
    bench: Bench
    trials: Sequence[Trial]

    @property
    def caught(self) -> int:
        """The number of trials in which the broken link was found, and no other."""
        if self.fault == CONTROL:
            return sum(bool(trial.caught_by) for trial in self.trials)
        return sum(self._has_found_link(trial) for trial in self.trials if trial.caught_by)

    def _has_found_link(self, trial: Trial) -> bool:
        if not self.link:  # the fault loses no page
            return Means.RING in trial.caught_by and not trial.links
        return Means.REFUSAL in trial.caught_by or set(trial.links) == {self.link}

    @property
    def as_wanted(self) -> bool:
        """Whether at least 19 of 20 trials caught the fault, or the control raised no alarm."""
        if any(trial.untested for trial in self.trials):
            return False
        if self.fault == CONTROL:
            return self.caught == 0
        return self.caught * 20 >= len(self.trials) * _CAUGHT_OF_20

    def cells(self) -> list[str]:
        """Return the cells of the row in a table for people."""
        means: Counter[str] = Counter()
        for trial in self.trials:
            means.update(trial.caught_by)
        untested = [trial.untested for trial in self.trials if trial.untested]
        what = "caught" if self.fault != CONTROL else "alarms"
        return [
            self.fault,
            self.link,
            self.bench,
            f"{self.caught}/{len(self.trials)} {what}",
            ", ".join(means) if not untested else f"not tested: {untested[0].splitlines()[0]}",
            f"{statistics.median(trial.lost_pages for trial in self.trials):g}",
            f"{statistics.median(trial.guaranteed_detectable_pages for trial in self.trials):g}",
            self.summary,
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all findings of the row."""
        return {**asdict(self), "caught": self.caught, "as_wanted": self.as_wanted}


HEADINGS: Final = (
    "fault",
    "link",
    "tried on",
    "result",
    "caught by",
    "lost pages",
    "guaranteed detectable",
    "description",
)


async def try_faults(
    names: Iterable[str],
    benches: Iterable[Bench],
    seeds: Sequence[int],
    make_setup: MakeSetup,
    folder: Path,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    *,
    skips_refused: bool = False,
) -> list[Row]:
    """Try the faults `names` (which may include `CONTROL`), each with every seed.

    Args:
        names: the faults.
        benches: where to try them.
        seeds: the seed of each trial of a fault.
        make_setup: makes the set-up of a proof with a fault and a seed.
        folder: where the test bed's devices write their evidence.
        timeout_s: bounds each wait on the test bed, in seconds; a set-up has its own bound.
        skips_refused: whether to leave out a fault that the other options of a set-up exclude.

    Returns:
        A row for each fault on each bench.

    Raises:
        UsageError: the options of a set-up contradict each other, or exclude a fault.
    """
    names, rows = list(names), []
    benches = list(benches)
    reachable = [name for name in names if name == CONTROL or not known_faults()[name].needs]
    if Bench.QEMU in benches:
        reachable = await _accepted(reachable, seeds[0], make_setup, skips_refused=skips_refused)
    if Bench.TESTBED in benches:
        for name in names:
            trials = []
            for seed in seeds:
                trials.append(try_on_testbed(name, seed, folder, timeout_s))
                await asyncio.sleep(0.001)  # lets a signal end the loop; with 0 it would not
            rows.append(_row(name, Bench.TESTBED, trials))
    if Bench.QEMU in benches:
        proofs = _Proofs(make_setup)

        async def try_in_proofs(name: str) -> Row:
            trials = await asyncio.gather(*(proofs.trial(name, seed) for seed in seeds))
            return _row(name, Bench.QEMU, trials)

        rows += await asyncio.gather(*(try_in_proofs(name) for name in reachable))
    return sorted(rows, key=lambda row: names.index(row.fault))


async def _accepted(
    names: Sequence[str], seed: int, make_setup: MakeSetup, *, skips_refused: bool
) -> list[str]:
    """Return the faults `names` without those that a set-up refuses.

    Raises:
        UsageError: the set-up refuses a fault that is not to be skipped, or everything.
    """
    refused = set()
    for name in dict.fromkeys((CONTROL, *names)):
        try:
            with contextlib.suppress(UntestableError):  # each trial reports this itself
                await make_setup(_fault_of(name), seed)
        except UsageError as error:
            if name == CONTROL or not skips_refused:
                raise
            _logger.warning("%s: not tried in proofs: %s", name, error)
            refused.add(name)
    return [name for name in names if name not in refused]


def _fault_of(name: str) -> str | None:
    return None if name == CONTROL else name


def _row(name: str, bench: Bench, trials: Sequence[Trial]) -> Row:
    if name == CONTROL:
        row = Row(name, "", "control: no fault is injected", bench, trials)
    else:
        fault = known_faults()[name]
        row = Row(name, fault.link or "", summary(fault), bench, trials)
    _logger.info("%s", "  ".join(row.cells()))
    return row


class _Proofs:
    """Real proofs, as many at a time as the machine's processors allow."""

    def __init__(self, make_setup: MakeSetup) -> None:
        self._make_setup = make_setup
        self._machine_is_probed = asyncio.Lock()
        self._slots = asyncio.Semaphore(max(1, (os.cpu_count() or 1) // _PROCESSORS_OF_A_PROOF))

    async def trial(self, name: str, seed: int) -> Trial:
        """Carry out one proof with the fault `name`, and another if the first has no verdict.

        A proof without a verdict says nothing about the fault: its guest has not booted, say, or
        a busy machine let the migration complete too early.
        """
        async with self._slots:
            trial = await self._proof(name, seed)
            if trial.untested is not None:
                _logger.warning(
                    "%s, seed %d: repeated, because the proof has no verdict: %s",
                    *(name, seed, trial.untested),
                )
                trial = await self._proof(name, seed)
            return trial

    async def _proof(self, name: str, seed: int) -> Trial:
        try:
            async with self._machine_is_probed:
                setup = await self._make_setup(_fault_of(name), seed)
            proof = await prove(setup)
        except UntestableError as error:
            return _without_verdict(error, seed)
        return judge(proof.verdict, seed)


def try_on_testbed(name: str, seed: int, folder: Path, timeout_s: float) -> Trial:
    """Try the fault `name` once on the test bed; see `try_faults`."""
    fault = known_faults().get(name)
    form = TESTBED_FORMS.get(name, TestbedForm())
    options = DeviceOptions(seed=seed, harvest=form.harvest)
    if fault is not None:
        options = replace(
            options,
            fault=name + form.value,
            tracker=fault.tracker or options.tracker,
            harvest=fault.harvest or form.harvest,
        )
    try:
        verdict = simulate(
            options,
            folder,
            devices=form.devices,
            killed=form.killed,
            reset=form.reset,
            iommu=form.iommu,
            timeout_s=timeout_s,
        )
        return judge(verdict, seed)
    except UntestableError as error:
        return _without_verdict(error, seed)


def _without_verdict(error: UntestableError, seed: int) -> Trial:
    if isinstance(error, RefusedError):
        return Trial(seed, (Means.REFUSAL,))
    return Trial(seed, untested=str(error))


def judge(verdict: Verdict, seed: int) -> Trial:
    """Return by which means a verdict catches a fault; the accelerator's losses do not count."""
    lost = [page for page in verdict.lost if page.blame != Blame.ACCELERATOR]
    evidence = {
        Means.COMPARISON: bool(lost),
        Means.GUEST: bool(verdict.guest.errors),
        Means.JOURNAL: bool(verdict.sensitivity.unreported),
        Means.RING: bool(verdict.wrong_rings),
    }
    links = Counter(str(page.link) for page in lost) | Counter(verdict.sensitivity.missed_at)
    trial = Trial(
        seed,
        tuple(means for means, has_caught in evidence.items() if has_caught),
        dict(links),
        len(verdict.lost),
        verdict.sensitivity.guaranteed_detectable,
    )
    if verdict.exit_code != EXIT_PASS and not trial.caught_by:
        return replace(trial, untested=verdict.sentence)
    return trial
