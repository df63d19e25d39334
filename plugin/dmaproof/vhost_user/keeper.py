"""What of a session outlives its process: for a back end that is killed and started again.

Its successor has to go on with the journal and the trace where they ended, or a loss between the
two could not be placed. Every record of the journal is in a file at once; the trace follows at each
harvest, since nothing changes in it between two.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..collector import Collector, Harvest
from ..devices import VirtioDevice
from ..errors import UntestableError
from ..evidence import Evidence, collect_evidence
from ..guest_memory import GuestMemory
from ..journal import Journal


class Keeper:
    """Keeps one session's journal and trace in `folder`; without one, nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(exist_ok=True)
        self.journal = Journal(folder / "records" if folder else None)

    def number_requests(self, device: VirtioDevice) -> None:
        """Let `device` go on with numbers above those of whoever else has served its guest.

        They count the microseconds, which no device here can overtake.
        """
        if self._folder is not None:
            device.requests = max(device.requests, time.monotonic_ns() // 1000)

    def keep(self, collector: Collector, memory: GuestMemory) -> None:
        """Note where the trace stands."""
        if self._folder is not None:
            evidence = collect_evidence(
                self.journal, collector, memory, requests=self.journal.writes
            )
            evidence.save(self._folder)

    def resume(self, collector: Collector) -> bool:
        """Let the journal, and a collector that has just been started, go on from what was kept.

        False if nothing was.

        Raises:
            UntestableError: what was kept cannot be read.
        """
        if self._folder is None:
            return False
        try:
            kept = Evidence.load(self._folder)
        except UntestableError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # the log was not on yet
                return False
            raise
        self.journal.resume(kept.started_ns or 0)
        collector.harvests = [Harvest(*(int(value) for value in row)) for row in kept.harvests]
        # A write is due one harvest later than the last there was.
        due = int(self.journal.records()["epoch"].max(initial=1))
        epoch = max([due - 1, *(harvest.epoch for harvest in collector.harvests)])
        collector.trace.resume(kept.links, epoch)
        return True
