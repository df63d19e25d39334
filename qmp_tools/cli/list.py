"""``dmaproof list``: what a proof can be made of, with a line for each part.

The parts are looked up where ``dmaproof prove`` looks them up, so those of other distributions
(entry points) are listed too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from dmaproof.devices import VirtioDevice, emulated_devices
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.faults import Fault, known_faults, summary

from ..arch import ARCHITECTURES
from ..devices.registry import (
    DeviceKind,
    EmulatedKind,
    ThirdPartyKind,
    device_kinds,
    first_line,
)
from ..guest.workload import MEANINGS, Workload, values_of
from ..migration.scenarios import known_scenarios
from ..migration.scenarios.base import Scenario
from ..passthrough.catalog import names
from ..passthrough.kinds import FakeVfioKind
from ..passthrough.tracking import TRACKINGS
from ..reports.report import SCHEMA_VERSION
from .arguments import describe
from .display import print_table
from .outputs import add_json, write_json

Entry = dict[str, str]
"""One line of a list: its cells by the headings of their columns, in order."""

_EXAMPLES: Final = """\
examples:
  dmaproof list                    # the topics
  dmaproof list scenarios          # the values of --scenario
  dmaproof list faults --json - | jq -r '.entries[].fault'

exit codes:
  0  the list was printed
  2  wrong usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    lines = (f"  {name:<11}{topic.summary}" for name, topic in TOPICS.items())
    describe(
        parser,
        _run,
        description="Print what a proof can be made of.",
        epilog="\n".join(("topics:", *lines, "", _EXAMPLES)),
    )
    parser.add_argument(
        "topic",
        nargs="?",
        choices=list(TOPICS),
        metavar="TOPIC",
        help="what to list; without it, the topics are printed",
    )
    add_json(parser, "the list")


def _run(arguments: argparse.Namespace) -> int:
    entries = TOPICS[arguments.topic].entries() if arguments.topic else topics()
    if arguments.json != "-":
        print_table(list(entries[0]), [list(entry.values()) for entry in entries])
        if arguments.topic is None:
            print("\n'dmaproof list TOPIC' prints one of these lists.")
    if arguments.json:
        answer = {
            "schema_version": SCHEMA_VERSION,
            "topic": arguments.topic,
            "entries": entries,
        }
        write_json(answer, arguments.json)
    return 0


def topics() -> list[Entry]:
    """Return the topics of ``dmaproof list``."""
    return [{"topic": name, "what it is": topic.summary} for name, topic in TOPICS.items()]


def scenarios() -> list[Entry]:
    """Return the migration scenarios, and what each needs of QEMU and the machine."""
    made = {name: scenario() for name, scenario in known_scenarios().usable().items()}
    return [
        {"scenario": name, "needs": _needs_of_scenario(scenario), "summary": scenario.summary}
        for name, scenario in made.items()
    ]


def _needs_of_scenario(scenario: Scenario) -> str:
    # A QEMU may have the parameter 'mode' without the value that the scenario sets.
    needs = [
        *scenario.capabilities,
        *(
            f"{name}={value}" if name == "mode" else name
            for name, value in scenario.parameters.items()
        ),
    ]
    if scenario.plugs_devices:
        needs.append("a device that can be plugged")
    needs += filter(None, scenario.added.machine_options.split(","))
    if scenario.added.dimms:
        needs.append(f"{scenario.added.dimms} DIMMs")
    if scenario.linux_needs:
        needs.append("a Linux guest")
    return ", ".join(needs)


def devices() -> list[Entry]:
    """Return the devices, with the options that follow each name."""
    entries = [
        _device(name, _options_of(device), first_line(device))
        for name, device in emulated_devices().usable().items()
    ]
    for kind in device_kinds().usable().values():
        if not issubclass(kind, EmulatedKind):
            made, options = kind(), _options_of_kind(kind)
            entries += [_device(name, options, made.summary(name)) for name in made.names()]
    return entries


def _device(name: str, options: str, summary: str) -> Entry:
    return {"device": name, "summary": summary, "options": options}


def _options_of(device: type[VirtioDevice]) -> str:
    return ",".join(f"{name}={_kind_of_value(read)}" for name, read in device.options.items())


def _kind_of_value(read: Callable[[str], Any]) -> str:
    names: Mapping[object, str] = {int: "NUMBER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    return names.get(read, "VALUE")


def _options_of_kind(kind: type[DeviceKind]) -> str:
    if issubclass(kind, FakeVfioKind):
        return " | ".join(TRACKINGS)
    return "with --device-command" if issubclass(kind, ThirdPartyKind) else ""


def faults() -> list[Entry]:
    """Return the faults: value, default, link and needs of each."""
    return [
        {
            "fault": name,
            "value": fault.value_means,
            "default": f"{fault.default:g}" if fault.value_means else "",
            "link": fault.link or "",
            "needs": _needs_of_fault(fault),
            "summary": summary(fault).removesuffix("."),
        }
        for name, fault in known_faults().usable().items()
    ]


def _needs_of_fault(fault: type[Fault]) -> str:
    if fault.needs:
        return f"'dmaproof faults': {fault.needs}"
    needs = {
        f"--tracker {fault.tracker}": fault.tracker is not None,
        f"--harvest {fault.harvest}": fault.harvest is not None,
        "RAM above 4 GiB": fault.needs_high_ram,
        "--iommu": fault.needs_iommu,
        "--kill-device": fault.needs_kill,
        "a scenario that resets the device": fault.needs_reset,
    }
    return ", ".join(need for need, is_needed in needs.items() if is_needed)


def trackers() -> list[Entry]:
    """Return the dirty trackers."""
    return [
        {"tracker": name, "summary": first_line(tracker)}
        for name, tracker in emulated_trackers().usable().items()
    ]


def passthrough() -> list[Entry]:
    """Return the proofs of the passthrough route."""
    return [{"proof": name} for name in names()]


def iommus() -> list[Entry]:
    """Return the virtual IOMMUs, and the guests that can use each."""
    return [
        {
            "iommu": name,
            "arch": architecture.name,
            "guests": ", ".join(iommu.guests),
            "summary": iommu.summary,
        }
        for architecture in ARCHITECTURES.values()
        for name, iommu in architecture.iommus.items()
    ]


def workload() -> list[Entry]:
    """Return the parameters of the guest's workload."""
    return [
        {
            "parameter": field.name,
            "default": "as --seed" if field.name == "seed" else f"{field.default}",
            "values": values_of(field.name),
            "meaning": MEANINGS[field.name],
        }
        for field in fields(Workload)
    ]


@dataclass(frozen=True)
class Topic:
    """One list: its `summary`, and the function that makes its `entries`."""

    summary: str
    entries: Callable[[], Sequence[Entry]]


TOPICS: Final[Mapping[str, Topic]] = {
    "scenarios": Topic("how a guest migrates: the values of --scenario", scenarios),
    "devices": Topic("what writes the guest's RAM: the values of --device", devices),
    "faults": Topic("what can be broken on purpose: the values of --fault", faults),
    "trackers": Topic("how a device remembers what it wrote: the values of --tracker", trackers),
    "iommus": Topic("the virtual IOMMUs: the values of --iommu", iommus),
    "passthrough": Topic("proofs of VFIO: the values of passthrough --only", passthrough),
    "workload": Topic("what the guest does: the parameters of --workload", workload),
}
"""The topics by name, in the order in which they are printed."""
