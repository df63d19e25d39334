"""Many migrations of one guest, there and back: nothing is lost, and nothing grows.

What a run holds on to shows only in the long run: a mapping of a guest that is gone, a socket, the
journal of a session that is over. So after each migration it is looked at what the tool and the
device's process have, and what they have at the end is held against what they had warmed up to.
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
from .run import proof_run, there_and_back

_logger = logging.getLogger(__name__)

TOOL: Final = "tool"
_ALLOWED_BYTES: Final = 8 * MIB
"""What an allocator's pools come to: 5 MiB were seen. A migration's journal and trace are 1 MiB."""
_SHARED_MEMORY: Final = ("/memfd:", "/dev/shm/")


@dataclass(frozen=True)
class Holdings:
    """What a process has at a moment.

    `private_bytes` is its anonymous resident memory (RssAnon of proc(5)), without the guests' RAM
    that it has mapped; `descriptors` its open files; `shared_objects` how many memfds and files of
    /dev/shm it has open or mapped.
    """

    private_bytes: int
    descriptors: int
    shared_objects: int


def holdings_of(pid: int) -> Holdings:
    """What process `pid` has now.

    Raises:
        UntestableError: it has gone, or may not be looked at.
    """
    folder = Path(f"/proc/{pid}")
    try:
        status = (folder / "status").read_text()
        mapped = [line.split(maxsplit=5) for line in (folder / "maps").read_text().splitlines()]
        opened = [_opened(entry) for entry in (folder / "fd").iterdir()]
    except OSError as error:
        raise UntestableError(f"process {pid} cannot be looked at: {error}") from error
    files = [*opened, *((words[5], int(words[4])) for words in mapped if len(words) > 5)]
    private_kib = next(it.split()[1] for it in status.splitlines() if it.startswith("RssAnon:"))
    return Holdings(
        private_bytes=int(private_kib) << 10,
        descriptors=len(opened),
        shared_objects=len({inode for path, inode in files if path.startswith(_SHARED_MEMORY)}),
    )


def _opened(entry: Path) -> tuple[str, int]:
    """Name and inode of an open file; of none where it was open for this very look."""
    try:
        return os.readlink(entry), entry.stat().st_ino  # noqa: PTH115  (a memfd has no path)
    except FileNotFoundError:
        return "", 0


@dataclass(frozen=True)
class Growth:
    """What a process had when warm, and at the end: the least of a quarter of the migrations."""

    process: str
    warm: Holdings
    last: Holdings

    @property
    def private_bytes(self) -> int:
        """By how much its private memory has grown."""
        return self.last.private_bytes - self.warm.private_bytes

    @property
    def descriptors(self) -> int:
        """By how many its open files have grown."""
        return self.last.descriptors - self.warm.descriptors

    @property
    def shared_objects(self) -> int:
        """By how many its shared memory objects have grown."""
        return self.last.shared_objects - self.warm.shared_objects

    @property
    def is_none(self) -> bool:
        """Whether it comes to nothing, but for what an allocator keeps."""
        return (
            self.private_bytes <= _ALLOWED_BYTES
            and self.descriptors <= 0
            and self.shared_objects <= 0
        )


def growth(process: str, seen: Sequence[Holdings]) -> Growth:
    """The growth from the second quarter of `seen` to the last; the first is for warming up."""
    quarter = max(1, len(seen) // 4)
    warm = seen[quarter : 2 * quarter] or seen
    return Growth(process, _least(warm), _least(seen[-quarter:]))


def _least(seen: Sequence[Holdings]) -> Holdings:
    return Holdings(
        private_bytes=min(it.private_bytes for it in seen),
        descriptors=min(it.descriptors for it in seen),
        shared_objects=min(it.shared_objects for it in seen),
    )


@dataclass(frozen=True)
class Soak:
    """So many migrations, the last of them `proof`; `holdings` has one entry for each, by process.

    `seconds` is the time of all of it.
    """

    wanted: int
    proof: Proof
    holdings: Mapping[str, Sequence[Holdings]]
    seconds: float

    @property
    def migrations(self) -> Sequence[MigrationSummary]:
        """All migrations, in numbers."""
        return [*self.proof.earlier, self.proof.migration_summary]

    @property
    def growths(self) -> Sequence[Growth]:
        """What each process has grown by."""
        return [growth(process, seen) for process, seen in self.holdings.items()]

    @property
    def exit_code(self) -> int:
        """As for `Verdict`; growth counts as a loss."""
        if self.proof.verdict.exit_code != EXIT_PASS:
            return self.proof.verdict.exit_code
        return EXIT_PASS if all(it.is_none for it in self.growths) else EXIT_LOST

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        migrations = self.migrations
        if self.proof.verdict.exit_code != EXIT_PASS:
            return f"migration {len(migrations)} of {self.wanted}: {self.proof.verdict.sentence}"
        grown = [it.process for it in self.growths if not it.is_none]
        what_grew = f"but the {' and the '.join(grown)} grew" if grown else "and nothing grew"
        pages = sum(migration.pages for migration in migrations)
        return f"every page equal in {len(migrations)} migrations ({pages} compared), {what_grew}"


async def soak(setup: Setup, migrations: int) -> Soak:
    """Migrate so often, until the first time that is no pass; each is logged.

    Raises:
        UsageError: the scenario cannot be repeated.
        UntestableError: one did not come to a verdict.
    """
    if not find_scenario(setup.scenario).is_repeatable:
        known = known_scenarios().usable().items()
        repeatable = ", ".join(name for name, scenario in known if scenario().is_repeatable)
        raise UsageError(f"scenario {setup.scenario!r} cannot be repeated; {repeatable} can")
    began_s = time.monotonic()
    holdings: dict[str, list[Holdings]] = {}
    with run_folder() as folder:
        async with (
            proof_run(setup, folder) as run,
            contextlib.aclosing(there_and_back(run, migrations)) as proofs,
        ):
            async for proof in proofs:
                ours = {it.name: it.pid for it in run.device.processes} | {TOOL: os.getpid()}
                for process, pid in ours.items():
                    holdings.setdefault(process, []).append(holdings_of(pid))
                number = len(proof.earlier) + 1
                seconds, sentence = proof.migration_s, proof.verdict.sentence
                _logger.info("migration %d, %.1f s: %s", number, seconds, sentence)
    return Soak(migrations, proof, holdings, time.monotonic() - began_s)
