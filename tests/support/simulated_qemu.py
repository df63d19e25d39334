"""A simulated paused QEMU that answers QMP, with its RAM in a file, for tests that read the RAM."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qmp_tools.memory.physical_map import MapRegion
from qmp_tools.qemu.qemu import Qemu


def _do_nothing() -> None:
    pass


@dataclass
class SimulatedQemu:
    """A QEMU with RAM `ram_fd`, of which each of the `regions` shows a part, from its `offset` on.

    `hvas` has the host address of a region by its GPA. `on_save` is called before QEMU saves a
    piece of its RAM, and `saves` counts these pieces. Each property in `qom` is true. `thread` is
    the thread of its vCPU, if that is not the first thread of the process.
    """

    name: str
    ram_fd: int
    regions: Sequence[MapRegion]
    hvas: Mapping[int, int]
    pid: int = 0
    thread: int | None = None
    has_vcpus: bool = True
    state: str = "postmigrate"
    migration: dict[str, Any] = field(default_factory=lambda: {"status": "completed"})
    translation_blocks: int | None = 0
    backends: Sequence[Mapping[str, Any]] = ()
    memory_devices: Sequence[Mapping[str, Any]] = ()
    ram_blocks: str = "Error\r\n"
    qom: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    kvm: bool = False
    version: str = "10.0.2"
    address: str = "/run/qmp"
    on_save: Callable[[], None] = _do_nothing
    saves: int = 0
    closed: Exception | None = None
    capabilities: Sequence[str] = ()

    @property
    def qmp(self) -> SimulatedQemu:
        """The QMP session, which is this object."""
        return self

    @property
    def attached(self) -> Qemu:
        """This object, with the type that the code under test expects."""
        return cast(Qemu, self)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Answer a QMP command, or raise `closed`."""
        if self.closed:
            raise self.closed
        if command == "pmemsave":
            self.on_save()
            self.saves += 1
            return self.save(arguments["val"], arguments["size"], Path(arguments["filename"]))
        return {
            "query-cpus-fast": [{"thread-id": self.thread or self.pid}] * self.has_vcpus,
            "query-kvm": {"enabled": self.kvm},
            "query-memdev": self.backends,
            "query-memory-devices": self.memory_devices,
            "query-migrate": self.migration,
            "query-migrate-capabilities": [
                *({"capability": name, "state": True} for name in self.capabilities),
                {"capability": "events", "state": False},
            ],
            "qom-list": self.qom.get(arguments.get("path", ""), []),
            "qom-get": True,
            "query-stats": [{"stats": [{"name": "exits", "value": 0}]}],
        }[command]

    async def status(self) -> str:
        """Return the run state."""
        return self.state

    async def monitor(self, command: str) -> str:
        """Answer a human monitor command."""
        if command == "info mtree -f":
            return self._flat_view()
        if command.startswith("gpa2hva "):
            hva = self.hvas.get(int(command.split()[1], 16))
            return "No memory is mapped\r\n" if hva is None else f"Host address is {hva:#x}\r\n"
        if command == "info jit" and self.translation_blocks is not None:
            return f"TB count            {self.translation_blocks}\r\n"
        return self.ram_blocks if command == "info ramblock" else "Error\r\n"

    def _flat_view(self) -> str:
        lines = [
            f"  {region.gpa:016x}-{region.end - 1:016x} (prio 0, {region.kind}): {region.name}"
            f" @{region.offset:016x}"
            for region in self.regions
        ]
        return "\n".join(["FlatView #0", ' AS "memory", root: system', *lines, ""])

    def save(self, gpa: int, length: int, file: Path) -> None:
        """Write `length` bytes of the RAM, from `gpa` on, to a file."""
        region = next(region for region in self.regions if region.gpa <= gpa < region.end)
        file.write_bytes(os.pread(self.ram_fd, length, region.offset + gpa - region.gpa))
