"""dmaproof with domains of libvirt, which virsh migrates between two hosts."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from qmp_tools.guest.bare import probe_guest
from qmp_tools.qemu.choice import find_qemu
from support.command import Tool
from support.libvirt_hosts import Host, Hosts, libvirt_hosts, missing

VM = "qemu:///system/vm"
MIGRATE = ("virsh", "migrate", "--live", "--suspend", "vm", "qemu+ssh://destination/system")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts for all tests; the source has the domain 'vm', which does not run."""
    if lacking := missing():
        pytest.skip(f"needs {' '.join(lacking)}")
    with libvirt_hosts(tmp_path_factory.mktemp("v")) as running:  # short, for sockets
        running.define("vm", probe_guest(), find_qemu(None))
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


def test_watch_reports_that_libvirt_ended_the_source(running: Hosts, tool: Tool) -> None:
    """libvirt ends the source within milliseconds of the end of the migration."""
    watching = tool_on(running.source, tool).start("watch", VM, "--interval", "0.1")
    watching.wait_for_line("no migration yet")
    watching.process.send_signal(signal.SIGSTOP)
    running.source.run(*MIGRATE)
    watching.process.send_signal(signal.SIGCONT)
    outcome = watching.finish()
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.output.splitlines()[-1] == "completed, source ended by libvirt"
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
