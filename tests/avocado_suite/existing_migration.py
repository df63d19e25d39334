"""A usual migration test; the three lines marked 'added' check all its RAM."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from avocado import Test
from qemu.qmp.legacy import QEMUMonitorProtocol

from qmp_tools.integrations.avocado import check_ram  # added


class Existing(Test):  # type: ignore[misc]
    """Migrate a guest that runs its firmware; `spoil` changes a byte of the destination's RAM."""

    timeout = 120

    def start(self, name: str, *arguments: str) -> Any:
        path = self.path(name)
        options = ["-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64", *arguments]
        options += ["-qmp", f"unix:{path}-ram,server=on,wait=off"]  # added
        qemu = self.params.get("qemu", default="qemu-system-x86_64")
        monitor = QEMUMonitorProtocol(path, server=True)
        self.monitors.append(monitor)
        self.processes.append(subprocess.Popen([qemu, *options, "-qmp", f"unix:{path}"]))
        monitor.accept(timeout=30)
        return monitor

    def path(self, name: str) -> str:
        return f"{self.folder.name}/{name}"

    def setUp(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.monitors: list[QEMUMonitorProtocol] = []

    def test_migration(self) -> None:
        source = self.start("source")
        destination = self.start("destination", "-S", "-incoming", "defer")
        destination.cmd("migrate-incoming", uri=f"unix:{self.path('migration')}")
        source.cmd("migrate", uri=f"unix:{self.path('migration')}")
        while (status := source.cmd("query-migrate").get("status")) != "completed":
            assert status != "failed"
            time.sleep(0.05)
        while destination.cmd("query-status")["status"] == "inmigrate":
            time.sleep(0.05)
        self.spoil(destination)
        check_ram(self, self.path("source-ram"), self.path("destination-ram"))  # added

    def spoil(self, destination: Any) -> None:
        """Change the byte of the destination's RAM at the address of parameter `spoil`."""
        if gpa := self.params.get("spoil"):
            command = {"command-line": f"gpa2hva {gpa}"}
            answer = destination.cmd("human-monitor-command", **command)
            memory_of = Path(f"/proc/{self.processes[1].pid}/mem")
            with memory_of.open("r+b", buffering=0) as memory:
                memory.seek(int(str(answer).split()[-1], 16))
                memory.write(b"!")

    def tearDown(self) -> None:
        for monitor in self.monitors:
            monitor.close()
        for process in self.processes:
            process.kill()
            process.wait()
        self.folder.cleanup()
