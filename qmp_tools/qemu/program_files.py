"""Find the files that a program consists of, to distinguish a rebuilt program from the old one.

A command names its first files: the program (perhaps through PATH), an interpreter's script, a
configuration file. Each file may name further files: a script names its interpreter and the
programs that it starts by their absolute paths, an ELF file its shared libraries (``ldd``), and a
fetched QEMU its folder. Files that a program opens by itself, such as Python modules and plugins,
are not included.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from .builds import files_of_build

_ABSOLUTE_PATH: Final = re.compile(rb"(?<![\w./-])/[\w./+-]+")
_LOADED: Final = re.compile(r"(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
_SCRIPT_BYTES: Final = 1 << 20
"""The part of a script that is searched for paths."""


class ProgramFiles:
    """Finds the files of commands, and reads each file once."""

    def __init__(self) -> None:
        self._needed: dict[Path, set[Path]] = {}
        self._digests: dict[Path, str] = {}

    def contents(self, words: Sequence[str | Path]) -> dict[str, str]:
        """Return the digests of all files that the command of these `words` consists of, by path.

        A value after ``=`` or a comma counts as a word: ``--config=backend.json``.
        """
        texts = [str(word) for word in words]
        parts = [part for text in texts for part in (text, *re.split("[=,]", text))]
        left = set().union(*map(_named, parts))
        found: set[Path] = set()
        while left:
            file = left.pop()
            found.add(file)
            if file not in self._needed:
                build = _regular(files_of_build(file))
                self._needed |= {part: set() for part in build}  # the folder is complete
                self._needed[file] = build | _needed_by(file)
            left |= self._needed[file] - found
        return {str(file): self._digest(file) for file in sorted(found)}

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = _digest(file)
        return self._digests[file]


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:  # a program may be executable without being readable
        status = file.stat()
        return f"{status.st_size} {status.st_mtime_ns}"


def _named(word: str) -> set[Path]:
    """Return the regular files that a word of a command may mean: in PATH, or at that path."""
    return _regular([shutil.which(word) or word, word])


def _regular(names: Iterable[str | Path]) -> set[Path]:
    # Path.is_file raises an error if a word is too long to be a path.
    return {Path(name).resolve() for name in names if os.path.isfile(name)}  # noqa: PTH113


def _needed_by(file: Path) -> set[Path]:
    try:
        with file.open("rb") as opened:
            start = opened.read(4)
            script = start + opened.read(_SCRIPT_BYTES) if start.startswith(b"#!") else None
    except OSError:  # see `_digest`
        return set()
    if script is not None:
        return _needed_by_script(script)
    return _shared_libraries(file) if start == b"\x7fELF" else set()


def _needed_by_script(text: bytes) -> set[Path]:
    interpreter = text[2:].partition(b"\n")[0].decode(errors="replace").split()
    programs = {os.fsdecode(path) for path in _ABSOLUTE_PATH.findall(text)}
    return set().union(
        *map(_named, interpreter), _regular(path for path in programs if os.access(path, os.X_OK))
    )


def _shared_libraries(program: Path) -> set[Path]:
    """Return the shared libraries of `program`; empty if ``ldd`` is not installed."""
    try:
        done = subprocess.run(
            ["ldd", program], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return _regular(_LOADED.findall(done.stdout))
