"""Python files of QEMU's own source, from Debian's source package, for tests that run them.

QEMU's functional tests, its class QEMUMachine and guestperf are on no package index. apt downloads
the source package as it downloads packages for `dmaproof qemu fetch`. Only the needed files are
kept.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
from pathlib import Path
from typing import Final

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.host.archive import Archive, replace_folder
from qmp_tools.host.source_package import read_source_package

from .debian_tree import kept_folder

_SUITE: Final = "trixie"
"""The oldest suite whose QEMU has the tests: QEMU 10.0."""
_PARTS: Final = (
    "python/qemu/machine/",
    "python/qemu/utils/",
    "tests/functional/",
    "tests/migration-stress/",
)
"""Without python/qemu/qmp, whose released form is a package of its own: qemu.qmp."""


def qemu_source() -> Path:
    """Return a folder with these parts of QEMU's source; fetch it if this is the first use.

    If the archive cannot be reached, the test is skipped; with DMAPROOF_NO_SKIP=1 it fails.
    """
    try:
        return _fetched()
    except UntestableError as error:
        if os.environ.get("DMAPROOF_NO_SKIP") == "1":
            raise
        pytest.skip(str(error))


def _fetched() -> Path:
    kept = kept_folder()
    kept.mkdir(parents=True, exist_ok=True)
    source = kept / f"qemu-source-{_SUITE}"
    with (kept / f"{source.name}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _missing(source):
            fresh = kept / f"{source.name}-new"
            shutil.rmtree(fresh, ignore_errors=True)  # of a test that was killed
            dsc = Archive(_SUITE, fresh / "apt").fetch_source("qemu")
            _unpack(read_source_package(dsc).original, fresh / "source")
            replace_folder(fresh / "source", source)
            shutil.rmtree(fresh)
    return source


def _unpack(package: Path, folder: Path) -> None:
    with tarfile.open(package) as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]  # without 'qemu-VERSION'
            if member.isfile() and member.name.startswith(_PARTS):
                tar.extract(member, folder, filter="data")
    assert not _missing(folder), f"not in {package.name}: {', '.join(_missing(folder))}"


def _missing(folder: Path) -> list[str]:
    return [part for part in _PARTS if not (folder / part).is_dir()]
