"""What a proof is made of, from the command line: for every subcommand that carries out proofs."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.errors import UsageError
from dmaproof.faults import plant

from ..arguments import require
from ..cli.arguments import add_timeout, positive, seconds, size
from ..devices.choice import choose_device
from ..devices.device import ProofDevice
from ..devices.emulated import RINGS
from ..devices.process import DeviceOptions
from ..guest.choice import GUESTS
from ..guest.workload import parse_workload
from ..migration.migration import Limits
from ..migration.refused_features import FEATURES
from ..migration.ways import LOCALHOST, WAYS, Plug, Way
from ..qemu.choice import common_machine, find_qemu
from ..qemu.iommu import IOMMUS
from ..qemu.machine import DESTINATION, MIB, SOURCE, Machine, parse_memory, refuse_taken_properties
from .display import Display
from .late_dma import SETTLE_S
from .model import Setup
from .probes import choose_accelerator, choose_memory, require_x86_64, warn_of_dimms

TRACKER: Final = "iommu"
HARVEST: Final = "0.2"
"""The defaults of the options of these names, where a fault needs nothing else."""
_BEHIND_IOMMU: Final = "once=2048"
"""Each page costs the device and QEMU a conversation there."""


def add_setup_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of QEMU, guest and migration."""
    qemu = parser.add_argument_group("QEMU")
    qemu.add_argument("--qemu", metavar="PATH", help="default: the system's; or a fetched version")
    qemu.add_argument("--qemu-destination", metavar="PATH", help="default: the same as --qemu")
    qemu.add_argument("--machine", help="machine type (default: q35, or what the way needs)")
    qemu.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    qemu.add_argument(
        "--memory", metavar="SIZE", help="RAM, such as 1G (default: enough for the guest)"
    )
    qemu.add_argument("--cpus", type=positive, default=2, metavar="N")
    qemu.add_argument(
        "--iommu",
        choices=IOMMUS,
        help="put the devices behind an IOMMU of QEMU's, see below (default: none, or what the "
        "fault needs)",
    )
    guest = parser.add_argument_group("guest")
    guest.add_argument(
        "--guest",
        choices=sorted(GUESTS),
        default="linux",
        help="bare: no kernel, one CPU (default: %(default)s)",
    )
    guest.add_argument(
        "--workload",
        default="",
        metavar="NAME=VALUE,…",
        help="what the guest does, see docs/guests.md: such as pattern=hot-set,threads=16",
    )
    migration = parser.add_argument_group("migration")
    migration.add_argument(
        "--way",
        metavar="NAME",
        choices=WAYS,
        default="unix",
        help="how the guest migrates, see below (default: %(default)s)",
    )
    migration.add_argument(
        "--host",
        default=LOCALHOST,
        help="where the ways tcp and tls listen (default: %(default)s)",
    )
    migration.add_argument(
        "--bandwidth", type=size, metavar="SIZE", help="limit in bytes a second, such as 64M"
    )
    migration.add_argument(
        "--downtime-limit", type=float, default=0.3, metavar="SECONDS", help="default: %(default)s"
    )
    migration.add_argument(
        "--max-downtime",
        type=seconds,
        metavar="SECONDS",
        help="fail where the guest is stopped for longer, until the destination has loaded "
        "everything; QEMU itself is told --downtime-limit",
    )
    add_timeout(migration)


def add_proof_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all that one proof depends on: the setup, its device, the seed."""
    add_setup_options(parser)
    device = parser.add_argument_group("device")
    device.add_argument(
        "--device",
        metavar="NAME[:OPTION=VALUE,…]",
        action="append",
        help="one of dmaproof's (docs/own-devices.md), may come repeatedly; qemu:NAME, one inside "
        "QEMU (docs/devices.md); vfio-fake, or vfio:SOURCE,DESTINATION (docs/passthrough.md); "
        "default: blk",
    )
    device.add_argument(
        "--device-command",
        metavar="COMMAND",
        help="a vhost-user back end to be run in the device's place, listening on {socket}; "
        "{image}, {folder}, {side} and {queues} are filled in too",
    )
    device.add_argument("--queues", type=positive, default=2, metavar="N")
    device.add_argument(
        "--ring", choices=RINGS, default="split", help="form of its queues (default: %(default)s)"
    )
    device.add_argument(
        "--tracker",
        choices=sorted(emulated_trackers()),
        help="how the device remembers what it wrote "
        f"(default: what the fault needs, or {TRACKER})",
    )
    device.add_argument(
        "--harvest",
        type=_harvest,
        metavar="SECONDS",
        help="between two harvests of the tracker, or 'immediate', or 'final' "
        f"(default: what the fault needs, or {HARVEST})",
    )
    device.add_argument(
        "--fault",
        metavar="NAME[=VALUE]",
        help="break the chain on purpose; see below",
    )
    device.add_argument(
        "--destination-lacks",
        action="append",
        default=[],
        choices=FEATURES,
        metavar="FEATURE",
        help="a virtio feature that the device offers at the source alone, which QEMU has to "
        f"refuse; may come repeatedly: {', '.join(FEATURES)}",
    )
    device.add_argument(
        "--kill-device",
        action="store_true",
        help="kill its process in the middle of the migration, and start it again",
    )
    parser.add_argument("--seed", type=int, help="repeats a run's random choices")
    parser.add_argument(
        "--requests-after",
        type=positive,
        default=1000,
        metavar="N",
        help="that the guest must do on the destination (default: %(default)s)",
    )
    parser.add_argument(
        "--settle",
        type=seconds,
        default=SETTLE_S,
        metavar="SECONDS",
        help="how long a third-party device must leave the source's RAM alone after its guest was "
        "paused (default: %(default)g)",
    )


def _harvest(text: str) -> str:
    if text not in ("immediate", "final"):
        seconds(text)
    return text


def proof_options() -> dict[str, argparse.Action]:
    """The options of one proof by name, without hyphens in front, as their parser knows them."""
    # argparse has no public way to ask a parser for its options.
    return {action.option_strings[0].removeprefix("--"): action for action in _parser()._actions}


def proof_option_groups() -> list[tuple[str | None, list[argparse.Action]]]:
    """The same under the titles of their groups, as a help shows them."""
    groups = [(group.title, group._group_actions) for group in _parser()._action_groups]
    return [(title, actions) for title, actions in groups if actions]


def _parser() -> argparse.ArgumentParser:
    parser = _OptionParser(prog="proof", allow_abbrev=False, add_help=False)
    add_proof_options(parser)
    return parser


def parse_proof_options(options: Mapping[str, object]) -> argparse.Namespace:
    """The arguments for `setup_of` from ``prove``'s options by name: {'guest': 'bare', …}.

    Underscores stand for hyphens; see `proof_words` for the values.

    Raises:
        UsageError: there is no such option, or it cannot have that value.
    """
    require("options", options, Mapping, "options by name, such as {'guest': 'bare'}")
    for name in options:
        require("options", name, str, "names that are strings")
    return _parser().parse_args(proof_words(options))


def proof_words(options: Mapping[str, object]) -> list[str]:
    """The options as words of a command line.

    One that is None is not given. A switch is True or 'on', False or 'off'. What may come
    repeatedly has its values in a list, or in a text with blanks between them.

    Raises:
        UsageError: a switch is something else.
    """
    known = proof_options()
    words = []
    for key, value in options.items():
        name = key.replace("_", "-")
        action = known.get(name)
        if value is None:
            continue
        if action is not None and action.nargs == 0:
            words += [f"--{name}"] if _is_on(name, value) else []
        elif isinstance(action, argparse._AppendAction):
            several = value if isinstance(value, (list, tuple)) else str(value).split()
            words += [f"--{name}={it}" for it in several]
        else:
            words.append(f"--{name}={value}")
    return words


def _is_on(name: str, value: object) -> bool:
    text = str(value).lower()
    if text not in ("on", "off", "true", "false"):
        raise UsageError(f"--{name} {value}: on or off is due")
    return text in ("on", "true")


class _OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def describe_iommus() -> str:
    """All virtual IOMMUs, a line each, for a subcommand's help."""
    lines = (f"  {name:<12}{iommu.summary}" for name, iommu in IOMMUS.items())
    return "\n".join(("IOMMUs (docs/iommu.md):", *lines))


def describe_ways() -> str:
    """All ways to migrate, a line each, for a subcommand's help."""
    width = max(map(len, WAYS))
    lines = (f"  {name:<{width}}  {way.summary}" for name, way in WAYS.items())
    return "\n".join(("ways to migrate (docs/ways.md tells what each needs):", *lines))


async def setup_of(arguments: argparse.Namespace, show: Display) -> Setup:
    """The proof that the arguments describe; what they leave open is chosen, and said.

    Raises:
        UsageError: they contradict each other.
        UntestableError: what is needed is not there.
    """
    limits = limits_of(arguments)
    max_downtime_s = max_downtime_of(arguments)
    seed = seed_of(arguments)
    fault = plant(arguments.fault, seed)  # a wrong --fault is told before anything is started
    if fault.needs:
        raise UsageError(
            f"fault {arguments.fault} shows only with {fault.needs}, which a proof does not have: "
            f"dmaproof faults --only {arguments.fault.partition('=')[0]}"
        )
    tracker = _agreed("--tracker", arguments.tracker, fault.tracker) or TRACKER
    harvest = _agreed("--harvest", arguments.harvest, fault.harvest) or HARVEST
    iommu = arguments.iommu or ("intel" if fault.needs_iommu else None)
    lacks = sum(1 << FEATURES[name][0] for name in set(arguments.destination_lacks))
    device = choose_device(
        arguments.device or ["blk"],
        arguments.device_command,
        DeviceOptions("", tracker, harvest, arguments.fault, seed, lacks),
        arguments.queues,
        arguments.ring,
        killed=arguments.kill_device or fault.needs_kill,
        behind_iommu=iommu is not None,
    )
    if device.facts.tracker is None:
        for option in ("tracker", "harvest", "fault"):
            if getattr(arguments, option) is not None:
                raise UsageError(
                    f"--{option}: {device.facts.device} is not one of dmaproof's devices"
                )
    if arguments.guest not in device.guests:
        raise UsageError(
            f"--guest {arguments.guest}: it has no driver for {device.facts.device}; "
            f"--guest {' or '.join(sorted(device.guests))} has one"
        )
    if iommu is not None and arguments.guest not in IOMMUS[iommu].guests:
        raise UsageError(
            f"--iommu {iommu}: the guest {arguments.guest} does not use it so; "
            f"--guest {' or '.join(IOMMUS[iommu].guests)} does"
        )
    way = require_way_for(arguments.way, device)
    memory = parse_memory(arguments.memory) if arguments.memory else None
    usual = _BEHIND_IOMMU if iommu else ""
    workload = device.fit(parse_workload(f"{usual},{arguments.workload}", seed))
    if arguments.machine:
        refuse_taken_properties(arguments.machine)
    source, destination = qemus_of(arguments)
    for side, qemu in ((SOURCE, source), (DESTINATION, destination)):
        await require_x86_64(side, qemu, limits.timeout_s)
    guest = GUESTS[arguments.guest](show.say, device.driver)
    if iommu is not None and guest.name == "linux":
        guest = replace(guest, options=f"{IOMMUS[iommu].linux_options} {guest.options}")
    accelerator = await choose_accelerator(arguments.accel, source, guest, show, limits.timeout_s)
    if memory is None:
        memory = await choose_memory(
            source, accelerator, guest.memory_bytes, show, limits.timeout_s
        )
    machine = arguments.machine or way.machine
    if destination.resolve() != source.resolve() or arguments.machine:
        machine = await common_machine(machine, source, destination, limits.timeout_s)
    if iommu is not None and "q35" not in machine:
        raise UsageError(
            f"--iommu {iommu}: only q35 machines have it, and this one is to be {machine}"
        )
    machine += way.machine_options
    if way.plug is Plug.DIMM:
        await warn_of_dimms(source, accelerator, show, limits.timeout_s)
    if fault.needs_high_ram:
        machine += f",max-ram-below-4g={memory // 2 // MIB}M"
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
            dimm_slots=way.migrations if way.plug is Plug.DIMM else 0,
            iommu=iommu,
        ),
        guest=guest.name,
        workload=workload,
        device=device,
        seed=seed,
        way=arguments.way,
        host=arguments.host,
        limits=limits,
        requests_after=arguments.requests_after,
        settle_s=arguments.settle,
        max_downtime_s=max_downtime_s,
    )


def require_way_for(name: str, device: ProofDevice) -> Way:
    """The way of this name.

    Raises:
        UsageError: `device` cannot go it.
    """
    way = WAYS[name]
    if way.plug is Plug.DISK and not device.driver.has_disk:
        raise UsageError(f"--way {name}: it plugs a disk, and {device.facts.device} is not one")
    return way


def limits_of(arguments: argparse.Namespace) -> Limits:
    """What the migration may take.

    Raises:
        UsageError: QEMU takes no such downtime limit (it counts in milliseconds).
    """
    limits = Limits(arguments.bandwidth, arguments.downtime_limit, arguments.timeout)
    if not 0.001 <= limits.downtime_s <= 2000:
        raise UsageError("--downtime-limit takes 0.001 to 2000 seconds")
    return limits


def max_downtime_of(arguments: argparse.Namespace) -> float | None:
    """The limit that was given.

    Raises:
        UsageError: the way has no downtime that could be measured.
    """
    limit_s: float | None = arguments.max_downtime
    way = WAYS[arguments.way]
    if limit_s is not None and (way.snapshot or way.in_place):
        raise UsageError(
            f"--max-downtime: with --way {arguments.way} dmaproof itself stops the guest, for as "
            "long as it takes to copy its RAM"
        )
    return limit_s


def seed_of(arguments: argparse.Namespace, bits: int = 32) -> int:
    """The seed that was given, or else one of so many `bits` that nobody has had."""
    return arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(bits)


def qemus_of(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The source's and the destination's QEMU.

    Raises:
        UsageError: there is no such QEMU.
        UntestableError: there is none at all.
    """
    source = find_qemu(arguments.qemu)
    if not arguments.qemu_destination:
        return source, source
    return source, find_qemu(arguments.qemu_destination)


def _agreed(option: str, given: str | None, needed: str | None) -> str | None:
    """What was given, or else what the fault needs.

    Raises:
        UsageError: the fault does not show with what was given.
    """
    if given and needed and given != needed:
        raise UsageError(
            f"{option} {given}: the fault shows for certain only with {option} {needed}"
        )
    return given or needed
