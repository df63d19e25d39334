"""Resolve the options of a proof to its set-up, and log each choice that the options leave open.

Contradictory options are refused before anything is started.
"""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Final

from dmaproof.devices import emulated_devices
from dmaproof.errors import UnsupportedError, UsageError
from dmaproof.faults import make_fault
from dmaproof.faults.fault import Fault

from ..arch import find_architecture
from ..arch.architecture import Architecture
from ..devices.device import ProofDevice
from ..devices.process import DeviceOptions
from ..devices.registry import DeviceKind, DeviceRequest, kind_of
from ..guest.bare import bare_guest
from ..guest.build import Guest
from ..guest.choice import GUESTS
from ..guest.drivers import Driver, LinuxNeeds
from ..guest.kernels import KernelFiles
from ..guest.own import MEMORY_BYTES as OWN_GUEST_MEMORY_BYTES
from ..guest.own import OWN_GUEST, own_guest
from ..guest.workload import parse_workload
from ..migration.refused_features import FEATURES
from ..migration.scenarios import find_scenario
from ..migration.scenarios.base import Scenario
from ..migration.scenarios.resets import DeviceReset
from ..qemu.choice import common_machine, find_qemu
from ..qemu.machine import (
    DESTINATION,
    GIB,
    NVDIMM_START,
    SOURCE,
    Machine,
    format_memory,
    refuse_taken_properties,
)
from ..qemu.memory_backend import parse_memory_backend, require_huge_pages, require_space
from .model import Setup
from .options import GUEST_PAGES, OPTIONS, ProofOptions
from .probes import (
    choose_accelerator,
    choose_memory,
    require_architecture,
    require_file_behind_ram,
    require_first_block,
    warn_of_dimms,
)

_logger = logging.getLogger(__name__)

_MOST_BELOW_NVDIMM_BYTES: Final = 2 * GIB
"""A PC puts at least this much RAM below 4 GiB (pc_q35_init)."""
TRACKER: Final = "iommu"
HARVEST: Final = 0.2
"""The defaults of the options of these names, unless a fault needs another value."""
_BEHIND_IOMMU: Final = "write_once=2048"
"""Behind an IOMMU, each page costs an exchange of messages between the device and QEMU."""


async def resolve(options: ProofOptions) -> Setup:
    """Return the set-up that the options describe.

    Raises:
        UsageError: the options contradict each other, or one does not apply to the device.
        UntestableError: this machine or its QEMUs do not have what the proof needs.
    """
    seed = chosen_seed(options.seed)
    options = replace(options, seed=seed)
    kind = kind_of(options.devices, options.device_command)
    refuse_unsupported_options(options, kind)
    if not kind.runs_here():
        raise UnsupportedError(
            f"--device {' and '.join(options.devices)}: this machine does not have the device; "
            "'dmaproof prove' boots a machine that has it"
        )
    fault = _fault_of(options)
    options = replace(options, scenario=_scenario_name(options, fault))
    architecture = find_architecture(options.arch)
    _require_devices(options, architecture)
    scenario = _scenario_for(options, architecture)
    if options.fault:
        scenario.require_dirty_log(f"--fault {options.fault}")
    iommu = _iommu_for(options, fault, architecture)
    device = kind.make(_request(options, fault, iommu))
    scenario.require_device(device)
    _require_driver(options, device, architecture)
    usual = _BEHIND_IOMMU if iommu else ""
    workload = device.adapt(parse_workload(f"{usual},{options.workload}", seed))
    if options.machine:
        refuse_taken_properties(options.machine)
    if OWN_GUEST in device.guests:
        for line in device.prerequisites(options.memory_bytes or OWN_GUEST_MEMORY_BYTES):
            _logger.info("%s", line)
    guest = _own_guest(options, architecture) if OWN_GUEST in device.guests else None
    backend = parse_memory_backend(options.memory_backend)
    scenario.require_memory(backend)
    scenario.require_host()
    source, destination = _qemus_of(options, architecture)
    scenario.require_qemus(source, destination)
    for side, qemu in ((SOURCE, source), (DESTINATION, destination)):
        await require_architecture(architecture, side, qemu, options.timeout)
        if backend.kind == "ram":
            await require_file_behind_ram(qemu, options.timeout)
    # Whether KVM works is probed with one of dmaproof's guests, also where the proof uses another.
    probed = (
        bare_guest(architecture)
        if guest
        else _guest_of(options, _driver_of(device, scenario, architecture), iommu, architecture)
    )
    accelerator = await choose_accelerator(options.accel, source, probed, options.timeout)
    scenario.require_accelerator(accelerator)
    guest = _with_options_for(scenario, guest or probed)
    memory_bytes = options.memory_bytes or await choose_memory(
        architecture,
        source,
        accelerator,
        guest.memory_bytes,
        options.timeout,
        backend.page_bytes,
        options.numa or 1,
    )
    if scenario.added.memory_device_bytes:
        await warn_of_dimms(architecture, source, accelerator, options.timeout)
    machine_type = await _machine_type(
        options, architecture, scenario, iommu, (source, destination)
    )
    if fault.needs_high_ram:
        high_ram, memory_bytes = architecture.with_high_ram(memory_bytes)
        machine_type += high_ram
    machine = Machine(
        architecture,
        machine_type,
        accelerator=accelerator,
        memory_bytes=memory_bytes,
        cpus=options.cpus,
        kernel=guest.kernel,
        initramfs=guest.initramfs,
        command_line=guest.command_line(workload),
        iommu=iommu,
        backend=backend,
        numa_nodes=options.numa or 0,
        added=scenario.added,
    )
    require_memory(machine)
    for qemu in (source, destination):
        await require_first_block(machine, qemu, options.timeout)
    return Setup(
        options=replace(options, accel=accelerator, memory=memory_bytes),
        qemu=source,
        qemu_destination=destination,
        machine=machine,
        guest=guest.name,
        workload=workload,
        device=device,
        guest_kernel=guest.linux,
    )


def _with_options_for(scenario: Scenario, guest: Guest) -> Guest:
    """Return the guest with what the scenario adds to its command line."""
    text = guest.options
    if nvdimm_bytes := scenario.added.nvdimm_bytes:
        text = f"{text} memory={NVDIMM_START}-{NVDIMM_START + nvdimm_bytes}"
    if scenario.linux_needs:
        text = f"{scenario.linux_needs.kernel_options} {text}"
    return replace(guest, options=text.strip())


async def _machine_type(
    options: ProofOptions,
    architecture: Architecture,
    scenario: Scenario,
    iommu: str | None,
    qemus: tuple[Path, Path],
) -> str:
    """Return the machine type that both QEMUs have, with the options of its IOMMU.

    Raises:
        UsageError: this machine type does not have the IOMMU.
        UntestableError: the QEMUs have no such machine type in common.
    """
    source, destination = qemus
    usual = architecture.hotplug_machine if scenario.plugs_devices else None
    machine_type = options.machine or usual or architecture.machine
    if destination.resolve() != source.resolve() or options.machine:
        machine_type = await common_machine(machine_type, source, destination, options.timeout)
    if iommu is None:
        return machine_type
    of_iommu = architecture.iommus[iommu]
    if of_iommu.machine not in machine_type:
        raise UsageError(
            f"--iommu {iommu}: only {of_iommu.machine} machines have this IOMMU, and the "
            f"machine is {machine_type}"
        )
    return machine_type + of_iommu.machine_options


def require_memory(machine: Machine) -> None:
    """Check that this host can give both sides the machine's memory.

    Raises:
        UsageError: some memory is not whole pages of the memory backend, a node has none, or the
            backend's folder takes no files.
        UnsupportedError: the architecture's machines have no NUMA nodes.
        UntestableError: the host has not enough huge pages, or the folder not enough space.
    """
    backend, nodes = machine.backend, machine.numa_nodes
    page_bytes = backend.page_bytes
    if machine.added.nvdimm_bytes and machine.memory_bytes > _MOST_BELOW_NVDIMM_BYTES:
        raise UsageError(
            f"--memory {format_memory(machine.memory_bytes)}: expected at most "
            f"{format_memory(_MOST_BELOW_NVDIMM_BYTES)} with an NVDIMM, which is at 4 GiB"
        )
    if nodes and not machine.architecture.has_numa:
        raise UnsupportedError(
            f"--numa {nodes}: {machine.architecture.name} machines have no NUMA nodes; leave out "
            "--numa, or choose another architecture"
        )
    if machine.memory_bytes % page_bytes or machine.memory_bytes < nodes * page_bytes:
        least = f" and at least {format_memory(nodes * page_bytes)}" if nodes else ""
        raise UsageError(
            f"--memory {format_memory(machine.memory_bytes)}: expected a multiple of "
            f"{format_memory(page_bytes)}{least} with --memory-backend {backend}"
        )
    for name, size in machine.added.memory_device_bytes.items():
        if size % page_bytes:
            raise UsageError(
                f"--memory-backend {backend}: the scenario adds {name} of {format_memory(size)}, "
                f"which is not a multiple of {format_memory(page_bytes)}; use memory with smaller "
                "pages, or choose another scenario"
            )
    require_huge_pages(backend, machine.most_memory_bytes)
    require_space(backend, machine.most_memory_bytes)


def refuse_unsupported_options(options: ProofOptions, kind: DeviceKind) -> None:
    """Refuse options that do not apply to the kind of device.

    Raises:
        UsageError: such an option was given.
    """
    for name in options.changed:
        if name not in kind.accepts:
            raise UsageError(
                f"{OPTIONS[name].flag} does not apply to --device {' and '.join(options.devices)}"
            )


def chosen_seed(given: int | None, bits: int = 32) -> int:
    """Return the seed that was given, or else a random one of `bits` bits."""
    return random.SystemRandom().getrandbits(bits) if given is None else given


def _fault_of(options: ProofOptions) -> Fault:
    fault = make_fault(options.fault, options.seed or 0)
    if fault.needs:
        raise UsageError(
            f"fault {options.fault} can be detected only with {fault.needs}, which a proof does "
            f"not have: use dmaproof faults --only {(options.fault or '').partition('=')[0]}"
        )
    return fault


def _request(options: ProofOptions, fault: Fault, iommu: str | None) -> DeviceRequest:
    harvest = None if options.harvest is None else str(options.harvest)
    return DeviceRequest(
        names=options.devices,
        command=options.device_command,
        options=DeviceOptions(
            "",
            _agreed("--tracker", options.tracker, fault.tracker) or TRACKER,
            _agreed("--harvest", harvest, fault.harvest) or str(HARVEST),
            options.fault,
            options.seed or 0,
            sum(1 << FEATURES[name][0] for name in set(options.destination_lacks)),
        ),
        queues=options.queues,
        ring=options.ring,
        killed=options.kill_device or fault.needs_kill,
        behind_iommu=iommu is not None,
        destination_killed=options.kill_destination_device,
    )


def _agreed(flag: str, given: str | None, needed: str | None) -> str | None:
    """Return what was given, or else what the fault needs.

    Raises:
        UsageError: the fault is not guaranteed to be detected with what was given.
    """
    if given and needed and given != needed:
        raise UsageError(
            f"{flag} {given}: the fault is guaranteed to be detected only with {flag} {needed}"
        )
    return given or needed


def _iommu_for(options: ProofOptions, fault: Fault, architecture: Architecture) -> str | None:
    """Return the IOMMU that the options name or that the fault needs.

    Raises:
        UnsupportedError: the machines of the architecture do not have this IOMMU.
        UsageError: the guest does not support it.
    """
    iommu = options.iommu or (architecture.default_iommu if fault.needs_iommu else None)
    known = ", ".join(architecture.iommus) or "none"
    if iommu is None and fault.needs_iommu:
        raise UnsupportedError(
            f"--fault {options.fault} needs an IOMMU, and dmaproof knows none for "
            f"{architecture.name}; use another architecture (--arch)"
        )
    if iommu is not None and iommu not in architecture.iommus:
        raise UnsupportedError(
            f"--iommu {iommu}: {architecture.name} machines do not have this IOMMU; expected one "
            f"of {known}"
        )
    if iommu is not None and options.guest not in architecture.iommus[iommu].guests:
        raise UsageError(
            f"--iommu {iommu}: the guest {options.guest} does not support this mode; use "
            f"--guest {' or '.join(architecture.iommus[iommu].guests)}"
        )
    return iommu


def _scenario_name(options: ProofOptions, fault: Fault) -> str:
    """Return the scenario that the options name, or else one that the fault needs.

    Raises:
        UsageError: the fault cannot be detected with the scenario that was named.
    """
    if not fault.needs_reset or find_scenario(options.scenario).resets:
        return options.scenario
    if "scenario" in options.changed:
        raise UsageError(
            f"--scenario {options.scenario}: the fault {options.fault} can be detected only if the "
            f"guest resets its device; use --scenario {DeviceReset.name}"
        )
    return DeviceReset.name


def _scenario_for(options: ProofOptions, architecture: Architecture) -> Scenario:
    """Return the scenario that the options name.

    Raises:
        UsageError: the scenario has no measurable downtime.
        UnsupportedError: QEMU's machines of the architecture do not support the scenario.
    """
    scenario = find_scenario(options.scenario)
    module = architecture.memory_module
    if scenario.added.dimms and (module is None or options.guest not in module.guests):
        raise UnsupportedError(
            f"--scenario {options.scenario}: the guest {options.guest} for {architecture.name} "
            "cannot use plugged memory; choose another scenario or guest"
        )
    if scenario.added.nvdimm_bytes and (options.guest, architecture.name) != ("bare", "x86_64"):
        raise UnsupportedError(
            f"--scenario {options.scenario}: only the bare guest for x86_64 uses persistent memory "
            "as RAM; use --guest bare and --arch x86_64"
        )
    if scenario.linux_needs and options.guest != "linux":
        raise UnsupportedError(
            f"--scenario {options.scenario}: the guest {options.guest} has no driver for "
            f"{' and '.join(scenario.linux_needs.modules)}; use --guest linux"
        )
    if scenario.plugs_devices and architecture.hotplug_machine is None:
        raise UnsupportedError(
            f"--scenario {options.scenario}: the guest for {architecture.name} takes no new disk "
            "while it runs; choose another scenario"
        )
    if options.max_downtime is not None and not scenario.downtime_is_measurable:
        raise UsageError(
            f"--max-downtime: with --scenario {options.scenario} dmaproof itself pauses the guest "
            "while its RAM is copied, so the downtime says nothing about QEMU; leave out "
            "--max-downtime, or choose another scenario"
        )
    return scenario


def _require_devices(options: ProofOptions, architecture: Architecture) -> None:
    """Refuse dmaproof's devices that QEMU does not have for the architecture."""
    names = {device.partition(":")[0] for device in options.devices}
    if options.device_command is None:
        for name in names & emulated_devices().keys():
            architecture.require_device(name)


def _require_driver(options: ProofOptions, device: ProofDevice, architecture: Architecture) -> None:
    if OWN_GUEST in device.guests:
        return
    architecture.require_guest(options.guest)
    if options.guest not in device.guests:
        raise UsageError(
            f"--guest {options.guest}: this guest has no driver for {device.facts.device}; use "
            f"--guest {' or '.join(sorted(device.guests))}"
        )


def _own_guest(options: ProofOptions, architecture: Architecture) -> Guest:
    if options.kernel is None:
        raise UsageError(
            f"--device {' and '.join(options.devices)} needs your own guest with a driver for the "
            "device: give it with --kernel FILE; docs/passthrough.md describes such a guest"
        )
    initramfs = Path(options.initrd) if options.initrd else None
    return own_guest(architecture, Path(options.kernel), initramfs, options.append)


def _driver_of(device: ProofDevice, scenario: Scenario, architecture: Architecture) -> Driver:
    """Return Linux's driver for the device and for what the scenario adds."""
    module = architecture.memory_module
    plugged = module.linux_modules if scenario.added.dimms and module else ()
    needs = scenario.linux_needs or LinuxNeeds(())
    modules = (*device.driver.modules, *plugged, *needs.modules)
    place = " ".join((device.driver.place, *needs.options))
    return replace(device.driver, modules=modules, place=place)


def _kernel_files(options: ProofOptions) -> KernelFiles | None:
    """Return the files of the kernel that the options name.

    Raises:
        UsageError: the guest has no kernel, or only the folder of the modules was given.
    """
    flag = "--kernel" if options.kernel is not None else "--modules"
    if options.kernel is None and options.modules is None:
        return None
    if options.guest != "linux":
        raise UsageError(f"{flag}: the guest {options.guest} has no kernel; use --guest linux")
    if options.kernel is None:
        raise UsageError("--modules needs --kernel FILE, the kernel to which the modules belong")
    modules = None if options.modules is None else Path(options.modules)
    return KernelFiles(Path(options.kernel), modules)


def _guest_page_bytes(options: ProofOptions, architecture: Architecture) -> int | None:
    """Return the size of pages that the guest's kernel must have.

    Raises:
        UsageError: the guest has no kernel.
        UnsupportedError: dmaproof knows no kernel with such pages.
    """
    if options.guest_pages is None:
        return None
    if options.guest != "linux":
        raise UsageError(
            f"--guest-pages: the guest {options.guest} has no kernel; use --guest linux"
        )
    known = {*architecture.kernels, *architecture.kernel_builds}
    if options.kernel is None and GUEST_PAGES[options.guest_pages] not in known:
        sizes = [text for text, size in GUEST_PAGES.items() if size in known]
        raise UnsupportedError(
            f"--guest-pages {options.guest_pages}: dmaproof knows no kernel for "
            f"{architecture.name} with such pages; expected one of {', '.join(sizes)}, or give a "
            "kernel with --kernel"
        )
    return GUEST_PAGES[options.guest_pages]


def _guest_of(
    options: ProofOptions, driver: Driver, iommu: str | None, architecture: Architecture
) -> Guest:
    files, page_bytes = _kernel_files(options), _guest_page_bytes(options, architecture)
    guest = GUESTS[options.guest](driver, architecture, files, page_bytes)
    if iommu is not None and guest.name == "linux":
        of_iommu = architecture.iommus[iommu]
        return replace(guest, options=f"{of_iommu.linux_options} {guest.options}")
    return guest


def _qemus_of(options: ProofOptions, architecture: Architecture) -> tuple[Path, Path]:
    source = find_qemu(options.qemu, architecture)
    destination = options.qemu_destination
    return source, find_qemu(destination, architecture) if destination else source
