"""The ``dmaproof`` command."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from dmaproof.devices import emulated_devices
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.errors import DmaproofError, UsageError
from dmaproof.faults import known_faults, plant, summary
from dmaproof.trace import Link

from . import bench, qemu_builds
from .device import DeviceOptions
from .display import Display, QuietDisplay, display, print_table
from .fault_trials import CONTROL, HEADINGS, Bench, try_faults
from .guest import GUESTS
from .machine import MIB, Machine, parse_memory
from .migration import WAYS, Limits
from .probes import choose_accelerator, choose_memory
from .proof import Proof, Setup, prove
from .qemu_choice import common_machine, find_qemu
from .report import SCHEMA_VERSION, to_json, to_text
from .run_folder import run_folder
from .verdict import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED, EXIT_USAGE
from .workload import parse_workload

T = TypeVar("T")

_CONTROL_FAULT: Final = "drop-pages=0.01"
_TRACKER: Final = "iommu"
_HARVEST: Final = "0.2"
"""Brings RAM above 4 GiB to a guest of any size."""

_PROVE_EXAMPLES: Final = """\
examples:
  dmaproof prove                              the system's QEMU, everything chosen for you
  dmaproof prove --fault drop-pages=0.01      must fail: shows that losses are caught
  dmaproof prove --memory 5G --way tcp
  dmaproof prove --guest bare                 no kernel to boot: the quickest proof
  dmaproof prove --workload pattern=sequential,huge_every=4
  dmaproof prove --qemu 11.1 --qemu-destination /usr/bin/qemu-system-x86_64
  dmaproof prove --json - --quiet | jq .verdict

exit codes:
  0  every page equal, and the guest went on correctly
  1  pages were lost or never reported, or the guest found errors
  2  wrong usage
  3  could not be tested; the message says why
"""


def _harvest(text: str) -> str:
    if text not in ("immediate", "final"):
        seconds = float(text)
        if not 0 < seconds < 3600:
            raise ValueError
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _size(text: str) -> int:
    """Bytes, with K, M or G for powers of 1024."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return _positive(text[:-1]) * unit if unit else _positive(text)


def _describe_faults() -> str:
    lines = ["faults that a proof can have (dmaproof faults tries them all, and more):"]
    for name, fault in known_faults().items():
        if not fault.needs:
            value = f"={fault.default:g}" if fault.value_means else ""
            lines += [f"  {name}{value}", f"      {summary(fault)}"]
            lines += [f"      The value is {fault.value_means}."] * bool(fault.value_means)
    return "\n".join(lines)


def _add_setup_options(parser: argparse.ArgumentParser) -> None:
    qemu = parser.add_argument_group("QEMU")
    qemu.add_argument("--qemu", metavar="PATH", help="default: the system's; or a fetched version")
    qemu.add_argument("--qemu-destination", metavar="PATH", help="default: the same as --qemu")
    qemu.add_argument("--machine", default="q35", help="machine type (default: %(default)s)")
    qemu.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    qemu.add_argument(
        "--memory", metavar="SIZE", help="RAM, such as 1G (default: enough for the guest)"
    )
    qemu.add_argument("--cpus", type=_positive, default=2, metavar="N")
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
        choices=sorted(WAYS),
        default="unix",
        help="; ".join(f"{name}: {way.summary}" for name, way in WAYS.items()),
    )
    migration.add_argument(
        "--host", default="127.0.0.1", help="where --way tcp listens (default: %(default)s)"
    )
    migration.add_argument(
        "--bandwidth", type=_size, metavar="SIZE", help="limit in bytes a second, such as 64M"
    )
    migration.add_argument(
        "--downtime-limit", type=float, default=0.3, metavar="SECONDS", help="default: %(default)s"
    )
    migration.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")


def _add_prove(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "prove",
        help="migrate a guest under DMA load and compare every page",
        description="Migrate a guest while a device outside QEMU writes its RAM, compare every "
        "page of both sides, and say who lost what.",
        epilog=f"{_PROVE_EXAMPLES}\n{_describe_faults()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run_prove)
    _add_setup_options(parser)
    device = parser.add_argument_group("device")
    device.add_argument("--device", choices=sorted(emulated_devices()), default="blk")
    device.add_argument("--queues", type=_positive, default=2, metavar="N")
    device.add_argument(
        "--tracker",
        choices=sorted(emulated_trackers()),
        help="how the device remembers what it wrote "
        f"(default: what the fault needs, or {_TRACKER})",
    )
    device.add_argument(
        "--harvest",
        type=_harvest,
        metavar="SECONDS",
        help="between two harvests of the tracker, or 'immediate', or 'final' "
        f"(default: what the fault needs, or {_HARVEST})",
    )
    device.add_argument(
        "--fault",
        metavar="NAME[=VALUE]",
        help="break the chain on purpose; see below",
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
        type=_positive,
        default=1000,
        metavar="N",
        help="that the guest must do on the destination (default: %(default)s)",
    )
    run.add_argument("--json", metavar="FILE", help="write the verdict as JSON; '-' for stdout")
    run.add_argument("--keep", action="store_true", help="keep the run's folder and say where")
    run.add_argument("--quiet", action="store_true", help="show no progress")


_FAULTS_EXAMPLES: Final = """\
examples:
  dmaproof faults                             every fault, wherever it shows: some minutes
  dmaproof faults --on testbed --runs 20      without QEMU: takes a minute or two
  dmaproof faults --only used-ring-unlogged --json -

exit codes:
  0  every fault was caught in 19 of 20 runs or more, the control never
  1  a fault went unseen, or the control raised an alarm
  2  wrong usage
  3  a run came to no verdict
"""


def _add_faults(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "faults",
        help="break every link of the chain in turn, and see whether it is caught",
        description="Plant every known fault, on a test bed without QEMU and, where one device on "
        "one QEMU shows it, in a real proof; tell which were caught, by what, at which link.",
        epilog=_FAULTS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(
        run=_run_faults,
        device="blk",
        queues=2,
        tracker=None,
        harvest=None,
        requests_after=1000,
    )
    parser.add_argument(
        "--runs", type=_positive, default=1, metavar="N", help="of each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next adds 1")
    parser.add_argument(
        "--only",
        action="append",
        choices=(CONTROL, *known_faults()),
        metavar="NAME",
        help=f"may come repeatedly; '{CONTROL}' is the control: {', '.join(known_faults())}",
    )
    parser.add_argument(
        "--on",
        choices=("both", *Bench),
        default="both",
        help="the test bed, real proofs, or both (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON; '-' for stdout")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    _add_setup_options(parser)


def _add_qemu(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("qemu", help="QEMU builds in a private folder")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    fetch = actions.add_parser(
        "fetch",
        help="bring a QEMU from the distribution's archive, without root",
        description="Unpack a QEMU with all its libraries into a private folder. Nothing of the "
        "system is touched.",
    )
    fetch.add_argument("build", metavar="VERSION|SUITE", help="such as 11.1, or trixie-backports")
    fetch.set_defaults(run=_run_qemu_fetch)
    show = actions.add_parser("list", help="the QEMUs that are there")
    show.set_defaults(run=_run_qemu_list)


async def _setup(arguments: argparse.Namespace, show: Display) -> Setup:
    limits = Limits(arguments.bandwidth, arguments.downtime_limit, arguments.timeout)
    if not (0 < limits.downtime_s <= 2000 and limits.timeout_s > 0):
        raise UsageError("--downtime-limit takes 0.001 to 2000 seconds, --timeout more than 0")
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(32)
    fault = plant(arguments.fault, seed)  # a wrong --fault is told before anything is started
    if fault.needs:
        raise UsageError(
            f"fault {arguments.fault} shows only with {fault.needs}, which a proof does not have: "
            f"dmaproof faults --only {arguments.fault.partition('=')[0]}"
        )
    tracker = _agreed("--tracker", arguments.tracker, fault.tracker) or _TRACKER
    harvest = _agreed("--harvest", arguments.harvest, fault.harvest) or _HARVEST
    memory = parse_memory(arguments.memory) if arguments.memory else None
    workload = parse_workload(arguments.workload, seed)
    source = find_qemu(arguments.qemu)
    destination = find_qemu(arguments.qemu_destination) if arguments.qemu_destination else source
    guest = GUESTS[arguments.guest](show.say)
    accelerator = await choose_accelerator(arguments.accel, source, guest, show)
    if memory is None:
        memory = await choose_memory(source, accelerator, guest.memory_bytes, show)
    machine = arguments.machine
    if destination.resolve() != source.resolve():
        machine = await common_machine(machine, source, destination)
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
        ),
        guest=guest.name,
        workload=workload,
        device=DeviceOptions(arguments.device, tracker, harvest, arguments.fault, seed),
        queues=arguments.queues,
        way=arguments.way,
        host=arguments.host,
        limits=limits,
        requests_after=arguments.requests_after,
    )


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
    return bool(verdict.lost) and all(page.link == Link.LOG for page in verdict.lost)


def _run_prove(arguments: argparse.Namespace) -> int:
    show = display(quiet=arguments.quiet)
    proof, control = asyncio.run(_cancellable(_prove(arguments, show)))
    answer = to_json(proof)
    text = to_text(proof)
    code = proof.verdict.exit_code
    if control is not None:
        caught = _caught(control)
        answer["control"] = {**to_json(control), "caught": caught}
        text += f"\n  control      {_CONTROL_FAULT} planted in the same set-up: " + (
            f"caught, {len(control.verdict.lost)} pages" if caught else "NOT CAUGHT"
        )
        code = code if caught else EXIT_UNTESTED
    if arguments.json != "-":
        print(text)
    if arguments.json:
        _write_json(answer, arguments.json)
    return code


def _run_faults(arguments: argparse.Namespace) -> int:
    show = display(quiet=arguments.quiet)
    benches = list(Bench) if arguments.on == "both" else [Bench(arguments.on)]

    teller = show

    async def make_setup(fault: str | None, seed: int) -> Setup:
        nonlocal teller
        trial = {**vars(arguments), "fault": fault, "seed": seed}
        setup = await _setup(argparse.Namespace(**trial), teller)
        teller = QuietDisplay()  # the next would tell the same of the machine
        return setup

    with run_folder() as folder:
        trials = try_faults(
            arguments.only or (CONTROL, *known_faults()),
            benches,
            range(arguments.seed, arguments.seed + arguments.runs),
            make_setup,
            folder,
            show.say,
        )
        rows = asyncio.run(_cancellable(trials))
    if arguments.json != "-":
        print_table(HEADINGS, [row.cells() for row in rows])
    if arguments.json:
        table = [row.to_json() for row in rows]
        _write_json({"schema_version": SCHEMA_VERSION, "faults": table}, arguments.json)
    if any(trial.untested for row in rows for trial in row.trials):
        return EXIT_UNTESTED
    return EXIT_PASS if all(row.as_wanted for row in rows) else EXIT_LOST


def _write_json(answer: dict[str, Any], target: str) -> None:
    if target == "-":
        json.dump(answer, sys.stdout, indent=2)
        print()
        return
    try:
        Path(target).write_text(json.dumps(answer, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--json {target}: {error.strerror}") from error


async def _cancellable(work: Coroutine[Any, Any, T]) -> T:
    """`work`, ended in good order by SIGTERM and SIGHUP as it is by an interrupt."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    return await task


def _run_qemu_fetch(arguments: argparse.Namespace) -> int:
    build = qemu_builds.fetch(arguments.build, display().say)
    print(f"QEMU {build.version} ({build.suite}): {build.path}")
    return 0


def _run_qemu_list(arguments: argparse.Namespace) -> int:
    builds = qemu_builds.installed()
    for build in builds:
        print(f"{build.version}\t{build.suite}\t{build.path}")
    if not builds:
        print("none was fetched yet: dmaproof qemu fetch 11.1", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="dmaproof",
        description="Proves that every page a device writes by DMA survives a live migration.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_prove(commands)
    _add_faults(commands)
    _add_qemu(commands)
    bench.add_command(commands)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except UsageError as error:
        print(f"dmaproof: {error}", file=sys.stderr)
        return EXIT_USAGE
    except DmaproofError as error:
        print(f"dmaproof: NOT TESTED: {error}", file=sys.stderr)
        return EXIT_UNTESTED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("dmaproof: interrupted; everything was cleaned up", file=sys.stderr)
        return EXIT_UNTESTED


if __name__ == "__main__":
    sys.exit(main())
