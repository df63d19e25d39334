"""The state of a session that outlives its process, for a back end that is killed and restarted.

The next process continues the journal and the trace of the killed one; otherwise a loss between the
two could not be attributed to a link. Every journal record is written to a file at once. The trace
is saved at each harvest, because it changes only there.
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
    """Saves one session's journal and trace in `folder`; without a folder, saves nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(exist_ok=True)
        self.journal = Journal(folder / "records" if folder else None)

    def number_requests(self, device: VirtioDevice) -> None:
        """Raise the request number of `device` above those of its guest's previous processes.

        The number is the time in microseconds: no device serves more than one request in each.
        """
        if self._folder is not None:
            device.requests = max(device.requests, time.monotonic_ns() // 1000)

    def keep(self, collector: Collector, memory: GuestMemory) -> None:
        """Save the current journal and trace."""
        if self._folder is not None:
            evidence = collect_evidence(
                self.journal, collector, memory, requests=self.journal.writes
            )
            evidence.save(self._folder)

    def resume(self, collector: Collector) -> bool:
        """Continue the journal and a newly started collector from the saved state.

        Returns False if nothing was saved.

        Raises:
            UntestableError: the saved state cannot be read.
        """
        if self._folder is None:
            return False
        try:
            saved = Evidence.load(self._folder)
        except UntestableError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # the process died before logging
                return False
            raise
        self.journal.resume(saved.started_ns or 0)
        collector.harvests = [Harvest(*(int(value) for value in row)) for row in saved.harvests]
        # The harvest after the last one must report a write.
        due_epoch = int(self.journal.records()["epoch"].max(initial=1))
        epoch = max([due_epoch - 1, *(harvest.epoch for harvest in collector.harvests)])
        collector.trace.resume(saved.links, epoch)
        return True
