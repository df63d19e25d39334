"""The end of a proof: of several processes that die, the one that explains the failure best."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dmaproof.errors import UntestableError, WaitTimeoutError
from qmp_tools.guest.channel import GuestChannel, GuestGaveUpError, GuestLateError
from qmp_tools.host.process import Process, ProcessDiedError
from qmp_tools.migration.pair import QemuPair
from qmp_tools.qemu.qmp import QmpError

ENDS = "exit 3"
IS_KILLED = "kill -KILL $$"
IS_KILLED_LATER = f"sleep 0.1; {IS_KILLED}"
STAYS = "exec sleep 1000"
STOPS = "kill -STOP $$"


def outcome_of(
    folder: Path, work: Coroutine[Any, Any, str], said: bytes = b"", **scripts: str
) -> str:
    """Return the result of a guarded `work` while the shell runs `scripts` instead of QEMUs.

    Their guests have sent `said`, which has not been read yet. The script of `device` replaces a
    back end that serves all of them.
    """

    async def guard() -> str:
        quiet = asyncio.get_running_loop().create_future()
        served: list[Process] = []
        device = SimpleNamespace(
            processes=served, serving=lambda side: served, refusal=lambda: quiet
        )
        pair = QemuPair(cast(Any, None), {}, cast(Any, device), folder, timeout_s=60)
        for name, script in scripts.items():
            process = await Process.start(name, ["sh", "-c", script], folder / name)
            if name == "device":
                await stopped(process)
                served.append(process)
                continue
            report = asyncio.StreamReader()
            report.feed_data(said)
            report.feed_eof()
            qemu = SimpleNamespace(process=process, end=process.end, report=report)
            pair.qemus[name] = cast(Any, qemu)
            pair.guests[name] = GuestChannel(pair.qemus[name], timeout_s=60)
        try:
            return await pair.guarded(work)
        finally:
            await asyncio.gather(pair.end(), *(process.end() for process in served))

    return asyncio.run(guard())


async def stopped(process: Process) -> None:
    while not process.is_stopped:  # noqa: ASYNC110  (the kernel sets no event)
        await asyncio.sleep(0.01)


async def lasts() -> str:
    await asyncio.sleep(1000)
    return "over"


async def succeeds() -> str:
    return "done"


async def fails(error: Exception) -> str:
    await asyncio.sleep(0)
    raise error


def test_a_killed_process_is_named_before_those_that_ended_because_of_it(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match="source was killed by SIGKILL"):
        outcome_of(tmp_path, lasts(), source=IS_KILLED_LATER, destination=ENDS)


def test_a_process_that_ended_alone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match="destination ended with exit code 3"):
        outcome_of(tmp_path, lasts(), source=STAYS, destination=ENDS)


def test_a_death_is_reported_in_place_of_the_error_that_it_caused(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match="source was killed by SIGKILL"):
        outcome_of(tmp_path, fails(UntestableError("no answer")), source=IS_KILLED_LATER)


def test_qemus_output_is_reported_after_the_death_of_a_back_end(tmp_path: Path) -> None:
    refused = fails(QmpError("source QEMU ended: Connection refused"))
    with pytest.raises(ProcessDiedError, match=r"^back_end ended with exit code 3\n.*refused$"):
        outcome_of(tmp_path, refused, back_end=ENDS)


def test_without_a_death_the_error_of_the_work_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match="no answer"):
        outcome_of(tmp_path, fails(UntestableError("no answer")), source=STAYS)
    assert outcome_of(tmp_path, succeeds(), source=STAYS) == "done"


def test_the_reason_of_a_guest_that_gave_up_is_reported(tmp_path: Path) -> None:
    with pytest.raises(GuestGaveUpError):
        outcome_of(tmp_path, fails(GuestGaveUpError("gave up")), source=IS_KILLED)


def test_the_reason_of_a_guest_that_switched_itself_off_is_reported(tmp_path: Path) -> None:
    said = b'fatal message="/dev/vda: No such file or directory"\n'
    with pytest.raises(GuestGaveUpError, match="/dev/vda: No such file"):
        outcome_of(tmp_path, lasts(), said, source="exit 0")


def test_a_death_shows_every_log(tmp_path: Path) -> None:
    async def text_of_death() -> str:
        console = tmp_path / "console.log"
        console.write_text("Kernel panic\n")
        process = await Process.start("source", ["sh", "-c", "echo reset"], tmp_path / "qemu.log")
        process.more_logs = (console,)
        return str(await process.missed())

    text = asyncio.run(text_of_death())
    assert re.search(
        r"source ended .*qemu.log:\n +reset\n.*console.log:\n +Kernel panic", text, re.DOTALL
    )


def test_a_timeout_names_the_process_that_does_not_answer(tmp_path: Path) -> None:
    late = GuestLateError("the guest is late")
    with pytest.raises(GuestLateError) as raised:
        outcome_of(tmp_path, fails(late), source=STAYS, device=f"echo hello; {STOPS}")
    silent, reported, *log = str(raised.value).splitlines()
    assert re.fullmatch(
        r"device \(PID \d+, stopped\) is not running; continue it with SIGCONT", silent
    )
    assert (reported, log) == ("the guest is late", ["  last lines of device:", "    hello"])


def test_a_timeout_names_the_unanswered_message(tmp_path: Path) -> None:
    (tmp_path / "source-vhost-user.log").write_text("vhost_user_write req:6 flags:0x1\n")
    with pytest.raises(WaitTimeoutError) as raised:
        outcome_of(tmp_path, fails(WaitTimeoutError("late")), source=STAYS, device=STOPS)
    silent, reported = str(raised.value).splitlines()
    assert re.fullmatch(
        r"device \(PID \d+, stopped\) has not answered SET_LOG_BASE, and source waits for it",
        silent,
    )
    assert reported == "late"
