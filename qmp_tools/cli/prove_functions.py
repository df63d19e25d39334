"""``dmaproof prove --device vfio:SOURCE,DESTINATION``: two VFIO functions of this host.

What is missing for it is told first, before anything is started.
"""

from __future__ import annotations

import argparse
from typing import Final

from dmaproof.errors import UsageError

from ..guest.bare import bare_guest
from ..guest.own import MEMORY_BYTES, own_guest
from ..guest.workload import parse_workload
from ..passthrough.host_functions import PREFIX, parse_functions, require_testable
from ..passthrough.vfio_functions import Host
from ..proof.display import Display
from ..proof.model import Setup
from ..proof.probes import choose_accelerator, choose_memory
from ..proof.setup import (
    limits_of,
    max_downtime_of,
    parse_proof_options,
    qemus_of,
    require_way_for,
    seed_of,
)
from ..qemu.choice import common_machine
from ..qemu.machine import Machine, parse_memory
from .arguments import sole_device

_TAKEN: Final = frozenset(
    {
        *("device", "qemu", "qemu_destination", "machine", "accel", "memory", "cpus", "workload"),
        *("way", "host", "bandwidth", "downtime_limit", "max_downtime", "timeout", "seed"),
        "requests_after",
    }
)
"""Those of `prove`'s options that mean something here."""


def are_functions(arguments: argparse.Namespace) -> bool:
    """Whether the device that was asked for is VFIO functions of this host."""
    return sole_device(arguments, PREFIX) is not None


def add_own_guest_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a guest of the user's own."""
    guest = parser.add_argument_group("own guest", f"for --device {PREFIX}SOURCE,DESTINATION")
    guest.add_argument("--kernel", metavar="FILE", help="what QEMU's -kernel takes")
    guest.add_argument("--initrd", metavar="FILE", help="its initramfs")
    guest.add_argument("--append", metavar="TEXT", default="", help="its command line")


def refuse_own_guest(arguments: argparse.Namespace) -> None:
    """Refuse these options where they would mean nothing.

    Raises:
        UsageError: one of them was given.
    """
    for name in ("kernel", "initrd", "append"):
        if getattr(arguments, name):
            raise UsageError(f"--{name} is for --device {PREFIX}SOURCE,DESTINATION")


async def functions_setup_of(arguments: argparse.Namespace, show: Display, host: Host) -> Setup:
    """The proof that the arguments describe.

    Raises:
        UsageError: they contradict each other, or a function is not there.
        UntestableError: the functions, or this machine, are not up to it.
    """
    limits = limits_of(arguments)
    name = sole_device(arguments, PREFIX) or PREFIX
    functions = parse_functions(name, host)
    for option, default in vars(parse_proof_options({})).items():
        if option not in _TAKEN and getattr(arguments, option) != default:
            raise UsageError(f"--{option.replace('_', '-')} does not apply to --device {name}")
    if arguments.control:
        raise UsageError("--control: nothing can be planted in a device of the host")
    require_way_for(arguments.way, functions)
    memory = parse_memory(arguments.memory) if arguments.memory else None
    for line in require_testable(functions, memory or MEMORY_BYTES, host):
        show.say(line)
    if arguments.kernel is None:
        raise UsageError(
            f"--device {name} needs a guest that drives it: --kernel FILE, and what "
            "docs/passthrough.md tells of such a guest"
        )
    guest = own_guest(arguments.kernel, arguments.initrd, arguments.append)
    seed = seed_of(arguments)
    workload = parse_workload(arguments.workload, seed)
    source, destination = qemus_of(arguments)
    accelerator = await choose_accelerator(
        arguments.accel, source, bare_guest(show.say), show, limits.timeout_s
    )
    if memory is None:
        memory = await choose_memory(
            source, accelerator, guest.memory_bytes, show, limits.timeout_s
        )
    machine = arguments.machine
    if destination.resolve() != source.resolve():
        machine = await common_machine(machine, source, destination, limits.timeout_s)
    return Setup(
        qemu=source,
        qemu_destination=destination,
        machine=Machine(
            machine=machine,
            accelerator=accelerator,
            memory_bytes=memory,
            cpus=arguments.cpus,
            kernel=guest.kernel,
            initramfs=guest.initramfs,
            command_line=guest.command_line(workload),
        ),
        guest=guest.name,
        workload=workload,
        device=functions,
        seed=seed,
        way=arguments.way,
        host=arguments.host,
        limits=limits,
        requests_after=arguments.requests_after,
        max_downtime_s=max_downtime_of(arguments),
    )
