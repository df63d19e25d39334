"""Two hosts with libvirt on one machine, between which virsh migrates domains.

Each host is a libvirtd in namespaces of its own: a host name (UTS), a network that leads only to
the other host, and mounts that give it its own /run, /etc/libvirt and /var/lib/libvirt. Processes
are visible everywhere, so a test can look into the QEMU of either host. The hosts are called
'source' and 'destination'. Root can log in to the destination by ssh, so qemu+ssh:// works.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .command import TIMEOUT_S

_ADDRESSES: Final = {"source": "192.0.2.1", "destination": "192.0.2.2"}
_PROGRAMS: Final = ("libvirtd", "virsh", "ip", "unshare", "nsenter", "sshd", "ssh-keygen")
_PATH: Final = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# libvirt looks for cgroups in /proc/self/mounts, and for network interfaces in /sys. A /dev/kvm
# that libvirt may open, but with which QEMU does not work, makes it ask QEMU for its capabilities
# again and again. A file in a read-only mount cannot be opened for writing, not even by root.
_START: Final = """
folder=$1
hostname "$2"
for place in /run /etc/libvirt /etc/ssh \
    /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /var/tmp; do
    mkdir -p "$folder$place"
    mount --bind "$folder$place" $place
done
mount --bind "$folder/hosts" /etc/hosts
if [ -e /dev/kvm ]; then mount --bind -o ro "$folder/hosts" /dev/kvm; fi
umount --recursive /sys/fs/cgroup 2>/dev/null || true
mount -t sysfs none /sys
mkdir /run/sshd
ip link set lo up
exec libvirtd
"""
_CONFIGURATION: Final = {
    "etc/libvirt/libvirtd.conf": 'auth_unix_rw = "none"\nlog_outputs = "3:stderr"\n',
    "etc/libvirt/qemu.conf": (
        'stdio_handler = "file"\nsecurity_driver = "none"\nnamespaces = []\n'
    ),
    "etc/ssh/ssh_config": (
        "IdentityFile /etc/ssh/key\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\n"
        "BatchMode yes\nLogLevel ERROR\n"
    ),
    "etc/ssh/sshd_config": (
        "HostKey /etc/ssh/key\nAuthorizedKeysFile /etc/ssh/key.pub\nStrictModes no\n"
        "PermitRootLogin yes\nPidFile none\nSubsystem sftp internal-sftp\n"
    ),
}

_DOMAIN: Final = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type><kernel>/var/lib/libvirt/kernel</kernel></os>
  <devices><emulator>{emulator}</emulator></devices>
</domain>
"""


def what_is_missing() -> list[str]:
    """Return what this machine is missing of what two hosts need."""
    found = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if found:
        return [*found, "(.ci/run installs them)"]
    trial = ["unshare", "--mount", "--net", "--uts", "true"]
    if subprocess.run(trial, stderr=subprocess.DEVNULL, check=False).returncode:
        return ["the permission to make namespaces (root with CAP_SYS_ADMIN)"]
    return []


@dataclass(frozen=True)
class Host:
    """A host: its name, the folder with its files, and the process of its libvirtd."""

    name: str
    folder: Path
    libvirtd: subprocess.Popen[bytes]

    @property
    def connection(self) -> str:
        """The connection URI of its libvirtd for processes that run outside the host."""
        return f"qemu+unix:///system?socket={self.folder}/run/libvirt/libvirt-sock"

    def domain(self, name: str) -> str:
        """Return the URI of a domain for processes that run outside the host."""
        return self.connection.replace("?", f"/{name}?")

    @property
    def inside(self) -> list[str]:
        """The command that runs another command on the host."""
        return ["nsenter", "--target", str(self.libvirtd.pid), "--mount", "--net", "--uts"]

    def run(self, *command: str, ok: bool = True) -> str:
        """Run `command` on the host, and return its output and errors.

        The command must succeed, unless `ok` is false: then it must fail.
        """
        done = subprocess.run(
            [*self.inside, *command],
            env={**os.environ, "PATH": _PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert (done.returncode == 0) == ok, (self.name, command, done.stdout, self.log())
        return done.stdout

    def log(self) -> str:
        """Return libvirtd's log."""
        return (self.folder / "log").read_text()

    def destroy_domains(self) -> None:
        """End the QEMUs of the host, if it has any."""
        for name in self.run("virsh", "list", "--name").split():
            self.run("virsh", "destroy", name)


@dataclass(frozen=True)
class Hosts:
    """Two hosts, and the domains that were defined on the first."""

    source: Host
    destination: Host

    def define(self, name: str, kernel: Path, emulator: Path) -> None:
        """Define a domain on the source, with 64 MiB of RAM, and `kernel` as its guest."""
        for host in (self.source, self.destination):
            # libvirt gives the files of a domain to QEMU's user.
            shutil.copy(kernel, host.folder / "var/lib/libvirt/kernel")
        xml = self.source.folder / "var/lib/libvirt/domain.xml"
        xml.write_text(_DOMAIN.format(name=name, emulator=emulator))
        self.source.run("virsh", "define", "/var/lib/libvirt/domain.xml")


@contextlib.contextmanager
def libvirt_hosts(folder: Path) -> Iterator[Hosts]:
    """Run two hosts, with their files in `folder`; its path must be short, as it has sockets."""
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    # QEMU's capabilities are the same on both hosts, and take libvirtd seconds to find out.
    (folder / "destination/var").mkdir(parents=True)
    (folder / "destination/var/cache").symlink_to(folder / "source/var/cache")
    with contextlib.ExitStack() as running:
        hosts = []
        for number, name in enumerate(_ADDRESSES, start=1):
            _write_files(folder / name, number)
            for file in (key, key.with_suffix(".pub")):
                shutil.copy(file, folder / name / "etc/ssh")
            hosts.append(running.enter_context(_host(folder / name, name)))
        source, destination = hosts
        _connect(source, destination)
        running.enter_context(_ssh_server(destination))
        yield Hosts(source, destination)


def _write_files(folder: Path, number: int) -> None:
    for file, text in _CONFIGURATION.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    # libvirt refuses to migrate to a host with the same UUID.
    with (folder / "etc/libvirt/libvirtd.conf").open("a") as configuration:
        configuration.write(f'host_uuid = "{number:08x}-1234-4567-89ab-0123456789ab"\n')
    hosts = [f"{address} {host}" for host, address in _ADDRESSES.items()]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))


@contextlib.contextmanager
def _host(folder: Path, name: str) -> Iterator[Host]:
    with (folder / "log").open("wb") as log:
        libvirtd = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "TERM"),
                *("unshare", "--mount", "--net", "--uts"),
                *("sh", "-euc", _START, "sh", os.fspath(folder), name),
            ],
            env={**os.environ, "PATH": _PATH},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    host = Host(name, folder, libvirtd)
    try:
        _wait_for(folder / "run/libvirt/libvirt-sock", host)
        try:
            yield host
        finally:
            host.destroy_domains()  # without libvirtd, they would run on
    finally:
        libvirtd.terminate()
        libvirtd.wait(TIMEOUT_S)


def _wait_for(file: Path, host: Host) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not file.exists():
        assert host.libvirtd.poll() is None, host.log()
        assert time.monotonic() < deadline, f"no {file}: {host.log()}"
        time.sleep(0.02)


def _connect(source: Host, destination: Host) -> None:
    """Connect the hosts' networks by a pair of interfaces."""
    ends = [
        ("eth0", "netns", str(host.libvirtd.pid), "address", f"02:00:00:00:00:0{number}")
        for number, host in enumerate((source, destination), start=1)
    ]
    command = ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]]
    subprocess.run(command, env={**os.environ, "PATH": _PATH}, check=True)
    for host in (source, destination):
        host.run("ip", "address", "add", f"{_ADDRESSES[host.name]}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")


@contextlib.contextmanager
def _ssh_server(host: Host) -> Iterator[None]:
    log = host.folder / "ssh-log"
    sshd = shutil.which("sshd", path=_PATH)  # sshd starts itself again, by its whole path
    server = subprocess.Popen([*host.inside, str(sshd), "-D", "-E", os.fspath(log)])
    try:
        while not (log.exists() and "Server listening" in log.read_text()):
            assert server.poll() is None, log.read_text()
            time.sleep(0.02)
        yield
    finally:
        server.terminate()
        server.wait(TIMEOUT_S)
