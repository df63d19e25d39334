"""Whether two functions of this host can be the source and the destination of a VFIO migration.

`look` finds out what there is: in sysfs, and, where a function is bound to a VFIO driver and free,
by opening it as QEMU would. `examine` judges it, and tells what mends what is missing. Nothing is
ever bound, unbound or configured here: who has not bound a function to VFIO does not mean it to be
tested.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import TrackerError, UsageError
from dmaproof.vfio.abi import MigrationFlag
from dmaproof.vfio.device import VfioDevice
from dmaproof.vfio.iommufd import Iommufd
from dmaproof.vfio.requests import VfioError
from dmaproof.vfio.type1 import Container

from ..host.capabilities import CAP_IPC_LOCK, is_capable
from ..host.finding import Finding, State
from ..qemu.machine import MIB, format_memory

_PCI_ADDRESS: Final = re.compile(r"(?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-1][0-9a-f]\.[0-7]", re.I)
_BRIDGES: Final = frozenset({"pcieport", "shpchp", "pci-stub"})
"""Drivers that may stay in a viable group (vfio_dev_viable)."""
_OVERHEAD_BYTES: Final = 64 * MIB
"""What QEMU maps for DMA besides the guest's RAM: firmware, and the memory of other devices."""


@dataclass(frozen=True)
class Host:
    """Where the kernel shows itself."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")


@dataclass(frozen=True)
class Function:
    """A PCI function or a mediated device, with its folder in sysfs."""

    address: str
    sysfs: Path


@dataclass(frozen=True)
class FunctionFacts:
    """What there is of a function; an error is the text of what went wrong.

    `group` is the number of its IOMMU group, `strangers` are members that keep that from being
    viable, with their drivers. `files` are those that QEMU opens, and `closed` those of them that
    are not there or may not be opened. `migration` and what follows is None where the function was
    not opened: `logs` says whether it logs its DMA, `iommu_tracks` whether its IOMMU has dirty
    bits, or type1 tracks in its place. `state_bytes` is None too where the kernel does not tell.
    """

    function: Function
    identity: str
    driver: str | None
    bound: bool
    group: str | None
    strangers: Sequence[str] = ()
    files: Sequence[Path] = ()
    closed: Sequence[Path] = ()
    open_error: str | None = None
    migration: MigrationFlag | None = None
    logs: bool | None = None
    iommu_tracks: bool | None = None
    state_bytes: int | None = None


def find_function(address: str, host: Host) -> Function:
    """The function at a PCI address such as 3b:00.2 or 0000:3b:00.2, or with a folder of sysfs.

    Raises:
        UsageError: it is neither, or not there.
    """
    if _PCI_ADDRESS.fullmatch(address):
        whole = address.lower() if address.count(":") == 2 else f"0000:{address.lower()}"
        sysfs = host.sys / "bus" / "pci" / "devices" / whole
    elif address.startswith("/"):
        whole, sysfs = Path(address).name, Path(address)
    else:
        raise UsageError(
            f"{address!r} is no PCI address such as 0000:3b:00.2, and no folder of sysfs"
        )
    if not sysfs.is_dir():
        raise UsageError(f"there is no {sysfs}: 'lspci -D' lists the PCI functions")
    return Function(whole, sysfs)


def look(function: Function, host: Host, *, iommufd: bool) -> FunctionFacts:
    """What there is of `function`; it is opened, which resets it, if it is bound to VFIO and free.

    `iommufd`: QEMU is to use that, else the legacy container.
    """
    sysfs = function.sysfs
    cdevs = sorted(path.name for path in sysfs.glob("vfio-dev/vfio*"))
    driver = _link(sysfs / "driver")
    # Kernels before 6.1 have no vfio-dev. Drivers for VFIO are named after vfio_pci_core.
    bound = bool(cdevs) or (driver is not None and "vfio" in driver)
    group = _link(sysfs / "iommu_group")
    if iommufd:
        files = [host.dev / "iommu", *(host.dev / "vfio" / "devices" / name for name in cdevs[:1])]
    else:
        files = [host.dev / "vfio" / "vfio", host.dev / "vfio" / (group or "?")]
    closed = [path for path in files if not os.access(path, os.R_OK | os.W_OK)]
    facts = FunctionFacts(
        function=function,
        identity=" ".join(_read(sysfs / name) for name in ("vendor", "device")).strip(),
        driver=driver,
        bound=bound,
        group=group,
        strangers=_strangers(sysfs),
        files=files,
        closed=closed,
    )
    if not bound or closed or facts.strangers or group is None:
        return facts
    return _try(facts, iommufd)


def _strangers(sysfs: Path) -> list[str]:
    """Members of the IOMMU group that other drivers have."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for member in sorted((sysfs / "iommu_group" / "devices").iterdir()):
            driver = _link(member / "driver")
            ours = any(member.glob("vfio-dev/vfio*")) or (driver is not None and "vfio" in driver)
            if driver and driver not in _BRIDGES and not ours:
                found.append(f"{member.name} ({driver})")
    return found


def _try(facts: FunctionFacts, iommufd: bool) -> FunctionFacts:
    """What the function says of itself, and its IOMMU."""
    try:
        with open_function(facts.function.sysfs, iommufd) as (device, tracks):
            return FunctionFacts(
                **{
                    **vars(facts),
                    "migration": device.migration(),
                    "logs": device.can_log(),
                    "iommu_tracks": tracks,
                    "state_bytes": _state_bytes(device),
                }
            )
    except (OSError, TrackerError) as error:
        return FunctionFacts(**{**vars(facts), "open_error": str(error)})


@contextlib.contextmanager
def open_function(sysfs: Path, iommufd: bool) -> Iterator[tuple[VfioDevice, bool]]:
    """The device, and whether there is a tracker behind it: its IOMMU's, or type1's own."""
    if not iommufd:
        with Container() as container, container.open_device(sysfs) as device:
            yield device, True
        return
    with Iommufd() as file, VfioDevice.open_cdev(sysfs, file) as device:
        yield device, _iommu_tracks(file, device)


def _iommu_tracks(iommufd: Iommufd, device: VfioDevice) -> bool:
    if device.number is None:
        return False
    ioas = iommufd.alloc_ioas()
    try:
        iommufd.alloc_hwpt(device.number, ioas, dirty_tracking=True)
    except VfioError:
        return False
    return True


def _state_bytes(device: VfioDevice) -> int | None:
    try:
        return device.stop_copy_bytes()
    except VfioError:
        return None


def _link(path: Path) -> str | None:
    return path.resolve().name if path.is_symlink() else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def lockable_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """How much memory a process of ours may lock; None: as much as it likes.

    `status` is the file that tells its capabilities.
    """
    if is_capable(CAP_IPC_LOCK, status):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def examine(facts: FunctionFacts, locked_bytes: int, lockable: int | None) -> list[Finding]:
    """What speaks for and against a migration in which `locked_bytes` of guest RAM are locked.

    `lockable` is the answer of `lockable_bytes`.
    """
    findings = [_driver(facts), _group(facts)]
    if facts.bound:
        findings.append(_files(facts))
    if facts.open_error:
        remedy = "end whoever has it: 'fuser -v /dev/vfio/*' tells"
        findings.append(Finding("open", State.MISSING, facts.open_error, remedy))
    if facts.migration is not None:
        findings += [_migration(facts, facts.migration), _state(facts), _tracking(facts)]
    findings.append(_memory(locked_bytes + _OVERHEAD_BYTES, lockable))
    return findings


def examine_pair(source: FunctionFacts, destination: FunctionFacts) -> list[Finding]:
    """What speaks for and against two functions together."""
    if source.function.sysfs.resolve() == destination.function.sysfs.resolve():
        remedy = "name two functions of one device: vfio:SOURCE,DESTINATION"
        what = "source and destination are one function, which can have only one owner"
        return [Finding("pair", State.MISSING, what, remedy)]
    for name in ("identity", "driver"):
        ours, theirs = getattr(source, name), getattr(destination, name)
        if ours != theirs:
            what = f"source and destination differ in {name}: {ours} and {theirs}"
            return [Finding("pair", State.MISSING, what, "take two functions of one kind")]
    if source.group is not None and source.group == destination.group:
        what = f"both are in IOMMU group {source.group}, which can have only one owner"
        remedy = "take two in groups of their own; PCIe switches and ports with ACS make such"
        return [Finding("pair", State.MISSING, what, remedy)]
    return [Finding("pair", State.OK, f"both are {source.identity or 'of one kind'}")]


def _driver(facts: FunctionFacts) -> Finding:
    address = facts.function.address
    if facts.bound:
        return Finding("driver", State.OK, f"bound to {facts.driver}")
    what = "has no driver, and is not bound to VFIO"
    if facts.driver:
        what = f"bound to {facts.driver}, and not to VFIO; it is left alone"
    remedy = (
        f"driverctl set-override {address} DRIVER, with the vendor's VFIO driver "
        f"('grep vfio_pci: /lib/modules/$(uname -r)/modules.alias' names them), which migrates; "
        "plain vfio-pci does not"
    )
    return Finding("driver", State.MISSING, what, remedy)


def _group(facts: FunctionFacts) -> Finding:
    if facts.group is None:
        remedy = "switch the IOMMU on: in the firmware's set-up, and with intel_iommu=on (Intel)"
        return Finding("IOMMU group", State.MISSING, "is in none: no IOMMU serves it", remedy)
    if facts.strangers:
        others = ", ".join(facts.strangers)
        what = f"group {facts.group} is not viable: other drivers have {others}"
        remedy = "unbind these, bind them to VFIO too, or use a slot with ACS"
        return Finding("IOMMU group", State.MISSING, what, remedy)
    return Finding("IOMMU group", State.OK, f"group {facts.group}, viable")


def _files(facts: FunctionFacts) -> Finding:
    absent = [str(path) for path in facts.closed if not path.exists()]
    if absent or len(facts.files) < 2:
        names = ", ".join(absent) or "a device file in vfio-dev"
        remedy = "load it (modprobe iommufd, vfio), or take the other way: vfio:…,container"
        return Finding("files", State.MISSING, f"the kernel has no {names}", remedy)
    if facts.closed:
        names = " ".join(map(str, facts.closed))
        return Finding("files", State.MISSING, f"{names}: no access", f"sudo chown $USER {names}")
    return Finding("files", State.OK, ", ".join(map(str, facts.files)))


def _migration(facts: FunctionFacts, flags: MigrationFlag) -> Finding:
    if MigrationFlag.STOP_COPY not in flags:
        remedy = "bind it to the vendor's VFIO driver, and see that firmware and function allow it"
        if facts.driver == "mlx5_vfio_pci":
            remedy = "devlink port function set PORT migratable enable"
        return Finding("migration", State.MISSING, f"{facts.driver} cannot migrate it", remedy)
    names = ", ".join(flag.name or "" for flag in MigrationFlag if flag in flags)
    if MigrationFlag.PRE_COPY not in flags:
        what = f"{names}; without PRE_COPY all of its state moves while the guest stands still"
        return Finding("migration", State.LIMITED, what)
    return Finding("migration", State.OK, names)


def _state(facts: FunctionFacts) -> Finding:
    if facts.state_bytes is None:
        what = (
            "the kernel does not tell how much the device has (it does from Linux 6.2 on): QEMU "
            "takes 100 GiB for granted, and may never stop the guest"
        )
        return Finding("state", State.LIMITED, what, "a newer kernel")
    return Finding("state", State.OK, f"some {facts.state_bytes} bytes, as the device reckons")


def _tracking(facts: FunctionFacts) -> Finding:
    trackers = ["the device's own log"] if facts.logs else []
    trackers += ["the IOMMU's dirty bits, or type1"] if facts.iommu_tracks else []
    if trackers:
        return Finding("tracking", State.OK, "; ".join(trackers))
    what = "neither the device nor its IOMMU tracks: QEMU must take all of RAM for dirty"
    return Finding("tracking", State.LIMITED, what)


def _memory(needed_bytes: int, lockable: int | None) -> Finding:
    if lockable is None or lockable >= needed_bytes:
        return Finding("locked memory", State.OK, "as much as the guest needs")
    what = f"RLIMIT_MEMLOCK is {lockable} bytes; all of the guest's RAM is locked"
    wanted = format_memory(needed_bytes - needed_bytes % (8 << 10))
    remedy = f"ulimit -l unlimited (as root), or less RAM than {wanted}: --memory"
    return Finding("locked memory", State.MISSING, what, remedy)
