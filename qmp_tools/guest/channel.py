"""What the guest tells of itself over its second serial port, and the few things it is told."""

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
"""Begin to use the pages that are written only once."""
START_LAST: Final = b"l"
"""Begin to use, now and then, those of them that are kept for the end of the migration."""
RECHECK: Final = b"s"
"""Check every page in RAM again."""
QUIET: Final = b"q"
"""Stop the vCPU's own steady writing."""
USE_NEW_MEMORY: Final = b"m"
"""Let the write-once pages lie in memory that has been plugged, which the guest waits for."""
AGAIN: Final = b"a"
"""Get ready for another migration: no write-once page has been used, and the vCPU writes steadily."""

_MOST_ERROR_MESSAGES: Final = 8
_FRAMES_BEFORE_ECHO: Final = 5_000
"""A network that sends frames back has sent one of so many. Each thread of the guest sends 30 a
second while none comes."""
_NEEDS_ECHO: Final = (
    "the guest's workload checks what the network writes into its RAM, so the network must send "
    "every frame back (see docs/third-party-devices.md)"
)
_MOST_VERBS: Final = 64
"""Far more than guests have. What comes is kept by verb, and a guest must not fill our memory."""
_MOST_DIGITS: Final = 20
_SHOWN_CHARACTERS: Final = 200


class GuestError(UntestableError):
    """The guest gave up, or went silent."""


class GuestGaveUpError(GuestError):
    """The guest said that it cannot go on; it switches its machine off."""


class GuestLateError(GuestError, WaitTimeoutError):
    """The guest has not done in time what it was waited for."""


class NoEchoError(GuestLateError):
    """The network has sent none of the guest's frames back."""


@dataclass(frozen=True)
class GuestReport:
    """One line of the guest: a verb, and what it says by key."""

    verb: str
    values: dict[str, str]


def parse_line(line: str) -> GuestReport:
    """Parse ``verb key=value key="two words"``.

    Raises:
        UntestableError: the line is nothing that a guest of ours says.
    """
    try:
        verb, *pairs = shlex.split(line)
        values = dict(pair.split("=", 1) for pair in pairs)
    except ValueError:
        raise UntestableError(
            f"the guest said something unintelligible: {line[:_SHOWN_CHARACTERS]!r}"
        ) from None
    return GuestReport(verb, values)


class GuestChannel:
    """Reads the guest's lines as they come.

    `latest` holds the last report of each verb; `error_messages` the first error lines; `hold_pages`
    the guest-physical addresses of the pages that nothing in the guest uses (guests/workload.h).
    `timeout_s` bounds each wait.
    """

    def __init__(self, qemu: OwnedQemu, timeout_s: float) -> None:
        self.latest: dict[str, GuestReport] = {}
        self.error_messages: list[str] = []
        self.hold_pages: list[int] = []
        self._qemu = qemu
        self._timeout_s = timeout_s
        self._fatal: str | None = None
        self._news = asyncio.Condition()
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while line := await self._qemu.report.readline():
                    await self._hear(printable(line.decode(errors="replace").strip()))
        except ValueError:  # asyncio's LimitOverrunError comes as one
            await self._despair("it said a line without an end")
        except UntestableError as error:
            await self._despair(str(error))

    async def _hear(self, text: str) -> None:
        if not text:
            return
        report = parse_line(text)
        if report.verb not in self.latest and len(self.latest) == _MOST_VERBS:
            raise UntestableError(f"the guest said more than {_MOST_VERBS} kinds of things")
        async with self._news:
            self.latest[report.verb] = report
            if report.verb == "error" and len(self.error_messages) < _MOST_ERROR_MESSAGES:
                self.error_messages.append(text)
            elif report.verb == "hold":
                self.hold_pages += self._run_of_pages(report)
            elif report.verb == "fatal":
                self._fatal = report.values.get("message", text)
            self._news.notify_all()

    async def _despair(self, why: str) -> None:
        async with self._news:
            self._fatal = why
            self._news.notify_all()

    def _run_of_pages(self, report: GuestReport) -> range:
        gpa, pages = report.values.get("gpa", ""), report.values.get("pages", "")
        if not (
            re.fullmatch("0x[0-9a-f]{1,16}", gpa)
            and re.fullmatch("[0-9]{1,8}", pages)
            and len(self.hold_pages) + int(pages) <= MOST_HOLD_PAGES
        ):
            raise UntestableError(f"the guest reported no hold pages, but gpa={gpa} pages={pages}")
        return range(int(gpa, 16), int(gpa, 16) + int(pages) * PAGE_BYTES, PAGE_BYTES)

    def number(self, verb: str, key: str) -> int:
        """The number `key` of the last `verb` report; 0 before the first.

        Raises:
            GuestError: it is no number.
        """
        report = self.latest.get(verb)
        value = report.values.get(key, "0") if report else "0"
        if not (value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS):
            raise GuestError(
                f"the guest of the {self._qemu.process.name} said {value[:_SHOWN_CHARACTERS]!r} "
                f"where {verb} has the number {key}"
            )
        return int(value)

    async def wait_for(
        self, reached: Callable[[], bool], what: str, timeout_s: float | None = None
    ) -> None:
        """Wait until `reached`; `what` says in words what that is.

        `timeout_s` is a bound lower than the channel's own.

        Raises:
            GuestGaveUpError: the guest gave up.
            NoEchoError: the network that it needs sends no frame back.
            GuestLateError: it takes longer.
        """
        bound_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)

        def late() -> GuestLateError:
            name = self._qemu.process.name
            if self._frames_without_echo:
                why = "; ".join([*self._so_far(), _NEEDS_ECHO])
                return NoEchoError(f"the guest of the {name} has not {what}: {why}")
            wait = f"the guest of the {name} has not {what} within {bound_s:g} s"
            lines = [wait, *self._so_far(), log_tail(self._qemu.console)]
            return GuestLateError("\n".join(lines).rstrip())

        async with bounded(bound_s, late), self._news:
            while not reached() and self._fatal is None:
                if self._frames_without_echo >= _FRAMES_BEFORE_ECHO:
                    raise late()
                await self._news.wait()
        self._raise_if_gave_up()

    @property
    def _frames_without_echo(self) -> int:
        """How many frames the guest has sent, where none has come back."""
        return 0 if self.number("frames", "received") else self.number("frames", "sent")

    def _so_far(self) -> list[str]:
        """What the guest has reported of its requests, and of its network if it has one."""
        told = []
        if "progress" in self.latest:
            finished, begun = (self.number("progress", key) for key in ("requests", "under_way"))
            told.append(
                f"{finished} of its requests are finished, and {begun} are not answered yet"
            )
        if "frames" in self.latest:
            sent, received = (self.number("frames", key) for key in ("sent", "received"))
            told.append(f"the guest sent {sent} frames and received {received} of them")
        return told

    async def hear_last_words(self) -> None:
        """Where the guest's QEMU has ended, read what the guest said before that.

        Raises:
            GuestGaveUpError: it said why it gives up.
        """
        if self._qemu.process.died.done():
            # It ends with the socket, whose other end is closed.
            await asyncio.wait([self._reading], timeout=self._timeout_s)
            self._raise_if_gave_up()

    def _raise_if_gave_up(self) -> None:
        if self._fatal is not None:
            raise GuestGaveUpError(
                f"the guest of the {self._qemu.process.name} gave up: {self._fatal}"
            )

    async def tell(self, command: bytes) -> None:
        """Send the guest a command."""
        self._qemu.report_input.write(command)
        with contextlib.suppress(ConnectionError):  # its QEMU has gone, which others notice
            await self._qemu.report_input.drain()

    def close(self) -> None:
        """Read no more."""
        self._reading.cancel()
