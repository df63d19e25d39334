"""QEMUs without asyncio: they end with their environment, and with the process that made it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from dmaproof.errors import UsageError
from qmp_tools.blocking import Environment, check
from qmp_tools.qemu.qmp import QmpError
from qmp_tools.ram_check.outcome import RamDiffersError
from support.command import TIMEOUT_S, Tool


def test_all_processes_end_with_their_session(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tool.folder))
    pids = []

    def use() -> None:
        with Environment() as environment:
            pids.append(environment.qemu(["-machine", "none"]).pid)
            pair = environment.pair(["-machine", "q35", "-m", "64"], accelerator="tcg")
            pids.extend([pair.source.pid, pair.destination.pid])
            with pytest.raises(UsageError, match="scenario 'pigeon'"):
                pair.migrate("pigeon")
            for scenario in ("retry", "postcopy"):
                with pytest.raises(
                    UsageError, match=f"scenario '{scenario}' works only in a proof"
                ):
                    pair.migrate(scenario)
            with pytest.raises(QmpError, match="no-such-command"):
                pair.source.execute("no-such-command")
            raise LookupError

    with pytest.raises(LookupError):
        use()
    assert len(pids) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not tool.leftovers()


def test_a_check_returns_when_it_has_compared(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tool.folder))
    with Environment() as environment:
        pair = environment.pair(["-machine", "q35", "-m", "64"], accelerator="tcg")
        pair.migrate()
        sockets = [str(pair.source.socket_path), str(pair.destination.socket_path)]
        assert check(*sockets).exit_code == 0
        answer = pair.destination.monitor("gpa2hva 0x2345000")
        with Path(f"/proc/{pair.destination.pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(int(answer.split()[-1], 16))
            memory.write(b"lost")
        assert check(*sockets).differing == 1
        with Environment() as other:
            for either in (environment, other):
                for source in (pair.source, pair.source.socket_path):
                    assert either.check(source, pair.destination).differing == 1
        with pytest.raises(UsageError, match=r"source: expected the path .* got 7"):
            environment.check(7, pair.destination)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"await qmp_tools\.aio\.check"):
            environment.check(QMPClient(), pair.destination)
        with pytest.raises(RamDiffersError, match=r"pc\.ram \+0x2345000 \(GPA 0x2345000\)"):
            check(pair.source, pair.destination).require_equal()
        assert check(*sockets, resume=True).differing == 1
        assert pair.destination.execute("query-status")["status"] == "running"
        with pytest.raises(UsageError, match="got the string '-m 64'"):
            environment.qemu("-m 64")
    with pytest.raises(UsageError, match="nothing"):
        check(str(tmp_path / "nothing"), tmp_path)
    assert not tool.leftovers()


_SCRIPT = """
import time
from qmp_tools.blocking import Environment
with Environment() as environment:
    print(environment.qemu(["-machine", "none"]).pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_all_processes_end_with_the_process_that_started_them(
    tool: Tool, number: signal.Signals
) -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT],
        env={"TMPDIR": str(tool.folder), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert maker.stdout is not None
    qemu = Path(f"/proc/{int(maker.stdout.readline())}")
    maker.send_signal(number)
    maker.communicate()
    deadline = time.monotonic() + TIMEOUT_S
    while tool.leftovers() or (qemu.exists() and not _is_dead(qemu)):
        assert time.monotonic() < deadline, tool.leftovers() or "QEMU still runs"
        time.sleep(0.05)


def _is_dead(process: Path) -> bool:
    """Return whether a process is a zombie; in a container no process may reap orphans."""
    return (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
