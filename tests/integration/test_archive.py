"""The use of the machine's apt, and the errors on a machine without Debian's archive."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.host import archive


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder that is the whole PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put(folder: Path, name: str, *lines: str) -> None:
    """Write a program that prints these lines and ignores its arguments."""
    program = folder / name
    program.write_text("#!/bin/sh\n" + "".join(f"printf '{line}\\n'\n" for line in lines))
    program.chmod(0o755)


def row(origin: str, label: str, uri: str, release: str, architecture: str = "amd64") -> str:
    """Return the line that apt-get indextargets prints for a repository."""
    codename = release.partition("-")[0] if origin == "Ubuntu" else release
    return rf"{label}\t{uri}\t{codename}\t{origin}\t{release}\t{architecture}"


DEBIAN = (
    row("Debian", "Debian-Security", "http://security.test/", "bookworm-security"),
    row("Debian", "Debian", "http://archive.test/", "bookworm-updates"),
    row("Another", "Origin", "http://else.test/", "sid"),
)
UBUNTU = (
    row("Ubuntu", "Ubuntu", "http://archive.test/", "noble"),
    row("Ubuntu", "Ubuntu", "http://archive.test/", "noble-updates"),
    row("Ubuntu", "Ubuntu", "http://security.test/", "noble-security"),
    row("Ubuntu", "Ubuntu", "http://ports.test/", "noble", "arm64"),
    row("Another", "Origin", "http://else.test/", "noble"),
)


def set_release(monkeypatch: pytest.MonkeyPatch, **fields: str) -> None:
    """Let os-release(5) have these fields."""
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: fields)


def test_the_release_is_that_of_the_main_archive(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_release(monkeypatch, ID="debian")
    put(programs, "apt-get", *DEBIAN)
    put(programs, "apt-cache", "linux-image-amd64", "  Depends: linux-image-6.1.0-9-amd64")
    assert archive.own_origin() == "Debian"
    assert archive.own_codename() == "bookworm"
    assert archive.dependencies("linux-image-amd64") == ["linux-image-6.1.0-9-amd64"]


def sources(*arguments: str, pockets: bool = True) -> list[list[str]]:
    """Return the words of each line after the keys."""
    lines = archive.sources_list(*arguments, pockets=pockets).splitlines()
    return [re.sub(r"^deb (\[.*?\] )?", "", line).split() for line in lines]


def test_debian_has_every_suite_at_one_address(programs: Path) -> None:
    put(programs, "apt-get", *DEBIAN)
    main = ["http://archive.test/", "trixie", "main"]
    backports = ["http://archive.test/", "trixie-backports", "main"]
    assert sources("trixie-backports") == [
        main,
        ["http://archive.test/", "trixie-updates", "main"],
        backports,
        ["http://security.test/", "trixie-security", "main"],
    ]
    assert sources("trixie-backports", pockets=False) == [main, backports]


def test_another_distribution_has_the_archives_of_its_own_release(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_release(monkeypatch, ID="linuxmint", ID_LIKE="ubuntu debian")
    put(programs, "apt-get", *UBUNTU)
    assert archive.own_origin() == "Ubuntu"
    assert archive.own_release().is_ubuntu
    assert archive.own_codename("Ubuntu") == "noble"
    main = ["http://archive.test/", "noble", "main"]
    assert sources("noble", "Ubuntu", "amd64") == [
        main,
        ["http://archive.test/", "noble-updates", "main"],
        ["http://security.test/", "noble-security", "main"],
    ]
    assert sources("noble", "Ubuntu", "arm64") == [["http://ports.test/", "noble", "main"]]
    assert sources("noble", "Ubuntu", "amd64", pockets=False) == [main]


@pytest.mark.parametrize("known", [(), UBUNTU], ids=["no lists", "Ubuntu"])
def test_a_machine_without_a_debian_archive_is_reported(
    programs: Path, known: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(programs, "apt-get", *known)
    with pytest.raises(UntestableError, match=r"no Debian archive: .*'apt-get update'.* container"):
        archive.own_codename()
    set_release(monkeypatch, NAME="Fedora Linux", ID="fedora")
    with pytest.raises(UntestableError, match=r"archive of Fedora Linux: run 'apt-get update'"):
        archive.own_origin()


def test_a_machine_without_apt_is_reported(programs: Path) -> None:
    with pytest.raises(
        UntestableError, match=r"apt-get, which is not installed; use a Debian machine"
    ):
        archive.own_codename()
