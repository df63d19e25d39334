"""The result cache of a matrix: a folder with a file for each cell that reached a verdict.

A cached result is valid as long as everything that it depends on is unchanged: dmaproof's own code
and the Python that runs it, both QEMUs, the program of a third-party device, the guest, the machine
that the options resolve to, and the host's kernel. Files are compared by their content
(`qemu.program_files`). A change makes only those cells run again that depend on what changed.
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
from .cells import Cell

_NAME_LENGTH: Final = 120
_PACKAGES: Final = ("numpy", "qemu.qmp")
"""The Python packages on which a verdict depends."""


@cache
def build_of_dmaproof() -> str:
    """Return a digest of the code of a proof: Python, the C core and the guests' sources."""
    core = importlib.util.find_spec("dmaproof._core")
    folders = [*map(Path, dmaproof.__path__), Path(__file__).parents[1], sources()]
    files = {
        file
        for folder in folders
        for file in folder.rglob("*")
        if "__pycache__" not in file.parts and file.is_file()
    }
    files |= {Path(core.origin)} if core is not None and core.origin is not None else set()
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def key_of(cell: Cell, setup: Setup, files: ProgramFiles) -> str:
    """Return a digest of everything on which the result of `cell` with its `setup` depends."""
    machine = setup.machine
    guest = [file for file in (machine.kernel, machine.initramfs) if file is not None]
    return key_of_parts(
        cell,
        {
            "qemu": [files.contents([qemu]) for qemu in (setup.qemu, setup.qemu_destination)],
            "device": [files.contents(command) for command in setup.device.commands],
            "guest": files.contents(guest),
            "machine": [machine.machine, machine.accelerator, machine.memory_bytes, machine.cpus],
        },
    )


def key_of_parts(cell: Cell, parts: Mapping[str, Any]) -> str:
    """Return a digest of `parts`, and of what the results of all cells depend on."""
    common = {
        "dmaproof": build_of_dmaproof(),
        "python": [sys.version, *map(importlib.metadata.version, _PACKAGES)],
        "host": [os.uname().release, os.uname().version],
        "options": dict(cell),
    }
    return hashlib.sha256(json.dumps({**common, **parts}, sort_keys=True).encode()).hexdigest()


class ResultCache:
    """The cached results of one matrix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[ResultCache]:
        """Open the cache in `folder` for this process alone; create the folder if necessary.

        Raises:
            UsageError: the folder cannot be created, or another matrix is using it.
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
                raise UsageError(
                    f"--folder {folder}: another matrix is using this folder; choose another one"
                ) from None
            yield cls(folder)

    def file(self, cell: Cell) -> Path:
        """Return the file for the result of `cell`."""
        name = ",".join(f"{name}={value}" for name, value in cell.items())
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.,=+-]", "_", name)[:_NAME_LENGTH]
        return self.folder / f"{readable}-{digest}.json"

    def find(self, cell: Cell, key: str) -> Mapping[str, Any] | None:
        """Return the cached result of `cell`; None if there is none, or if it has another key."""
        try:
            content = json.loads(self.file(cell).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("key") != key:
            return None
        return content

    def store(self, cell: Cell, key: str, report: Mapping[str, Any], seconds: float) -> None:
        """Store the report of `cell`'s proof; if dmaproof is killed meanwhile, the old one stays.

        Raises:
            UsageError: the file cannot be written.
        """
        file = self.file(cell)
        fresh = file.with_suffix(".new")
        try:
            fresh.write_text(json.dumps({"key": key, "seconds": seconds, "report": report}) + "\n")
            fresh.replace(file)
        except OSError as error:
            raise UsageError(f"--folder {self.folder}: {error.strerror}") from error
