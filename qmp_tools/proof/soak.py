"""Migrate one guest back and forth many times: no page may be lost, and no process may grow.

A leak shows only in the long run: the mapping of a guest that has ended, a socket, or the journal
of a session that is over. After each migration dmaproof therefore measures the resources of the
tool and of the device's process, and compares the last figures with those after the warm-up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from ..exit_codes import EXIT_LOST, EXIT_PASS
from ..host.run_folder import run_folder
from ..migration.scenarios import find_scenario, known_scenarios
from ..qemu.machine import MIB
from .model import MigrationSummary, Proof, Setup
from .run import consecutive_proofs, proof_run

_logger = logging.getLogger(__name__)

TOOL: Final = "tool"
_ALLOWED_BYTES: Final = 8 * MIB
"""An allowance for an allocator's pools, of which 5 MiB were seen. The journal and trace of one
migration take 1 MiB."""
_SHARED_MEMORY: Final = ("/memfd:", "/dev/shm/")


@dataclass(frozen=True)
class Holdings:
    """The resources that a process holds at one moment.

    `private_bytes` is its anonymous resident memory (RssAnon of proc(5)), without the guests' RAM
    that it has mapped. `descriptors` counts its open files. `shared_objects` counts the memfds and
    the files of /dev/shm that it has open or mapped.
    """

    private_bytes: int
    descriptors: int
    shared_objects: int


def holdings_of(pid: int) -> Holdings:
    """Measure the resources of process `pid`.

    Raises:
        UntestableError: the process has ended, or its resources cannot be read.
    """
    folder = Path(f"/proc/{pid}")
    try:
        status = (folder / "status").read_text()
        mapped = [line.split(maxsplit=5) for line in (folder / "maps").read_text().splitlines()]
        opened = [_opened(entry) for entry in (folder / "fd").iterdir()]
    except OSError as error:
        raise UntestableError(f"the resources of process {pid} cannot be read: {error}") from error
    files = [*opened, *((words[5], int(words[4])) for words in mapped if len(words) > 5)]
    lines = status.splitlines()
    private_kib = next(line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return Holdings(
        private_bytes=int(private_kib) << 10,
        descriptors=len(opened),
        shared_objects=len({inode for path, inode in files if path.startswith(_SHARED_MEMORY)}),
    )


def _opened(entry: Path) -> tuple[str, int]:
    """Return name and inode of an open file; no name if it was open only to read this folder."""
    try:
        return os.readlink(entry), entry.stat().st_ino  # noqa: PTH115  (a memfd has no path)
    except FileNotFoundError:
        return "", 0


@dataclass(frozen=True)
class Growth:
    """The resources of a process after the warm-up and at the end.

    Each figure is the minimum over a quarter of the migrations.
    """

    process: str
    warm: Holdings
    last: Holdings

    @property
    def private_bytes(self) -> int:
        """The growth of its private memory."""
        return self.last.private_bytes - self.warm.private_bytes

    @property
    def descriptors(self) -> int:
        """The growth of the number of its open files."""
        return self.last.descriptors - self.warm.descriptors

    @property
    def shared_objects(self) -> int:
        """The growth of the number of its shared memory objects."""
        return self.last.shared_objects - self.warm.shared_objects

    @property
    def is_none(self) -> bool:
        """Whether the process has not grown, apart from the pools of its allocator."""
        return (
            self.private_bytes <= _ALLOWED_BYTES
            and self.descriptors <= 0
            and self.shared_objects <= 0
        )


def growth(process: str, seen: Sequence[Holdings]) -> Growth:
    """Return the growth from the second quarter of `seen` to the last; the first is the warm-up."""
    quarter = max(1, len(seen) // 4)
    # The guest is on the same side after every second migration. A device with a process for each
    # side holds more there, so a quarter of one migration is compared with one on the same side.
    begin = quarter + (len(seen) % 2 if quarter == 1 else 0)
    warm = seen[begin : begin + quarter] or seen
    return Growth(process, _least(warm), _least(seen[-quarter:]))


def _least(seen: Sequence[Holdings]) -> Holdings:
    return Holdings(
        private_bytes=min(holdings.private_bytes for holdings in seen),
        descriptors=min(holdings.descriptors for holdings in seen),
        shared_objects=min(holdings.shared_objects for holdings in seen),
    )


@dataclass(frozen=True)
class Soak:
    """The outcome of a soak.

    `wanted` is the number of migrations that were requested, and `proof` is the last one that was
    carried out. `holdings` has for each process one entry for each migration. `seconds` is the
    duration of the whole soak.
    """

    wanted: int
    proof: Proof
    holdings: Mapping[str, Sequence[Holdings]]
    seconds: float

    @property
    def migrations(self) -> Sequence[MigrationSummary]:
        """The figures of all migrations."""
        return [*self.proof.earlier, self.proof.migration_summary]

    @property
    def growths(self) -> Sequence[Growth]:
        """The growth of each process."""
        return [growth(process, seen) for process, seen in self.holdings.items()]

    @property
    def exit_code(self) -> int:
        """The exit code, as of `Verdict`; growth counts as a loss."""
        if self.proof.verdict.exit_code != EXIT_PASS:
            return self.proof.verdict.exit_code
        return EXIT_PASS if all(growth.is_none for growth in self.growths) else EXIT_LOST

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        migrations = self.migrations
        if self.proof.verdict.exit_code != EXIT_PASS:
            return f"migration {len(migrations)} of {self.wanted}: {self.proof.verdict.sentence}"
        grown = [growth.process for growth in self.growths if not growth.is_none]
        what_grew = (
            f"but the resource use of the {' and the '.join(grown)} grew"
            if grown
            else "and no process grew"
        )
        pages = sum(migration.pages for migration in migrations)
        return (
            f"all pages are equal in {len(migrations)} migrations ({pages} pages compared), "
            f"{what_grew}"
        )


async def soak(setup: Setup, migrations: int) -> Soak:
    """Carry out `migrations` migrations, or until one does not pass, and log each.

    Raises:
        UsageError: the scenario cannot be repeated.
        UntestableError: a migration did not reach a verdict.
    """
    if not find_scenario(setup.scenario).is_repeatable:
        known = known_scenarios().usable().items()
        repeatable = ", ".join(name for name, scenario in known if scenario().is_repeatable)
        raise UsageError(
            f"scenario {setup.scenario!r} cannot be repeated; choose one of {repeatable}"
        )
    began_s = time.monotonic()
    holdings: dict[str, list[Holdings]] = {}
    with run_folder() as folder:
        async with (
            proof_run(setup, folder) as run,
            contextlib.aclosing(consecutive_proofs(run, migrations)) as proofs,
        ):
            async for proof in proofs:
                pids = {process.name: process.pid for process in run.device.processes}
                for name, pid in (pids | {TOOL: os.getpid()}).items():
                    holdings.setdefault(name, []).append(holdings_of(pid))
                number = len(proof.earlier) + 1
                seconds, sentence = proof.migration_s, proof.verdict.sentence
                _logger.info("migration %d, %.1f s: %s", number, seconds, sentence)
    return Soak(migrations, proof, holdings, time.monotonic() - began_s)
