"""A QEMU that was built on this machine, made to run in L1.

L1 has its own C library, which may be older than the one that QEMU was linked with. So QEMU runs
there with this machine's loader and libraries. They are copied, together with QEMU, its modules and
its firmware, into one folder of the cache, which L1 mounts read-only like a fetched QEMU. A copy
does not change when QEMU is built again meanwhile.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from ...arch.x86_64 import X86_64
from ...arguments import AnyPath
from ...guest.build import cache
from ...host.cached_folder import digest, fresh_folder, prune
from ...host.captured import run_captured
from ...qemu.builds import build_folder, files_of_build

_logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 60.0
_PROGRAM: Final = X86_64.qemu_program
_LIBRARY: Final = re.compile(r"^\s*(?:\S+ => )?(/\S.*) \(0x[0-9a-f]+\)$", re.MULTILINE)
_MISSING: Final = re.compile(r"^\s*(\S+) => not found$", re.MULTILINE)
_FIRMWARE: Final = ("*.bin", "*.rom")
"""The firmware of an x86_64 machine; other files there are large, or for other architectures."""
_SCRIPT: Final = f"""\
#!/bin/sh
# Runs this folder's QEMU with the loader and the libraries of the machine that it was built on.
folder=$(dirname "$(readlink -f "$0")")
export QEMU_MODULE_DIR="$folder/modules"
exec "$folder/libraries/{{loader}}" --library-path "$folder/libraries" \\
    "$folder/program/{_PROGRAM}" -L "$folder/firmware" "$@"
"""


def tested_qemu_folder(wanted: AnyPath) -> Path:
    """Return the folder of a QEMU that L1 can mount.

    Args:
        wanted: the version of a fetched QEMU, or the path of one as for `qemu_for_l1`.

    Raises:
        UsageError: no QEMU of that version was fetched, or the path has no QEMU for this.
        UntestableError: the QEMU at the path does not run on this machine.
    """
    text = os.fspath(wanted)
    if os.sep in text or not text[:1].isdigit():
        return qemu_for_l1(Path(text).expanduser())
    return build_folder(text, X86_64)


def qemu_for_l1(path: Path) -> Path:
    """Return a folder with a QEMU that runs in L1.

    Args:
        path: the folder of a fetched QEMU; or of a built one: its program, its build folder, or its
            source folder with the build in ``build``.

    Raises:
        UsageError: no QEMU was found, or it was built without vfio-pci.
        UntestableError: the QEMU does not run on this machine.
    """
    program = _program(path)
    if files_of_build(program):
        return program.parent
    _output([program, "--version"], path)
    if run_captured([program, "-device", "vfio-pci,help"], timeout_s=_TIMEOUT_S).returncode:
        raise UsageError(
            f"--qemu {path}: {program} has no device vfio-pci; build QEMU with CONFIG_VFIO and "
            "CONFIG_VFIO_PCI, which its configure selects on Linux unless "
            "--without-default-devices is given"
        )
    libraries = _libraries(program, path)
    folders = [Path(line) for line in _output([program, "-L", "help"], path).splitlines()]
    firmware = _files(folders, _FIRMWARE)
    modules = _files([program.parent], ("*.so",))
    files = [program, *libraries, *firmware.values(), *modules.values()]
    target = cache() / "l1" / f"qemu-{digest([_fingerprint(file) for file in files])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("copying %s and what it needs for L1", program)
                _copy([program], fresh / "program")
                _copy(libraries, fresh / "libraries")
                _copy(firmware.values(), fresh / "firmware")
                _copy(modules.values(), fresh / "modules")
                (fresh / "program" / program.name).rename(fresh / "program" / _PROGRAM)
                loader = next(file.name for file in libraries if file.name.startswith("ld-"))
                (fresh / _PROGRAM).write_text(_SCRIPT.format(loader=loader))
                (fresh / _PROGRAM).chmod(0o755)
    return prune(target)


def _program(path: Path) -> Path:
    path = path.absolute()
    if path.is_file() and os.access(path, os.X_OK):
        return path
    for program in (path / _PROGRAM, path / "build" / _PROGRAM):
        if program.is_file():
            return program
    found = "is a folder without this program" if path.is_dir() else "does not exist"
    raise UsageError(
        f"--qemu {path}: expected {_PROGRAM} or the folder that has it, but {path} {found}; in "
        f"QEMU's build folder, run 'configure --target-list={_PROGRAM.rpartition('-')[2]}-softmmu' "
        "and make"
    )


def _output(command: list[str | Path], path: Path) -> str:
    try:
        done = run_captured(command, timeout_s=_TIMEOUT_S, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UntestableError(f"--qemu {path} does not run here: {error}") from None
    if done.returncode:
        raise UntestableError(
            f"--qemu {path} does not run here, exit code {done.returncode} of "
            f"{' '.join(map(str, command))}:\n{done.stderr.strip()}"
        )
    return done.stdout


def _libraries(program: Path, path: Path) -> list[Path]:
    """Return the program's libraries, including its loader.

    Raises:
        UntestableError: a library is missing, or the program is linked statically.
    """
    listing = _output(["ldd", program], path)
    missing = _MISSING.findall(listing)
    if missing:
        raise UntestableError(f"--qemu {path}: libraries not found: {', '.join(missing)}")
    libraries = [Path(name) for name in _LIBRARY.findall(listing)]
    if not any(file.name.startswith("ld-") for file in libraries):
        raise UntestableError(f"--qemu {path}: expected a dynamic program, but ldd lists no loader")
    return libraries


def _files(folders: Iterable[Path], patterns: Iterable[str]) -> dict[str, Path]:
    """Return the files by name; the first folder that has a file comes first, as for QEMU."""
    found: dict[str, Path] = {}
    for folder in folders:
        for pattern in patterns:
            for file in sorted(folder.glob(pattern)):
                if file.is_file():
                    found.setdefault(file.name, file)
    return found


def _fingerprint(file: Path) -> bytes:
    status = file.stat()
    return f"{file} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape")


def _copy(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir()
    for file in files:
        shutil.copy2(file, folder)
