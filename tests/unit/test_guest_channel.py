"""The guest's reports: valid ones are used, invalid ones are reported, and none is executed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.guest.channel import (
    GuestChannel,
    GuestError,
    GuestLateError,
    NoEchoError,
    parse_line,
)
from qmp_tools.host.process import log_tail
from qmp_tools.qemu.qemu import OwnedQemu


class FakeQemu:
    """A QEMU whose guest sends `said`; `commands` are those that the guest has received."""

    def __init__(self, said: bytes) -> None:
        self.report = asyncio.StreamReader()
        self.report.feed_data(said)
        self.report_input = self
        self.process = SimpleNamespace(name="source QEMU")
        self.console = Path("/nowhere")
        self.commands: list[bytes] = []

    def write(self, command: bytes) -> None:
        self.commands.append(command)

    async def drain(self) -> None:
        pass

    def listen(self, timeout_s: float) -> GuestChannel:
        """Open a channel to the guest."""
        return GuestChannel(cast(OwnedQemu, self), timeout_s)


def listen_to(said: bytes, timeout_s: float) -> GuestChannel:
    """Open a channel to a guest that sends `said`."""
    return FakeQemu(said).listen(timeout_s)


async def channel_of(said: bytes) -> GuestChannel:
    """Open a channel to a guest that sends `said`, and wait until it has reported the end."""
    channel = listen_to(said + b"\ndone\n", 60)
    try:
        await channel.wait_for(lambda: "done" in channel.latest, "said it all")
    finally:
        channel.close()
    return channel


def test_a_report_has_a_verb_and_its_values() -> None:
    report = parse_line('error kind="two words" lba=8 empty=')
    assert (report.verb, report.values) == (
        "error",
        {"kind": "two words", "lba": "8", "empty": ""},
    )


def test_the_last_report_of_each_verb_counts() -> None:
    channel = asyncio.run(channel_of(b"progress requests=1\n\n  \nprogress requests=20 errors=0\n"))
    assert channel.number("progress", "requests") == 20
    assert channel.number("progress", "nothing of the kind") == 0
    assert channel.number("never said", "requests") == 0


def test_hold_pages_are_collected_from_all_runs() -> None:
    channel = asyncio.run(channel_of(b"hold gpa=0x200000 pages=2\nhold gpa=0x400000 pages=1\n"))
    assert channel.hold_pages == [0x200000, 0x201000, 0x400000]


def test_the_pages_that_the_guest_may_write_itself_are_collected() -> None:
    said = b"own gpa=0 pages=2\nown gpa=0x400000 pages=300000000\ndeclared\n"
    channel = asyncio.run(channel_of(said))
    assert channel.own_pages == [range(2), range(0x400, 0x400 + 300_000_000)]


def test_a_guest_cannot_fill_the_memory_with_its_own_pages() -> None:
    with pytest.raises(GuestError, match="invalid 'own' report"):
        asyncio.run(channel_of(b"own gpa=0 pages=1\n" * 70_000))


async def _after_reboot(said: bytes) -> GuestChannel:
    """Return a channel to a guest that says all this while and after its machine is reset."""
    qemu = FakeQemu(b"hold gpa=0x1000 pages=1\nerror kind=stale\nready\n")
    channel = qemu.listen(60)
    try:
        await channel.wait_for(lambda: "ready" in channel.latest, "become ready")
        channel.await_boot()
        assert "ready" not in channel.latest
        qemu.report.feed_data(said)
        await channel.wait_for(lambda: "ready" in channel.latest, "become ready")
    finally:
        channel.close()
    return channel


def test_a_rebooted_guest_is_not_mistaken_for_the_guest_before() -> None:
    channel = asyncio.run(
        _after_reboot(
            b"progress requests=900 errors=1\nready\nprogress requ\nboot\n"
            b"hold gpa=0x5000 pages=1\nprogress requests=1 errors=0\nready\n"
        )
    )
    assert channel.hold_pages == [0x5000]
    assert channel.number("progress", "requests") == 1


def test_errors_before_a_reboot_are_remembered() -> None:
    channel = asyncio.run(_after_reboot(b"boot\nerror kind=stamp\nready\n"))
    assert channel.earlier_errors == 1
    assert channel.error_messages == ["error kind=stale", "error kind=stamp"]


def test_an_answer_must_come_after_its_question() -> None:
    async def ask_again() -> None:
        qemu = FakeQemu(b"recheck pages=1\n")
        channel = qemu.listen(0.1)
        await channel.wait_for(lambda: "recheck" in channel.latest, "rechecked")
        try:
            with pytest.raises(GuestLateError, match="rechecked"):
                await channel.ask(b"s", "recheck", "rechecked")
        finally:
            channel.close()
        assert qemu.commands == [b"s"]

    asyncio.run(ask_again())


@pytest.mark.parametrize(
    "said",
    [
        b"hold gpa=0x1000 pages=-1",
        b"hold gpa=1000 pages=1",
        b"hold pages=1",
        b"hold gpa=0x1000",
        b"hold gpa=0x1000 pages=65537",
        b"hold gpa=0x0 pages=65536\nhold gpa=0x10000000 pages=1",
    ],
)
def test_invalid_hold_pages_are_refused(said: bytes) -> None:
    with pytest.raises(GuestError, match="invalid 'hold' report"):
        asyncio.run(channel_of(said))


@pytest.mark.parametrize(
    "said", [b"progress requests", b'error "unfinished', b"ready =a b", b"a b=c d", b"\xff\xfe x"]
)
def test_an_invalid_line_ends_the_wait(said: bytes) -> None:
    with pytest.raises(GuestError, match="source QEMU gave up: the guest sent a line that is not"):
        asyncio.run(channel_of(said))


def test_a_line_that_is_too_long_ends_the_wait() -> None:
    with pytest.raises(GuestError, match="a line that is too long"):
        asyncio.run(channel_of(b"x" * (1 << 18)))


def test_more_verbs_than_the_limit_end_the_wait() -> None:
    with pytest.raises(GuestError, match="more than 64 verbs"):
        asyncio.run(channel_of(b"".join(b"verb%d\n" % number for number in range(1000))))


@pytest.mark.parametrize("value", ["", "-1", "1_000", "0x10", "٣", "1" * 5000, "many"])
def test_a_malformed_number_is_refused(value: str) -> None:
    channel = asyncio.run(channel_of(f"progress requests='{value}'".encode()))
    with pytest.raises(GuestError, match="in a 'progress' report; expected a number"):
        channel.number("progress", "requests")


def test_a_guests_report_cannot_move_the_terminal() -> None:
    channel = asyncio.run(channel_of(b"error kind=\x1b[2J\x07 x=\xc2\x9b31m\xef\xbf\xbe\n" * 20))
    assert len(channel.error_messages) == 8
    assert channel.error_messages[0] == "error kind=�[2J� x=�31m�"


def test_the_guests_reason_for_giving_up_is_reported() -> None:
    with pytest.raises(GuestError, match="gave up: no disk"):
        asyncio.run(channel_of(b'fatal message="no disk"'))


async def wait_for_ready(said: bytes, timeout_s: float) -> None:
    """Wait for a guest that sends `said`, but is never ready."""
    channel = listen_to(said, timeout_s)
    try:
        await channel.wait_for(lambda: False, "become ready")
    finally:
        channel.close()


def test_a_timeout_says_what_was_waited_for() -> None:
    with pytest.raises(GuestError, match=r"become ready within 0\.01 s; a busy or slow host needs"):
        asyncio.run(wait_for_ready(b"", 0.01))


def test_requests_that_are_not_answered_are_reported() -> None:
    said = b"progress requests=0 under_way=4 writes=0\n"
    with pytest.raises(
        GuestLateError, match="\n0 of the guest's requests are finished, and 4 are unanswered"
    ):
        asyncio.run(wait_for_ready(said, 0.1))


def test_a_network_that_sends_nothing_back_is_reported_before_the_timeout() -> None:
    said = b"frames sent=9 received=0\nframes sent=20000 received=0\n"
    with pytest.raises(NoEchoError, match="sent 20000 frames and received 0 of them"):
        asyncio.run(wait_for_ready(said, 60))


def test_a_few_frames_that_have_not_come_back_are_waited_for_until_the_timeout() -> None:
    with pytest.raises(NoEchoError, match="sent 9 frames and received 0 of them"):
        asyncio.run(wait_for_ready(b"frames sent=9 received=0\n", 0.1))


@pytest.mark.parametrize(("sent", "received"), [(0, 0), (20_000, 1), (20_000, 19_997)])
def test_a_network_that_is_slow_or_takes_no_frames_is_late(sent: int, received: int) -> None:
    said = f"frames sent={sent} received={received}\n".encode()
    with pytest.raises(GuestLateError, match=f"sent {sent} frames and received {received}") as late:
        asyncio.run(wait_for_ready(said, 0.1))
    assert not isinstance(late.value, NoEchoError)


def test_the_last_lines_of_a_huge_console_are_printable(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    with console.open("wb") as file:
        file.truncate(1 << 36)  # more than could be read
        file.seek(0, 2)
        file.write(b"\nlast \x1b[31mwords\r\n")
    tail = log_tail(console).splitlines()
    assert tail[-1] == "    last �[31mwords"
    assert len(tail) <= 16


@pytest.mark.parametrize("line", ["'", "\\", "x y", "x " * 100_000])
def test_the_error_about_an_invalid_line_is_short(line: str) -> None:
    with pytest.raises(UntestableError) as raised:
        parse_line(line)
    assert len(str(raised.value)) < 400
