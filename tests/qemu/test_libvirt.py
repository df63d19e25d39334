"""dmaproof with domains of libvirt, which virsh migrates between two hosts."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmaproof.units import PAGE_BYTES
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.guest.bare import probe_guest
from qmp_tools.qemu.choice import find_qemu
from qmp_tools.qemu.machine import MIB
from support.command import Tool
from support.doc_commands import ROOT, blocks, missing, type_in
from support.libvirt_hosts import Host, Hosts, libvirt_hosts, what_is_missing

PAGE = ROOT / "docs" / "libvirt.md"
CHANGED = 0x2345007
VM = "qemu:///system/vm"
MIGRATE = ("virsh", "migrate", "--live", "--suspend", "vm", "qemu+ssh://destination/system")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts for all tests; the source has the domain 'vm', which does not run."""
    if lacking := what_is_missing():
        pytest.skip(f"needs {' '.join(lacking)}")
    with libvirt_hosts(tmp_path_factory.mktemp("v")) as running:  # short, for sockets
        running.define("vm", probe_guest(X86_64), find_qemu(None))
        yield running


@pytest.fixture
def running(hosts: Hosts) -> Iterator[Hosts]:
    """The hosts, with the domain running on the source until the test ends."""
    hosts.source.run("virsh", "start", "vm")
    yield hosts
    for host in (hosts.source, hosts.destination):
        host.destroy_domains()


def tool_on(host: Host, tool: Tool) -> Tool:
    """Return the command as it runs on a host."""
    return Tool(tool.folder, host.inside)


def refused(tool: Tool, exit_code: int, message: str, *command: str) -> None:
    outcome = tool.run(*command)
    assert outcome.exit_code == exit_code, outcome.output + outcome.errors
    assert message in outcome.errors
    assert len(outcome.errors.splitlines()) == 1, "libvirt prints errors of its own"
    assert not tool.leftovers()


def check(tool: Tool, snapshot: Path, exit_code: int) -> dict[str, Any]:
    outcome = tool.run("check", str(snapshot), VM, "--json", "-")
    assert outcome.exit_code == exit_code, outcome.output + outcome.errors
    assert not tool.leftovers()
    return outcome.report


def change_a_byte(host: Host, pid: int) -> None:
    """Change a byte of the RAM of the domain in process `pid`; a second time, change it back."""
    command = ("virsh", "qemu-monitor-command", "vm", "--hmp", f"gpa2hva {CHANGED:#x}")
    address = int(host.run(*command).split()[-1], 16)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        (byte,) = os.pread(memory.fileno(), 1, address)
        os.pwrite(memory.fileno(), bytes([byte ^ 1]), address)


def test_the_commands_of_the_page_check_a_migration(
    running: Hosts, tool: Tool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("d")  # short, for sockets
    source, destination = running.source, running.destination
    before, after = (block for block in blocks(PAGE) if block.printed)
    # QEMU 7.2 loses under TCG what vCPUs write meanwhile (docs/qemu-findings.md).
    source.run("virsh", "suspend", "vm")
    exit_code, printed = type_in(before, folder, source.inside)
    assert (exit_code, missing(before, printed)) == (0, []), printed
    assert "terminate process" not in source.log(), "libvirt had to wait for dmaproof"

    on_destination = tool_on(destination, tool)
    snapshot = folder / "vm.snap"
    report = check(on_destination, snapshot, 0)
    assert report["pages"] >= 64 * MIB // PAGE_BYTES
    change_a_byte(destination, report["destination"]["pid"])
    (difference,) = check(on_destination, snapshot, 1)["differences"]
    assert difference["gpa"] == CHANGED // PAGE_BYTES * PAGE_BYTES
    change_a_byte(destination, report["destination"]["pid"])
    remote = (str(snapshot), "qemu+ssh://destination/system/vm")
    refused(tool_on(source, tool), 3, f"run 'dmaproof snapshot {VM} FILE' there", "check", *remote)

    exit_code, printed = type_in(after, folder, destination.inside)
    assert (exit_code, missing(after, printed)) == (0, []), printed
    # The page's last command has resumed the guest.
    refused(on_destination, 3, "virsh migrate --suspend", "check", str(snapshot), VM)


def test_watch_reports_that_libvirt_ended_the_source(running: Hosts, tool: Tool) -> None:
    """libvirt ends the source within milliseconds of the end of the migration."""
    watching = tool_on(running.source, tool).start("watch", VM, "--interval", "0.1")
    watching.wait_for_line("no migration yet")
    watching.process.send_signal(signal.SIGSTOP)
    running.source.run(*MIGRATE)
    watching.process.send_signal(signal.SIGCONT)
    outcome = watching.finish()
    assert outcome.exit_code == 0, outcome.errors
    *_, last = outcome.output.splitlines()
    assert re.fullmatch(r"completed, elapsed .*, source ended by libvirt, downtime \d+ ms", last)
    assert outcome.errors.splitlines()[-1] == ("the migration completed; libvirt ended the source")
    # The command that came too late says which command would have come in time.
    late = f"'dmaproof snapshot {VM} FILE --at-switchover --background'"
    refused(tool_on(running.source, tool), 3, late, "watch", VM)


def test_watch_of_a_domain_that_is_destroyed_is_not_a_success(running: Hosts, tool: Tool) -> None:
    watching = tool_on(running.source, tool).start("watch", VM, "--interval", "0.1")
    watching.wait_for_line("no migration yet")
    running.source.run("virsh", "destroy", "vm")
    outcome = watching.finish()
    assert outcome.exit_code == 3
    assert "QEMU ended before a migration began" in outcome.errors


def test_the_dirty_rate_of_a_domain_by_its_name_and_its_uuid(running: Hosts, tool: Tool) -> None:
    uuid = running.source.run("virsh", "domuuid", "vm").strip()
    for address in (VM, VM.replace("vm", uuid)):
        outcome = tool_on(running.source, tool).run("dirty-rate", address, "--json")
        assert outcome.exit_code == 0, outcome.errors
        assert json.loads(outcome.output)["mode"] == "page-sampling"


def test_a_domain_that_cannot_be_reached_is_reported(hosts: Hosts, tool: Tool) -> None:
    source = tool_on(hosts.source, tool)
    refused(source, 2, "has no domain called nix; its domains are: vm", "watch", f"{VM[:-2]}nix")
    refused(source, 3, "virsh start vm", "watch", VM)
    outside = f"qemu+unix:///system/vm?socket={tool.folder}/none"
    refused(tool, 3, "Start libvirt (systemctl start libvirtd)", "watch", outside)
