"""The ways in which a guest migrates: one entry of `WAYS` each.

An entry says by which `Stream` the bytes get across, which capabilities and parameters both QEMUs
are given, what must be there beforehand (`prepare`), and how query-migrate shows that the way was
really taken. Which of it a QEMU version has is found out by asking for it: what it refuses before
the migration begins it lacks (`UnsupportedWayError`), and what goes wrong later is a failure.
"""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UnsupportedError

from ..qemu.qmp import Qmp
from .certificates import SERVER_NAME, make_certificates

LOCALHOST: Final = "127.0.0.1"
# QEMU hands out its bandwidth in portions of a tenth of a second. With these, a portion is less
# than what the guest keeps dirtying (Workload.churn), so no pass can be over in no time: not the
# ones right behind the first (seen: nine passes in 50 ms), and not those while it is held.
FIRST_PASS_BYTES_PER_S: Final = 128 << 20
# Also for the first pass of a way whose stream is so small, or written so fast, that much of a
# larger portion would be left for the passes behind it (seen: 8 channels, over after 0.2 s).
HELD_BYTES_PER_S: Final = 32 << 20


class UnsupportedWayError(UnsupportedError):
    """A QEMU lacks the way, or refuses it for this device; or dmaproof cannot go it."""


@dataclass(frozen=True)
class Ends:
    """Both QEMUs of a migration, and the `folder` and `host` that are theirs for its stream.

    `printed()` is what they have said elsewhere than on QMP. `joined()` waits until the destination
    answers on QMP, where that is only during the migration.
    """

    source: Qmp
    destination: Qmp
    folder: Path
    host: str = LOCALHOST
    printed: Callable[[], str] = lambda: ""
    joined: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True)
class Stream:
    """Where the destination reads the stream and the source writes it, as migration URIs.

    With `saved_first` the source writes all of it before the destination is told to read.
    `written_to` is asked when the destination listens, unless `saved_first`.
    """

    read_from: Callable[[Ends], str]
    written_to: Callable[[Ends], Awaitable[str]]
    saved_first: bool = False


def _socket(uri: Callable[[Ends], str]) -> Stream:
    async def written_to(ends: Ends) -> str:
        if not uri(ends).startswith("tcp:"):
            return uri(ends)
        address = (await ends.destination.execute("query-migrate"))["socket-address"][0]
        return f"tcp:{address['host']}:{address['port']}"

    return Stream(uri, written_to)


def _saved(reading: Callable[[Path], str], writing: Callable[[Path], str]) -> Stream:
    def file(ends: Ends) -> Path:
        return ends.folder / "saved-guest"

    async def written_to(ends: Ends) -> str:
        return writing(file(ends))

    return Stream(lambda ends: reading(file(ends)), written_to, saved_first=True)


_UNIX: Final = _socket(lambda ends: f"unix:{ends.folder / 'destination-migration.sock'}")
_TCP: Final = _socket(lambda ends: f"tcp:{ends.host}:0")
_FD: Final = _socket(lambda ends: "fd:migration")
_EXEC: Final = _saved(
    lambda file: f"exec:cat <{shlex.quote(str(file))}",
    lambda file: f"exec:cat >{shlex.quote(str(file))}",
)
# QEMU saves a background snapshot without a limit of its own. This reads some 12 MiB a second.
_SLOW_CAT: Final = (
    "import sys, time\n"
    "while piece := sys.stdin.buffer.read(1 << 18):\n"
    "    sys.stdout.buffer.write(piece)\n"
    "    time.sleep(0.02)\n"
)
_EXEC_SLOWLY: Final = _saved(
    lambda file: f"exec:cat <{shlex.quote(str(file))}",
    lambda file: f"exec:{shlex.join((sys.executable, '-c', _SLOW_CAT))} >{shlex.quote(str(file))}",
)
_FILE: Final = _saved(lambda file: f"file:{file}", lambda file: f"file:{file}")


async def _nothing(ends: Ends) -> None:
    pass


async def _hand_over_socket_pair(ends: Ends) -> None:
    for qmp, end in zip((ends.source, ends.destination), socket.socketpair(), strict=True):
        with end:
            await qmp.send_fd(end.fileno(), "migration")


async def _add_credentials(ends: Ends) -> None:
    await make_certificates(ends.folder)
    for qmp, endpoint in ((ends.source, "client"), (ends.destination, "server")):
        await qmp.execute(
            "object-add",
            qom_type="tls-creds-x509",
            id="migration-tls",
            dir=str(ends.folder),
            endpoint=endpoint,
            verify_peer=True,
        )


class FirstAttempt(Enum):
    """How a migration that comes before the real one, to a destination of its own, fails."""

    CANCELLED = "cancelled in precopy"
    DESTINATION_KILLED = "its destination killed in precopy"
    DESTINATION_KILLED_AT_SWITCHOVER = "its destination killed when the guest stood still"


def channel(folder: Path, kind: str) -> dict[str, Any]:
    """The migration channel `kind`, 'main' or 'cpr', over a socket in `folder`."""
    address = {"transport": "socket", "type": "unix", "path": str(channel_path(folder, kind))}
    return {"channel-type": kind, "addr": address}


def channel_path(folder: Path, kind: str) -> Path:
    """Where the destination listens for channel `kind`."""
    return folder / f"{kind}-channel.sock"


class Plug(Enum):
    """What is plugged into the running guest, for it to use at once."""

    DIMM = "a DIMM before each migration"
    DISK = "its disk"


@dataclass(frozen=True)
class Way:
    """How a guest migrates.

    `capabilities` and `parameters` (named as in QMP) are set on both sides, `prepare` is carried
    out in between. `shown_by` is the path of a member of query-migrate ('ram.multifd-bytes') that
    is more than 0 once the way has been used: only then may the migration end. `refusal` is what
    QEMU must say to the capabilities with some devices, for a way that is not gone with any other
    either: whether it is refused is all that can be shown. `first_attempt` is a
    migration that fails once every page has been sent; the source's guest must go on as if nothing
    had been. `migrations` is how often the guest migrates, there and back, and `plug` what is
    plugged into it before; `machine` is the machine type where no other is asked for, and
    `machine_options` what any of them is told besides. With `stands_still` QEMU stops the guest
    before anything moves. A `snapshot` is of the moment at which it was begun, and the guest runs
    on at the source. With `cpr_channel` the destination takes the source's file descriptors over a
    channel of its own, and answers on QMP only when it has them; `in_place` it is the same process,
    which executes QEMU anew.
    `first_pass_bytes_per_s`, and from when the way has shown `held_bytes_per_s`, keep the migration
    from ending before it may.
    """

    summary: str
    stream: Stream = _UNIX
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Ends], Awaitable[None]] = _nothing
    shown_by: str | None = None
    refusal: str | None = None
    first_attempt: FirstAttempt | None = None
    migrations: int = 1
    plug: Plug | None = None
    machine: str = "q35"
    machine_options: str = ""
    stands_still: bool = False
    snapshot: bool = False
    cpr_channel: bool = False
    in_place: bool = False
    first_pass_bytes_per_s: int = FIRST_PASS_BYTES_PER_S
    held_bytes_per_s: int = HELD_BYTES_PER_S

    @property
    def only_in_proofs(self) -> bool:
        """Whether it takes more than a migration of just any guest with just any device."""
        return bool(
            self.first_attempt
            or self.migrations > 1
            or self.plug
            or self.stands_still
            or self.snapshot
            or self.refusal
        )

    @property
    def holds_precopy(self) -> bool:
        """Whether the guest runs at the source while its memory moves, for as long as is wanted."""
        return not (self.stands_still or self.snapshot)

    @property
    def repeatable(self) -> bool:
        """Whether a guest that has gone this way can go back the same way, and so on."""
        return not (self.plug or self.stands_still or self.snapshot or self.refusal)

    def is_shown_in(self, answer: Mapping[str, Any]) -> bool:
        """Whether an answer of query-migrate shows that the way has been used."""
        if self.shown_by is None:
            return True
        value: Any = reduce(lambda part, name: part.get(name, {}), self.shown_by.split("."), answer)
        return bool(value)


def _multifd(channels: int, compression: str | None = None) -> Way:
    return Way(
        f"a Unix socket for each of {channels} channels"
        + (f", compressed by {compression}" if compression else ""),
        capabilities=("multifd",),
        parameters={
            "multifd-channels": channels,
            **({"multifd-compression": compression} if compression else {}),
        },
        shown_by="ram.multifd-bytes",
        first_pass_bytes_per_s=HELD_BYTES_PER_S,
    )


WAYS: Final[dict[str, Way]] = {
    "unix": Way("a Unix socket in the run's private folder"),
    "tcp": Way("TCP, on a free port", _TCP),
    "tls": Way(
        "TCP under TLS: both sides show certificates, made for the run; needs openssl",
        _TCP,
        parameters={"tls-creds": "migration-tls", "tls-hostname": SERVER_NAME},
        prepare=_add_credentials,
    ),
    "fd": Way("a socket pair, handed to both QEMUs", _FD, prepare=_hand_over_socket_pair),
    "exec": Way("saved by a shell command into a file, restored by another", _EXEC),
    "mapped-ram": Way(
        "saved into a file where each page has its place, then restored",
        _FILE,
        capabilities=("mapped-ram",),
        first_pass_bytes_per_s=HELD_BYTES_PER_S,
    ),
    "mapped-ram-multifd": Way(
        "the same, written and read by 4 threads",
        _FILE,
        capabilities=("mapped-ram", "multifd"),
        parameters={"multifd-channels": 4},
        shown_by="ram.multifd-bytes",
        first_pass_bytes_per_s=HELD_BYTES_PER_S,
    ),
    "multifd-1": _multifd(1),
    "multifd-4": _multifd(4),
    "multifd-8": _multifd(8),
    "multifd-zlib": _multifd(4, "zlib"),
    "multifd-zstd": _multifd(4, "zstd"),
    "xbzrle": Way(
        "pages sent before go as their difference",
        capabilities=("xbzrle",),
        shown_by="xbzrle-cache.pages",
        # A dirty page is some 20 bytes then; the second pass still sends and caches whole pages.
        held_bytes_per_s=256 << 10,
    ),
    "auto-converge": Way(
        "the vCPUs are slowed down",
        capabilities=("auto-converge",),
        # The least that there is: throttled as soon as the guest dirties anything again.
        parameters={"throttle-trigger-threshold": 1},
        shown_by="cpu-throttle-percentage",
    ),
    "return-path": Way("the destination answers the source", capabilities=("return-path",)),
    "switchover-ack": Way(
        "the destination says when the source may stop",
        capabilities=("return-path", "switchover-ack"),
    ),
    "postcopy-ram": Way(
        "pages fetched on demand: only whether QEMU refuses it for a device without PAGEFAULT",
        capabilities=("postcopy-ram",),
        refusal="not capable of postcopy",
    ),
    "retry": Way(
        "cancelled in the middle of precopy, and migrated again",
        first_attempt=FirstAttempt.CANCELLED,
    ),
    "destination-killed": Way(
        "the destination killed in the middle of precopy, and migrated to a new one",
        first_attempt=FirstAttempt.DESTINATION_KILLED,
    ),
    "destination-killed-late": Way(
        "the same when the source stood still already, and all but the last pages had been sent",
        first_attempt=FirstAttempt.DESTINATION_KILLED_AT_SWITCHOVER,
    ),
    "ping-pong": Way("there, back and there again, each time verified", migrations=3),
    "background-snapshot": Way(
        "the moment saved while the guest runs on; the device writes past QEMU's protection of it",
        _EXEC_SLOWLY,
        capabilities=("background-snapshot",),
        snapshot=True,
    ),
    "cpr-reboot": Way(
        "stopped, saved into a file, and restored: how a guest outlives a new kernel of its host",
        _FILE,
        parameters={"mode": "cpr-reboot"},
        stands_still=True,
    ),
    "cpr-transfer": Way(
        "stopped, and its memory handed to another QEMU on the same host without a copy",
        parameters={"mode": "cpr-transfer"},
        machine_options=",aux-ram-share=on",
        stands_still=True,
        cpr_channel=True,
    ),
    "cpr-exec": Way(
        "stopped, and QEMU executed anew in the same process, which keeps the memory",
        _FILE,
        parameters={"mode": "cpr-exec"},
        machine_options=",aux-ram-share=on",
        stands_still=True,
        in_place=True,
    ),
    "memory-hotplug": Way(
        "a DIMM plugged and used, there; another plugged and used, and back",
        migrations=2,
        plug=Plug.DIMM,
    ),
    "device-hotplug": Way(
        "the disk plugged into the running guest",
        plug=Plug.DISK,
        machine="pc",  # a q35 takes devices only behind a port, and gives them no address there
    ),
}
