"""The folders that a new run removes; a stand-in for the reaper starts no process."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.host.run_folder import run_folder


class NoReaper:
    """A stand-in for the reaper's process."""

    commands: list[list[str]]

    def __init__(self, command: list[str], **_: object) -> None:
        self.commands.append(command)

    def communicate(self) -> None:
        """Return at once."""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short path: pytest's own can be too long for sockets in it."""
    NoReaper.commands = []
    monkeypatch.setattr(subprocess, "Popen", NoReaper)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)


def left_by_a_dead_run(base: Path) -> Path:
    folder = base / "dmaproof-dead"
    folder.mkdir()
    (folder / "lock").touch()
    return folder


def test_a_run_removes_its_own_folder_but_not_those_of_living_runs(base: Path) -> None:
    with run_folder() as first:
        (first / "evidence").touch()
        with run_folder() as second:
            assert first != second
            assert (first / "evidence").exists()
        assert not second.exists()
        assert (first / "evidence").exists()
        assert first.stat().st_mode & 0o777 == 0o700
    assert list(base.iterdir()) == []


def test_a_folder_is_locked_before_the_next_run_can_see_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        with (self / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(self.name[0])
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    with run_folder():
        pass
    assert seen == ["."]


def test_the_folder_of_a_dead_run_is_removed(base: Path) -> None:
    dead = left_by_a_dead_run(base)
    with run_folder():
        assert not dead.exists()


def test_the_folder_of_another_user_is_not_removed(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, user = left_by_a_dead_run(base), os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with run_folder():
        assert dead.exists()


def test_a_folder_that_is_to_be_kept_stays(base: Path) -> None:
    with run_folder(keep=True) as kept:
        pass
    with run_folder():
        assert kept.exists()
    assert list(base.iterdir()) == [kept]
    assert [command[-2:] for command in NoReaper.commands[:1]] == [[str(kept), "keep"]]


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
def test_a_path_is_as_long_as_a_socket_allows(
    base: Path, monkeypatch: pytest.MonkeyPatch, length: int, fits: bool
) -> None:
    rest = len("/dmaproof-12345678/destination-migration.sock")
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # pytest's own folder is too long
        folder = Path(short) / ("x" * (length - rest - len(short) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        if fits:
            with run_folder():
                pass
        else:
            with pytest.raises(UntestableError, match="too long for Unix sockets"), run_folder():
                pass
        assert list(folder.iterdir()) == []
