"""Two QEMUs that a test starts by itself, as a user does: dmaproof knows only their sockets."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMEOUT_S = 900.0
MIB = 1 << 20

MEMORY = {
    "memfd": ["-object", "memory-backend-memfd,id=ram0,size=64M,share=on"],
    "file": [
        "-object",
        "memory-backend-file,id=ram0,size=64M,share=on,mem-path={folder}/{side}-ram",
    ],
    "anonymous": ["-object", "memory-backend-ram,id=ram0,size=64M,share=on"],
    "private": ["-object", "memory-backend-ram,id=ram0,size=64M"],
}
"""QEMU options for each kind of memory that a guest's RAM can have."""
WITH_RAM0 = ["-machine", "q35,memory-backend=ram0", "-m", "64"]

_OUTPUT = ["-chardev", "file,id=output,path={folder}/{side}-output"]
PROBE_OUTPUT = [*_OUTPUT, *("-serial", "null", "-serial", "chardev:output")]
FIRMWARE_OUTPUT = [*_OUTPUT, *("-device", "isa-debugcon,iobase=0x402,chardev=output")]
"""QEMU options that let `Pair.wait_for_output` read the output of the probe guest or SeaBIOS."""


class Monitor:
    """The test's own QMP client."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(os.fspath(path))
                break
            except OSError:
                self._socket.close()
                assert time.monotonic() < deadline, f"no QEMU listens at {path}"
                time.sleep(0.05)
        self._stream = self._socket.makefile("rw")
        self._read()
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._stream.readline())
        return answer

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute `command`; underscores in the names of arguments become hyphens."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._stream.write(json.dumps({"execute": command, "arguments": named}))
        self._stream.flush()
        while True:
            answer = self._read()
            assert "error" not in answer, (command, answer)
            if "return" in answer:
                return answer["return"]

    def wait_for(self, command: str, *wanted: str) -> str:
        """Query `command` until the status is one of those `wanted`."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            status: str = self.execute(command).get("status", "none")
            if status in wanted:
                return status
            assert time.monotonic() < deadline, f"{command}: still {status}"
            time.sleep(0.05)

    def close(self) -> None:
        """Disconnect."""
        self._stream.close()
        self._socket.close()


@dataclass(frozen=True)
class Pair:
    """A source and a destination; `folder` has their sockets, `monitors` the test's QMP clients."""

    folder: Path
    source: Path
    destination: Path
    monitors: tuple[Monitor, Monitor]
    pids: tuple[int, int]

    def begin_to_migrate(self) -> None:
        """Start a migration from the source to the destination."""
        uri = f"unix:{self.folder / 'migration'}"
        self.monitors[1].execute("migrate-incoming", uri=uri)
        self.monitors[0].execute("migrate", uri=uri)

    def migrate(self, *, running: bool = False) -> None:
        """Migrate from the source to the destination, which stays paused.

        The source's vCPUs are paused first, unless they are to be `running`: under TCG some QEMUs
        lose what vCPUs write during a migration (docs/qemu-findings.md).
        """
        if not running:
            self.monitors[0].execute("stop")
        self.begin_to_migrate()
        source, destination = self.monitors
        assert source.wait_for("query-migrate", "completed", "failed") == "completed"
        destination.wait_for("query-status", "paused")

    def wait_for_output(self, text: str) -> None:
        """Wait until the source's guest has printed `text`."""
        file = self.folder / "source-output"
        deadline = time.monotonic() + _TIMEOUT_S
        while text not in (output := file.read_text(errors="replace")):
            assert time.monotonic() < deadline, f"expected {text!r} from the guest, got {output!r}"
            time.sleep(0.05)

    def memory_file(self, side: int, name: str) -> Path:
        """Return the /proc entry of the file with the RAM of a side (0 source, 1 destination)."""
        for entry in Path(f"/proc/{self.pids[side]}/fd").iterdir():
            with contextlib.suppress(OSError):
                if name in os.fspath(entry.readlink()):
                    return entry
        raise AssertionError(f"process {self.pids[side]} has not opened {name}")


@contextlib.contextmanager
def foreign_pair(
    qemu: Path,
    folder: Path,
    arguments: Sequence[str],
    *,
    accelerator: str = "tcg",
    destination: Sequence[str] = ("-S", "-incoming", "defer"),
) -> Iterator[Pair]:
    """Start the pair with `arguments`, in which {folder} and {side} are replaced.

    `destination` are the additional options of the destination.

    Each side has two more QMP sockets: a free one, and one for the test itself.
    """
    processes: list[subprocess.Popen[bytes]] = []
    monitors: list[Monitor] = []
    try:
        for side, extra in (("source", ()), ("destination", destination)):
            words = (*arguments, *extra)
            options = [word.format(folder=folder, side=side) for word in words]
            for name in (side, f"{side}-2", f"{side}-test"):
                options += ["-qmp", f"unix:{folder / name},server=on,wait=off"]
            command = [os.fspath(qemu), "-nodefaults", "-display", "none", "-accel", accelerator]
            processes.append(subprocess.Popen([*command, *options]))
        for side in ("source", "destination"):
            monitors.append(Monitor(folder / f"{side}-test"))
        yield Pair(
            folder,
            folder / "source",
            folder / "destination",
            (monitors[0], monitors[1]),
            (processes[0].pid, processes[1].pid),
        )
    finally:
        for monitor in monitors:
            monitor.close()
        for process in processes:
            process.kill()
            process.wait()
