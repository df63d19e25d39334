"""Read the guest's reports over its second serial port, and send it commands."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dmaproof.errors import UntestableError, WaitTimeoutError, printable
from dmaproof.units import PAGE_BYTES

from ..host.process import log_tail
from ..host.timeout import bounded
from ..qemu.qemu import OwnedQemu
from .workload import MOST_HOLD_PAGES

START_WRITE_ONCE: Final = b"o"
"""Begin to use the write-once pages."""
START_LAST: Final = b"l"
"""Begin to use, one now and then, the write-once pages reserved for the end of the migration."""
RECHECK: Final = b"s"
"""Check every page in RAM again."""
QUIET: Final = b"q"
"""Stop the vCPU's own continuous writing (churn)."""
USE_NEW_MEMORY: Final = b"m"
"""Wait for plugged memory, and put the write-once pages there."""
DECLARE: Final = b"w"
"""Declare the pages that the guest may write itself."""
RESET_DEVICE: Final = b"d"
"""Reset the device and initialise it again."""
RELOAD_DRIVER: Final = b"u"
"""Remove the device's driver and load it again."""
RESET_MACHINE: Final = b"b"
"""Reset the machine."""
LEAVE_OUT_HALF: Final = b"h"
"""Leave out the first half of the write-once pages, which were used before a reboot."""
AGAIN: Final = b"a"
"""Get ready for another migration: make all write-once pages unused, and restart the churn."""

LONGER_TIMEOUT: Final = "a busy or slow host needs a longer --timeout"

_BOOT: Final = "boot"
"""The guest's first report."""
_MOST_ERROR_MESSAGES: Final = 8
_FRAMES_BEFORE_ECHO: Final = 20_000
"""A network that sends frames back has returned at least one of this many frames. Each thread of
the guest sends 150 frames a second while it receives none."""
_NEEDS_ECHO: Final = (
    "the guest checks the frames that the network writes into its RAM, so the network must send "
    "every frame back (see docs/third-party-devices.md)"
)
_MOST_VERBS: Final = 64
"""Far more than guests use. A report of each verb is kept, and a guest must not fill the memory."""
_MOST_OWN_RANGES: Final = 1 << 16
"""The buffer of the Linux guest is far smaller, and no more ranges are between its pages."""
_MOST_PAGES: Final = 1 << 40
"""More than any guest's RAM."""
_MOST_DIGITS: Final = 20
_SHOWN_CHARACTERS: Final = 200


class GuestError(UntestableError):
    """The guest gave up, or its reports cannot be understood."""


class GuestGaveUpError(GuestError):
    """The guest reported that it cannot continue; it switches its machine off."""


class GuestLateError(GuestError, WaitTimeoutError):
    """The guest has not reached a state in time."""


class NoEchoError(GuestLateError):
    """The network has not sent any of the guest's frames back."""


@dataclass(frozen=True)
class GuestReport:
    """One line of the guest: a verb, and its values by key."""

    verb: str
    values: dict[str, str]


def parse_line(line: str) -> GuestReport:
    """Parse ``verb key=value key="two words"``.

    Raises:
        UntestableError: the line does not have this form.
    """
    try:
        verb, *pairs = shlex.split(line)
        values = dict(pair.split("=", 1) for pair in pairs)
    except ValueError:
        raise UntestableError(
            f"the guest sent a line that is not 'verb key=value': {line[:_SHOWN_CHARACTERS]!r}"
        ) from None
    return GuestReport(verb, values)


class GuestChannel:
    """Reads the guest's lines as they arrive, and sends commands.

    `latest` holds the last report of each verb, and `error_messages` the first error lines.
    `hold_pages` has the guest-physical addresses of the pages that nothing in the guest uses.
    `own_pages` has ranges of page numbers (GPA / PAGE_BYTES): the pages that the guest may write
    itself, as far as it has declared them (`DECLARE`). `earlier_errors` counts the errors that the
    guest found before it was rebooted. `timeout_s` bounds each wait. `remedy` is what helps a late
    guest.
    """

    def __init__(self, qemu: OwnedQemu, timeout_s: float, remedy: str = LONGER_TIMEOUT) -> None:
        self.latest: dict[str, GuestReport] = {}
        self.error_messages: list[str] = []
        self.hold_pages: list[int] = []
        self.own_pages: list[range] = []
        self.earlier_errors = 0
        self._errors_seen = 0
        self._awaits_boot = False
        self._qemu = qemu
        self._timeout_s = timeout_s
        self._remedy = remedy
        self._fatal: str | None = None
        self._reported = asyncio.Condition()
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while line := await self._qemu.report.readline():
                    await self._take(printable(line.decode(errors="replace").strip()))
        except ValueError:  # readline() turns asyncio's LimitOverrunError into a ValueError
            await self._give_up("the guest sent a line that is too long")
        except UntestableError as error:
            await self._give_up(str(error))

    async def _take(self, text: str) -> None:
        self._awaits_boot = self._awaits_boot and text != _BOOT
        if self._awaits_boot or not text:
            return
        report = parse_line(text)
        if report.verb not in self.latest and len(self.latest) == _MOST_VERBS:
            raise UntestableError(f"the guest sent reports with more than {_MOST_VERBS} verbs")
        async with self._reported:
            self.latest[report.verb] = report
            if report.verb == "error":
                self._errors_seen += 1
                if len(self.error_messages) < _MOST_ERROR_MESSAGES:
                    self.error_messages.append(text)
            elif report.verb == "hold":
                pages = _pages_of(report, MOST_HOLD_PAGES - len(self.hold_pages))
                self.hold_pages += [page * PAGE_BYTES for page in pages]
            elif report.verb == "own":
                left = _MOST_OWN_RANGES - len(self.own_pages)
                self.own_pages.append(_pages_of(report, _MOST_PAGES if left else 0))
            elif report.verb == "fatal":
                self._fatal = report.values.get("message", text)
            self._reported.notify_all()

    def await_boot(self) -> None:
        """Forget the guest's reports, and ignore further ones until the guest boots again.

        The machine must be reset after this call. A reset may interrupt a line.
        """
        self._awaits_boot = True
        self.earlier_errors += max(self._errors_seen, self.number("progress", "errors"))
        self._errors_seen = 0
        self.latest.clear()
        self.hold_pages.clear()

    async def _give_up(self, why: str) -> None:
        async with self._reported:
            self._fatal = why
            self._reported.notify_all()

    def number(self, verb: str, key: str) -> int:
        """Return the number `key` of the last `verb` report; 0 before the first report.

        Raises:
            GuestError: the value is not a number.
        """
        report = self.latest.get(verb)
        value = report.values.get(key, "0") if report else "0"
        if not (value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS):
            raise GuestError(
                f"the guest of the {self._qemu.process.name} sent {key}="
                f"{value[:_SHOWN_CHARACTERS]!r} in a {verb!r} report; expected a number"
            )
        return int(value)

    async def wait_for(
        self, reached: Callable[[], bool], what: str, timeout_s: float | None = None
    ) -> None:
        """Wait until `reached` returns True.

        Args:
            reached: called after each report of the guest.
            what: what the guest is to do, as a participle for messages: 'become ready'.
            timeout_s: the bound of this wait in seconds, if less than the channel's own.

        Raises:
            GuestGaveUpError: the guest gave up.
            NoEchoError: the guest's network sends no frame back.
            GuestLateError: the wait timed out.
        """
        bound_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)

        def late() -> GuestLateError:
            name = self._qemu.process.name
            if self._frames_without_echo:
                why = "; ".join([*self._so_far(), _NEEDS_ECHO])
                return NoEchoError(f"the guest of the {name} has not {what}: {why}")
            wait = f"the guest of the {name} has not {what} within {bound_s:g} s; {self._remedy}"
            lines = [wait, *self._so_far(), log_tail(self._qemu.console)]
            return GuestLateError("\n".join(lines).rstrip())

        async with bounded(bound_s, late), self._reported:
            while not reached() and self._fatal is None:
                if self._frames_without_echo >= _FRAMES_BEFORE_ECHO:
                    raise late()
                await self._reported.wait()
        self._raise_if_gave_up()

    @property
    def _frames_without_echo(self) -> int:
        """The number of frames that the guest has sent; 0 if any frame has come back."""
        return 0 if self.number("frames", "received") else self.number("frames", "sent")

    def _so_far(self) -> list[str]:
        """Return what the guest has reported about its requests and its network."""
        lines = []
        if "progress" in self.latest:
            finished, begun = (self.number("progress", key) for key in ("requests", "under_way"))
            lines.append(
                f"{finished} of the guest's requests are finished, and {begun} are unanswered"
            )
        if "frames" in self.latest:
            sent, received = (self.number("frames", key) for key in ("sent", "received"))
            lines.append(f"the guest sent {sent} frames and received {received} of them")
        return lines

    async def read_last_lines(self) -> None:
        """Read the lines that the guest sent before its QEMU ended; do nothing while QEMU runs.

        Raises:
            GuestGaveUpError: the guest reported why it gave up.
        """
        if self._qemu.process.died.done():
            # QEMU has closed its end of the socket, so reading ends.
            await asyncio.wait([self._reading], timeout=self._timeout_s)
            self._raise_if_gave_up()

    def _raise_if_gave_up(self) -> None:
        if self._fatal is not None:
            raise GuestGaveUpError(
                f"the guest of the {self._qemu.process.name} gave up: {self._fatal}"
            )

    async def ask(
        self, command: bytes, verb: str, what: str, timeout_s: float | None = None
    ) -> None:
        """Send a command, and wait until the guest reports `verb`; see `wait_for`.

        Raises:
            UntestableError: as for `wait_for`.
        """
        self.latest.pop(verb, None)
        await self.send(command)
        await self.wait_for(lambda: verb in self.latest, what, timeout_s)

    async def send(self, command: bytes) -> None:
        """Send a command to the guest."""
        self._qemu.report_input.write(command)
        with contextlib.suppress(ConnectionError):  # QEMU has ended; `QemuPair.guarded` reports it
            await self._qemu.report_input.drain()

    def close(self) -> None:
        """Stop reading."""
        self._reading.cancel()


def _pages_of(report: GuestReport, most: int) -> range:
    """Return the numbers of the guest-physical pages that a report declares.

    Raises:
        UntestableError: the report is not of this form, or declares more than `most` pages.
    """
    gpa, pages = report.values.get("gpa", ""), report.values.get("pages", "")
    if not (
        re.fullmatch("0|0x[0-9a-f]{1,16}", gpa)
        and re.fullmatch("[0-9]{1,13}", pages)
        and int(pages) <= most
    ):
        raise UntestableError(
            f"the guest sent an invalid {report.verb!r} report (gpa={gpa} pages={pages}); expected "
            f"an address in hexadecimal and at most {most} more pages"
        )
    first = int(gpa, 16) // PAGE_BYTES
    return range(first, first + int(pages))
