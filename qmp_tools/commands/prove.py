"""``dmaproof prove``: migrate a guest under DMA load and compare every page."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from typing import Final

from dmaproof.devices import emulated_devices
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.errors import UsageError
from dmaproof.faults import plant

from ..device import DeviceOptions
from ..display import Display, display
from ..guest import Workload, linux_guest
from ..machine import Machine, format_memory, parse_memory
from ..migration import WAYS, Limits
from ..probes import choose_accelerator, choose_memory
from ..proof import Proof, Setup, prove
from ..qemu_choice import common_machine, find_qemu
from ..report import to_json, to_text
from ..verdict import EXIT_UNTESTED
from .arguments import Subcommands, add_parser, positive, seconds, size
from .interruption import run_interruptibly
from .outputs import add_outputs, reporting_failure, write_outputs, writes_to_stdout

_CONTROL_FAULT: Final = "drop-pages=0.01"

_PROVE_EXAMPLES: Final = """\
examples:
  dmaproof prove                              the system's QEMU, everything chosen for you
  dmaproof prove --fault drop-pages=0.01      must fail: shows that losses are caught
  dmaproof prove --memory 5G --way tcp
  dmaproof prove --qemu 11.1 --qemu-destination /usr/bin/qemu-system-x86_64
  dmaproof prove --report proof.html --junit proof.xml
  dmaproof prove --json - --quiet | jq .verdict

exit codes:
  0  every page equal, and the guest went on correctly
  1  pages were lost, or the guest found errors
  2  wrong usage
  3  could not be tested; the message says why
"""


def _harvest(text: str) -> str:
    if text not in ("immediate", "final"):
        seconds(text)
    return text


def add(commands: Subcommands) -> None:
    """Add the subcommand."""
    parser = add_parser(
        commands,
        "prove",
        reporting_failure(_run, "prove"),
        summary="migrate a guest under DMA load and compare every page",
        description="Migrate a guest while a device outside QEMU writes its RAM, compare every "
        "page of both sides, and say who lost what.",
        epilog=_PROVE_EXAMPLES,
    )
    qemu = parser.add_argument_group("QEMU")
    qemu.add_argument("--qemu", metavar="PATH", help="default: the system's; or a fetched version")
    qemu.add_argument("--qemu-destination", metavar="PATH", help="default: the same as --qemu")
    qemu.add_argument("--machine", default="q35", help="machine type (default: %(default)s)")
    qemu.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    qemu.add_argument("--memory", metavar="SIZE", help="RAM, such as 1G (default: about 512M)")
    qemu.add_argument("--cpus", type=positive, default=2, metavar="N")
    migration = parser.add_argument_group("migration")
    migration.add_argument(
        "--way",
        choices=sorted(WAYS),
        default="unix",
        help="; ".join(f"{name}: {way.summary}" for name, way in WAYS.items()),
    )
    migration.add_argument(
        "--host", default="127.0.0.1", help="where --way tcp listens (default: %(default)s)"
    )
    migration.add_argument(
        "--bandwidth", type=size, metavar="SIZE", help="limit in bytes a second, such as 64M"
    )
    migration.add_argument(
        "--downtime-limit", type=float, default=0.3, metavar="SECONDS", help="default: %(default)s"
    )
    migration.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    device = parser.add_argument_group("device")
    device.add_argument("--device", choices=sorted(emulated_devices()), default="blk")
    device.add_argument("--queues", type=positive, default=2, metavar="N")
    device.add_argument(
        "--tracker",
        choices=sorted(emulated_trackers()),
        default="iommu",
        help="how the device remembers what it wrote (default: %(default)s)",
    )
    device.add_argument(
        "--harvest",
        type=_harvest,
        default="0.2",
        metavar="SECONDS",
        help="between two harvests of the tracker, or 'immediate', or 'final' "
        "(default: %(default)s)",
    )
    device.add_argument(
        "--fault", metavar="NAME=VALUE", help="break the chain on purpose: drop-pages=SHARE"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--control",
        action="store_true",
        help=f"after a pass, repeat it with {_CONTROL_FAULT} planted, which must be caught",
    )
    run.add_argument("--seed", type=int, help="repeats a run's random choices")
    run.add_argument(
        "--requests-after",
        type=positive,
        default=1000,
        metavar="N",
        help="that the guest must do on the destination (default: %(default)s)",
    )
    run.add_argument("--keep", action="store_true", help="keep the run's folder and say where")
    run.add_argument("--quiet", action="store_true", help="show no progress")
    add_outputs(parser)


async def _setup(arguments: argparse.Namespace, show: Display) -> Setup:
    limits = Limits(arguments.bandwidth, arguments.downtime_limit, arguments.timeout)
    if not (0 < limits.downtime_s <= 2000 and limits.timeout_s > 0):
        raise UsageError("--downtime-limit takes 0.001 to 2000 seconds, --timeout more than 0")
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(32)
    plant(arguments.fault, seed)  # a wrong --fault is told before anything is started
    memory = parse_memory(arguments.memory) if arguments.memory else None
    source = find_qemu(arguments.qemu)
    destination = find_qemu(arguments.qemu_destination) if arguments.qemu_destination else source
    guest = linux_guest(show.say)
    accelerator = await choose_accelerator(arguments.accel, source, guest, show)
    if memory is None:
        memory = await choose_memory(source, accelerator, show)
    machine = arguments.machine
    if destination.resolve() != source.resolve():
        machine = await common_machine(machine, source, destination)
    workload = Workload(seed=seed)
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
        workload=workload,
        device=DeviceOptions(
            arguments.device, arguments.tracker, arguments.harvest, arguments.fault, seed
        ),
        queues=arguments.queues,
        way=arguments.way,
        host=arguments.host,
        limits=limits,
        requests_after=arguments.requests_after,
    )


async def _prove(arguments: argparse.Namespace, show: Display) -> tuple[Proof, Proof | None]:
    setup = await _setup(arguments, show)
    proof = await prove(setup, show, keep=arguments.keep)
    if not arguments.control or proof.verdict.exit_code != 0:
        return proof, None
    show.say(f"control: the same again with {_CONTROL_FAULT} planted")
    faulty = replace(setup, device=replace(setup.device, fault=_CONTROL_FAULT))
    return proof, await prove(faulty, show)


def _caught(control: Proof) -> bool:
    verdict = control.verdict
    return bool(verdict.lost) and all(page.planted for page in verdict.lost)


def _run(arguments: argparse.Namespace) -> int:
    show = display(quiet=arguments.quiet)
    proof, control = run_interruptibly(_prove(arguments, show))
    answer = to_json(proof)
    answer["commands"] = {"dmaproof": _again(arguments, proof), **answer["commands"]}
    text = to_text(proof)
    if control is not None:
        caught = _caught(control)
        answer["control"] = {**to_json(control), "caught": caught}
        text += f"\n  control      {_CONTROL_FAULT} planted in the same set-up: " + (
            f"caught, {len(control.verdict.lost)} pages" if caught else "NOT CAUGHT"
        )
        if not caught:
            answer["exit_code"] = EXIT_UNTESTED
            answer["verdict"] = f"nothing was proved: a planted {_CONTROL_FAULT} was not caught"
    if not writes_to_stdout(arguments):
        print(text)
    write_outputs(answer, arguments)
    code: int = answer["exit_code"]
    return code


def _again(arguments: argparse.Namespace, proof: Proof) -> list[str]:
    """The command line that repeats the run, with all that was chosen for the user."""
    chosen = []
    if arguments.seed is None:
        chosen += ["--seed", str(proof.setup.device.seed)]
    if arguments.memory is None:
        chosen += ["--memory", format_memory(proof.setup.machine.memory_bytes)]
    if arguments.accel == "auto":
        chosen += ["--accel", proof.setup.machine.accelerator]
    return ["dmaproof", *arguments.command_line, *chosen]
