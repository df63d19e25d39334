"""The table of docs/third-party-devices.md: which QEMU migrates which vhost-user device."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.devices.command import listens
from qmp_tools.qemu.choice import find_qemu
from qmp_tools.qemu.qemu import running_qemu
from qmp_tools.qemu.qmp import QmpRefusal
from support.command import TIMEOUT_S
from support.recipes import RECIPES, ROOT

BACK_END: Final = (sys.executable, str(ROOT / "tests" / "back_ends" / "faulty.py"))
MACHINE: Final = (
    *("-machine", "q35,memory-backend=ram,accel=tcg", "-m", "64M"),
    *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
)
OPTIONS: Final = {"vhost-user-fs-pci": ",tag=disk"}
MIGRATES, REFUSED, ABSENT = "migrates", "refused", "does not exist"
SECTION: Final = RECIPES.partition("\n## vhost-user devices that QEMU does not migrate")[2]
ROWS: Final = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in SECTION.partition("\n## ")[0].splitlines()
    if line.startswith("|")
]
VERSIONS: Final = [title.removeprefix("QEMU ") for title in ROWS[0][1:-1]]
CELLS: Final = [
    (device, version, cell)
    for row in ROWS[2:]
    for version, cell in zip(VERSIONS, row[1:-1], strict=True)
    for device in row[0].split(", ")
    if cell in (MIGRATES, REFUSED, ABSENT) and re.fullmatch("vhost-user-[a-z0-9-]+", device)
]


def qemu_of(version: str) -> Path:
    """Return a QEMU of this version, or skip the test."""
    with contextlib.suppress(UsageError):
        return find_qemu(version, X86_64)
    pytest.skip(f"no QEMU {version} here; 'dmaproof qemu list' shows the fetched ones")


@pytest.fixture
def back_end(tmp_path: Path) -> Iterator[Path]:
    """The socket of a back end that logs what it writes."""
    path = tmp_path / "socket"
    with subprocess.Popen([*BACK_END, str(path), "none"]) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not listens(path, process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield path
        process.kill()


async def outcome_of(qemu: Path, device: str, back_end: Path, folder: Path) -> str:
    arguments = [
        *(*MACHINE, "-S", "-chardev", f"socket,id=device,path={back_end}"),
        *("-device", f"{device},chardev=device{OPTIONS.get(device, '')}"),
    ]
    async with running_qemu("source", qemu, arguments, folder, timeout_s=TIMEOUT_S) as running:
        status: dict[str, Any] = await running.qmp.execute("query-migrate")
    reasons = status.get("blocked-reasons", [])
    if not reasons:
        return MIGRATES
    assert [reason.partition(":")[0] for reason in reasons] == ["non-migratable device"]
    return REFUSED


async def exists(qemu: Path, device: str, folder: Path) -> bool:
    async with running_qemu("source", qemu, ["-S"], folder, timeout_s=TIMEOUT_S) as running:
        try:
            await running.qmp.execute("device-list-properties", typename=device)
        except QmpRefusal:
            return False
    return True


@pytest.mark.parametrize(("device", "version", "cell"), CELLS)
def test_qemu_does_with_a_vhost_user_device_what_the_table_says(
    device: str, version: str, cell: str, back_end: Path, tmp_path: Path
) -> None:
    qemu = qemu_of(version)
    if cell == ABSENT:
        assert not asyncio.run(exists(qemu, device, tmp_path))
        return
    if (device, version) == ("vhost-user-input-pci", "7.2"):
        with pytest.raises(UntestableError, match="requires kvm"):
            asyncio.run(outcome_of(qemu, device, back_end, tmp_path))
        return
    assert asyncio.run(outcome_of(qemu, device, back_end, tmp_path)) == cell


def test_the_table_has_each_version_and_each_outcome() -> None:
    assert {version for _, version, _ in CELLS} == set(VERSIONS) == {"7.2", "10.0", "11.1"}
    assert {cell for *_, cell in CELLS} == {MIGRATES, REFUSED, ABSENT}
