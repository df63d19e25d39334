"""The use of the machine's apt, and the errors on a machine without Debian's archive."""

from __future__ import annotations

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


def test_the_release_is_that_of_the_main_archive(programs: Path) -> None:
    put(
        programs,
        "apt-get",
        r"Debian\tDebian-Security\thttp://security.test/\tbookworm-security",
        r"Debian\tDebian\thttp://archive.test/\tbookworm-updates",
        r"Another\tOrigin\thttp://else.test/\tsid",
    )
    put(programs, "apt-cache", "linux-image-amd64", "  Depends: linux-image-6.1.0-9-amd64")
    assert archive.own_codename() == "bookworm"
    assert archive.dependencies("linux-image-amd64") == ["linux-image-6.1.0-9-amd64"]


@pytest.mark.parametrize(
    "known", [[], [r"Ubuntu\tUbuntu\thttp://archive.test/\tnoble"]], ids=["no lists", "Ubuntu"]
)
def test_a_machine_without_a_debian_archive_is_reported(programs: Path, known: list[str]) -> None:
    put(programs, "apt-get", *known)
    with pytest.raises(UntestableError, match=r"no Debian archive: .*'apt-get update'.* container"):
        archive.own_codename()
    with pytest.raises(UntestableError, match="no Debian archive"):
        archive.dependencies("linux-image-amd64")


def test_a_machine_without_apt_is_reported(programs: Path) -> None:
    with pytest.raises(
        UntestableError, match=r"apt-get, which is not installed; use a Debian machine"
    ):
        archive.own_codename()
