"""Check whether two functions of this host can be source and destination of a VFIO migration.

`gather_facts` reads sysfs. If a function is bound to a VFIO driver and free, `gather_facts` also
opens it as QEMU would. `examine` turns the facts into findings, with a remedy for each missing
prerequisite. Nothing here ever binds, unbinds or configures a function: a user who has not bound a
function to VFIO does not want it tested.
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
"""What QEMU maps for DMA besides guest RAM: firmware, and the memory of other devices."""


@dataclass(frozen=True)
class Host:
    """The folders of the kernel's files, which tests replace."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")


@dataclass(frozen=True)
class Function:
    """A PCI function or a mediated device, with its folder in sysfs."""

    address: str
    sysfs: Path


@dataclass(frozen=True)
class FunctionFacts:
    """The facts about a function.

    `group` is the number of its IOMMU group. `foreign_members` are the members of the group, with
    their drivers, that keep the group from being viable. `files` are the device files that QEMU
    opens; `inaccessible` are those of them that do not exist or may not be opened. `open_error` is
    the message of a failed attempt to open the function.

    The other facts are None if the function was not opened: `logs` says whether the function logs
    its DMA, `iommu_tracks` whether its IOMMU has dirty bits or type1 tracks instead. `state_bytes`
    is also None if the kernel does not report it.
    """

    function: Function
    identity: str
    driver: str | None
    bound: bool
    group: str | None
    foreign_members: Sequence[str] = ()
    files: Sequence[Path] = ()
    inaccessible: Sequence[Path] = ()
    open_error: str | None = None
    migration: MigrationFlag | None = None
    logs: bool | None = None
    iommu_tracks: bool | None = None
    state_bytes: int | None = None


def find_function(address: str, host: Host) -> Function:
    """Return the function at a PCI address (3b:00.2 or 0000:3b:00.2) or with a folder in sysfs.

    Raises:
        UsageError: `address` is neither, or the function does not exist.
    """
    if _PCI_ADDRESS.fullmatch(address):
        whole = address.lower() if address.count(":") == 2 else f"0000:{address.lower()}"
        sysfs = host.sys / "bus" / "pci" / "devices" / whole
    elif address.startswith("/"):
        whole, sysfs = Path(address).name, Path(address)
    else:
        raise UsageError(
            f"{address!r} is neither a PCI address such as 0000:3b:00.2 nor a folder in sysfs"
        )
    if not sysfs.is_dir():
        raise UsageError(
            f"function not found: {sysfs} does not exist; 'lspci -D' lists the PCI functions"
        )
    return Function(whole, sysfs)


def gather_facts(function: Function, host: Host, *, iommufd: bool) -> FunctionFacts:
    """Gather the facts about `function`; open it, which resets it, if it is bound to VFIO and free.

    `iommufd`: QEMU will open it through iommufd, else through the legacy container.
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
    inaccessible = [path for path in files if not os.access(path, os.R_OK | os.W_OK)]
    facts = FunctionFacts(
        function=function,
        identity=" ".join(_read(sysfs / name) for name in ("vendor", "device")).strip(),
        driver=driver,
        bound=bound,
        group=group,
        foreign_members=_foreign_members(sysfs),
        files=files,
        inaccessible=inaccessible,
    )
    if not bound or inaccessible or facts.foreign_members or group is None:
        return facts
    return _open_and_ask(facts, iommufd)


def _foreign_members(sysfs: Path) -> list[str]:
    """Return the members of the IOMMU group that are bound to drivers other than VFIO's."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for member in sorted((sysfs / "iommu_group" / "devices").iterdir()):
            driver = _link(member / "driver")
            vfio = any(member.glob("vfio-dev/vfio*")) or (driver is not None and "vfio" in driver)
            if driver and driver not in _BRIDGES and not vfio:
                found.append(f"{member.name} ({driver})")
    return found


def _open_and_ask(facts: FunctionFacts, iommufd: bool) -> FunctionFacts:
    """Add what the function and its IOMMU report about themselves."""
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
    """Open the device; yield it, and whether its IOMMU or type1 tracks dirty pages."""
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
    """Return how much memory a process of this user may lock, or None if there is no limit.

    `status` is the file that lists this process's capabilities.
    """
    if is_capable(CAP_IPC_LOCK, status):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def examine(facts: FunctionFacts, locked_bytes: int, lockable: int | None) -> list[Finding]:
    """Return the findings about a function for a migration that locks `locked_bytes` of guest RAM.

    `lockable` is the result of `lockable_bytes`.
    """
    findings = [_driver(facts), _group(facts)]
    if facts.bound:
        findings.append(_files(facts))
    if facts.open_error:
        remedy = "end the process that has it open; 'fuser -v /dev/vfio/*' shows which"
        findings.append(Finding("open", State.MISSING, facts.open_error, remedy))
    if facts.migration is not None:
        findings += [_migration(facts, facts.migration), _state(facts), _tracking(facts)]
    findings.append(_memory(locked_bytes + _OVERHEAD_BYTES, lockable))
    return findings


def examine_pair(source: FunctionFacts, destination: FunctionFacts) -> list[Finding]:
    """Return the findings about two functions as a pair."""
    if source.function.sysfs.resolve() == destination.function.sysfs.resolve():
        remedy = "name two functions of one device: vfio:SOURCE,DESTINATION"
        what = "source and destination are one function, which only one QEMU can open"
        return [Finding("pair", State.MISSING, what, remedy)]
    for name in ("identity", "driver"):
        values = getattr(source, name), getattr(destination, name)
        if values[0] != values[1]:
            what = f"source and destination differ in {name}: {values[0]} and {values[1]}"
            return [Finding("pair", State.MISSING, what, "name two functions of the same kind")]
    if source.group is not None and source.group == destination.group:
        what = f"both are in IOMMU group {source.group}, which only one QEMU can use"
        remedy = "name functions of two groups; PCIe switches and ports with ACS separate groups"
        return [Finding("pair", State.MISSING, what, remedy)]
    return [Finding("pair", State.OK, f"both are {source.identity or 'of the same kind'}")]


def _driver(facts: FunctionFacts) -> Finding:
    address = facts.function.address
    if facts.bound:
        return Finding("driver", State.OK, f"bound to {facts.driver}")
    what = "bound to no driver; it must be bound to a VFIO driver"
    if facts.driver:
        what = f"bound to {facts.driver}, which is not a VFIO driver; dmaproof does not touch it"
    remedy = (
        f"driverctl set-override {address} DRIVER, where DRIVER is the vendor's VFIO driver "
        f"('grep vfio_pci: /lib/modules/$(uname -r)/modules.alias' lists them); plain vfio-pci "
        "cannot migrate"
    )
    return Finding("driver", State.MISSING, what, remedy)


def _group(facts: FunctionFacts) -> Finding:
    if facts.group is None:
        remedy = "enable the IOMMU in the firmware's set-up, and boot with intel_iommu=on (Intel)"
        return Finding("IOMMU group", State.MISSING, "in no group, as it has no IOMMU", remedy)
    if facts.foreign_members:
        others = ", ".join(facts.foreign_members)
        what = f"group {facts.group} is not viable: these are bound to other drivers: {others}"
        remedy = "unbind them, bind them to VFIO too, or use a slot with ACS"
        return Finding("IOMMU group", State.MISSING, what, remedy)
    return Finding("IOMMU group", State.OK, f"group {facts.group}, viable")


def _files(facts: FunctionFacts) -> Finding:
    absent = [str(path) for path in facts.inaccessible if not path.exists()]
    if absent or len(facts.files) < 2:
        names = ", ".join(absent) or "a device file in vfio-dev"
        remedy = "modprobe -a iommufd vfio, or use the legacy container: vfio:…,container"
        return Finding("files", State.MISSING, f"not found: {names}", remedy)
    if facts.inaccessible:
        names = " ".join(map(str, facts.inaccessible))
        remedy = f"sudo chown $USER {names}"
        return Finding("files", State.MISSING, f"no read and write access to {names}", remedy)
    return Finding("files", State.OK, ", ".join(map(str, facts.files)))


def _migration(facts: FunctionFacts, flags: MigrationFlag) -> Finding:
    if MigrationFlag.STOP_COPY not in flags:
        remedy = (
            "bind it to the vendor's VFIO driver, and enable migration in firmware and function"
        )
        if facts.driver == "mlx5_vfio_pci":
            remedy = "devlink port function set PORT migratable enable"
        return Finding(
            "migration", State.MISSING, f"the driver {facts.driver} cannot migrate it", remedy
        )
    names = ", ".join(flag.name or "" for flag in MigrationFlag if flag in flags)
    if MigrationFlag.PRE_COPY not in flags:
        what = f"{names}; without PRE_COPY all of its state is sent while the guest is paused"
        return Finding("migration", State.LIMITED, what)
    return Finding("migration", State.OK, names)


def _state(facts: FunctionFacts) -> Finding:
    if facts.state_bytes is None:
        what = (
            "the kernel does not report the size of the device's state (Linux does from 6.2 on): "
            "QEMU assumes 100 GiB, and may never stop the guest"
        )
        return Finding("state", State.LIMITED, what, "boot a kernel from Linux 6.2 on")
    return Finding("state", State.OK, f"about {facts.state_bytes} bytes, by the device's estimate")


def _tracking(facts: FunctionFacts) -> Finding:
    trackers = ["the device's own log"] if facts.logs else []
    trackers += ["the IOMMU's dirty bits, or type1"] if facts.iommu_tracks else []
    if trackers:
        return Finding("tracking", State.OK, "; ".join(trackers))
    what = "neither the device nor its IOMMU tracks: QEMU must treat all of RAM as dirty"
    return Finding("tracking", State.LIMITED, what)


def _memory(needed_bytes: int, lockable: int | None) -> Finding:
    if lockable is None or lockable >= needed_bytes:
        return Finding("locked memory", State.OK, "the limit allows all of the guest's RAM")
    needed = format_memory(needed_bytes - needed_bytes % (8 << 10))
    what = (
        f"RLIMIT_MEMLOCK is {lockable} bytes, but the guest's RAM takes {needed} of locked memory"
    )
    remedy = "ulimit -l unlimited (as root), or a guest with less RAM (--memory)"
    return Finding("locked memory", State.MISSING, what, remedy)
