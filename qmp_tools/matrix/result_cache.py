"""Results that outlive a matrix's run: a folder with a file for each cell that came to a verdict.

A file counts as long as what it was made with is what there is now: dmaproof's own code and the
Python that runs it, both QEMUs, the device's program where it is not ours, the guest, the machine
that the options come to, and the host's kernel. Files count by their content
(`host.program_files`). What changed makes the cells that used it run again, and no others.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import dmaproof
from dmaproof.errors import UsageError

from ..guest.build import sources
from ..proof.model import Setup
from ..qemu.program_files import ProgramFiles
from .axes import Cell

_NAME_LENGTH: Final = 120
_PACKAGES: Final = ("numpy", "qemu.qmp")
"""They take part in a verdict."""


@cache
def build_of_dmaproof() -> str:
    """A digest of all code that takes part in a proof: Python, the C core, the guests' sources."""
    core = importlib.util.find_spec("dmaproof._core")
    folders = [*map(Path, dmaproof.__path__), Path(__file__).parents[1], sources()]
    files = {
        file
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    files |= {Path(core.origin)} if core is not None and core.origin is not None else set()
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def key_of(cell: Cell, setup: Setup, files: ProgramFiles) -> str:
    """What the result of `cell`, which comes to `setup`, depends on, as a digest."""
    machine = setup.machine
    guest = [file for file in (machine.kernel, machine.initramfs) if file is not None]
    parts = {
        "dmaproof": build_of_dmaproof(),
        "python": [sys.version, *map(importlib.metadata.version, _PACKAGES)],
        "qemu": [files.contents([qemu]) for qemu in (setup.qemu, setup.qemu_destination)],
        "device": [files.contents(command) for command in setup.device.commands],
        "host": [os.uname().release, os.uname().version],
        "guest": files.contents(guest),
        "machine": [machine.machine, machine.accelerator, machine.memory_bytes, machine.cpus],
        "options": dict(cell),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Kept:
    """The files of one matrix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[Kept]:
        """The files in `folder`, which is made if need be and is this process's alone meanwhile.

        Raises:
            UsageError: it cannot be made, or another matrix uses it.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
        except OSError as error:
            raise UsageError(f"--folder {folder}: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"--folder {folder}: another matrix is using it") from None
            yield cls(folder)

    def file(self, cell: Cell) -> Path:
        """Where the result of `cell` is."""
        name = ",".join(f"{name}={value}" for name, value in cell.items())
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.,=+-]", "_", name)[:_NAME_LENGTH]
        return self.folder / f"{readable}-{digest}.json"

    def find(self, cell: Cell, key: str) -> Mapping[str, Any] | None:
        """What was kept of `cell` under `key`; None where there is nothing, or of another key."""
        try:
            content = json.loads(self.file(cell).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("key") != key:
            return None
        return content

    def keep(self, cell: Cell, key: str, report: Mapping[str, Any], seconds: float) -> None:
        """Keep the report of `cell`'s proof; whoever is killed meanwhile leaves the old one.

        Raises:
            UsageError: it cannot be written.
        """
        file = self.file(cell)
        fresh = file.with_suffix(".new")
        try:
            fresh.write_text(json.dumps({"key": key, "seconds": seconds, "report": report}) + "\n")
            fresh.replace(file)
        except OSError as error:
            raise UsageError(f"--folder {self.folder}: {error.strerror}") from error
