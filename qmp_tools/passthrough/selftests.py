"""The kernel's own selftests of iommufd and VFIO, each program as one proof.

The programs are built from the source of the kernel that runs, and one machine has the hardware
that they test (`l1.selftests`). A program that was not built, or that skips all its tests, is not
supported by this kernel.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from .ktap_results import KtapResults, Result, read_ktap
from .l1.selftests import LOG, PROGRAMS, SELFTESTS
from .outcome import NotSupportedError, Proof, ProofFailedError

_FOLDER: Final = Path("/mnt", SELFTESTS)
_DEVICES: Final = Path("/sys/bus/pci/devices")
_NIC: Final = ("0x8086", "0x10c9")
"""The vendor and the device of the card, which is QEMU's igb."""
_DRIVER: Final = "vfio-pci"
_PARAMETERS: Final = (
    # A virtual function can be made while vfio-pci drives the card.
    Path("/sys/module/vfio_pci/parameters/enable_sriov"),
    # L1's kernel does not remap interrupts.
    Path("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"),
)
_HUGE: Final = Path("/sys/kernel/mm/hugepages")
_HUGE_PAGES: Final = {
    "iommufd": {2048: 256},
    "vfio_dma_mapping_test": {2048: 4, 1 << 20: 1},
}
"""The number of huge pages by their size in KiB; other programs need the memory themselves."""
KNOWN_FAILURES: Final = {
    "iommufd": frozenset({"dmabuf_simple", "dmabuf_revoke"}),
}
"""The tests that fail on Linux 7.3.4, because of a defect in the kernel's test code.

In drivers/iommu/iommufd/selftest.c, iommufd_test_dmabuf_get() returns 0 and not the file
descriptor.
"""
_NAMED: Final = 8
"""The number of failed tests that a message names."""
_LAST_LINES: Final = 12
_SKIPPED_CODE: Final = 4
"""The exit code of a program that has skipped its tests (KSFT_SKIP in kselftest.h)."""


def proofs(timeout_s: float) -> dict[str, Proof]:
    """Return the proofs by the name of their program; `timeout_s` bounds each program."""
    return {
        name: partial(_run, folder, name, timeout_s)
        for folder, names in PROGRAMS.items()
        for name in names
    }


def _run(folder: str, name: str, timeout_s: float) -> tuple[str, dict[str, Any]]:
    program = _FOLDER / folder / name
    if not program.is_file():
        raise NotSupportedError(why_missing(_FOLDER / folder, name))
    arguments = [_bound_nic()] if folder == "vfio" else []
    with _huge_pages(_HUGE_PAGES.get(name, {})):
        output, code = run_program([program, *arguments], timeout_s)
    return judge(read_ktap(output), code, output, KNOWN_FAILURES.get(name, frozenset()))


def why_missing(folder: Path, name: str) -> str:
    """Return why a program was not built: its folder's log, if there is one."""
    try:
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return "this kernel comes without its source, so it has no selftests"
    if not lines:
        return f"this kernel's source has no program {name} in tools/testing/selftests"
    return "\n".join([f"{name} was not built; the last lines of make:", *lines[-_LAST_LINES:]])


def run_program(command: list[Path | str], timeout_s: float) -> tuple[str, int | None]:
    """Run a program; return its output and its exit code, which is None after a timeout.

    The exit code is negative for a signal, as in `subprocess`. After a timeout, the program's whole
    session is killed.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return output.read().decode(errors="replace"), code


def judge(
    results: KtapResults, code: int | None, output: str, known: frozenset[str] = frozenset()
) -> tuple[str, dict[str, Any]]:
    """Return what a program has found, as a proof does.

    Args:
        results: its results.
        code: its exit code, as from `run_program`.
        output: its output.
        known: the names of tests, without fixture and variant, that may fail.

    Raises:
        ProofFailedError: another test failed, or the program ended before its last test.
        NotSupportedError: all tests were skipped.
    """
    passed, skipped, failed = (results.names(result) for result in Result)
    expected = [name for name in failed if name.rpartition(".")[2] in known]
    if len(failed) > len(expected):
        failed.sort(key=lambda name: name in expected)  # names the others first
        others = len(failed) - _NAMED
        more = f" and {others} more" if others > 0 else ""
        raise ProofFailedError(
            f"{len(failed)} of {results.planned} tests failed: {', '.join(failed[:_NAMED])}{more}"
            f"{_how_it_ended(code)}"
        )
    if code == _SKIPPED_CODE and not passed:
        raise NotSupportedError(f"the program skipped its tests:\n{_last_lines(output)}")
    if code != (1 if failed else 0) or not results.is_complete:
        planned = "no plan" if results.planned is None else f"{results.planned} planned tests"
        raise ProofFailedError(
            f"{len(results.results)} results of {planned}; the last test: {results.last or 'none'}"
            f"{_how_it_ended(code)}\n{_last_lines(output)}"
        )
    if not passed:
        raise NotSupportedError(f"all {len(skipped)} tests were skipped:\n{_last_lines(output)}")
    found = f"{len(passed)} tests passed"
    if skipped:
        found += f", {len(skipped)} skipped"
    if failed:
        names = sorted({name.rpartition(".")[2] for name in failed})
        found += f", {len(failed)} failed as known: {', '.join(names)}"
    return found, {"passed": len(passed), "skipped": len(skipped), "failed": len(failed)}


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "; the program did not end within the timeout"
    if code < 0:
        return f"; the program was killed by {signal.Signals(-code).name}"
    return f"; exit code {code}"


def _last_lines(output: str) -> str:
    return "\n".join(output.rstrip().splitlines()[-_LAST_LINES:])


def _bound_nic() -> str:
    """Bind the card to vfio-pci unless it is already; return its address."""
    for device in sorted(_DEVICES.iterdir()):
        ids = tuple((device / name).read_text().strip() for name in ("vendor", "device"))
        if ids == _NIC:
            break
    else:
        raise NotSupportedError("this machine has no network card 82576, QEMU's igb")
    if not (device / "driver").exists():
        for parameter in _PARAMETERS:
            parameter.write_text("1")
        (device / "driver_override").write_text(_DRIVER)
        Path("/sys/bus/pci/drivers_probe").write_text(device.name)
    if not (device / "driver").exists():
        raise NotSupportedError(f"{_DRIVER} does not drive {device.name}")
    return device.name


@contextmanager
def _huge_pages(counts: dict[int, int]) -> Iterator[None]:
    """Reserve huge pages; a test that finds fewer of them than it needs reports so itself."""
    numbers = {size: _HUGE / f"hugepages-{size}kB" / "nr_hugepages" for size in counts}
    try:
        for size, count in counts.items():
            if numbers[size].exists():
                numbers[size].write_text(str(count))
        yield
    finally:
        for number in numbers.values():
            if number.exists():
                number.write_text("0")
