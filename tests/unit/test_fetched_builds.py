"""The suite of the archive that has a QEMU, and what is said if none has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.qemu import builds

VERSIONS = {"trixie": "1:10.0.13+ds-0+deb13u1", "bookworm": "1:7.2+dfsg-7+deb12u18"}


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Let these suites, and only these, be reachable."""
    suites = set(VERSIONS)

    class FakeArchive:
        def __init__(self, suite: str, folder: Path) -> None:
            if suite not in suites:
                raise UntestableError(f"fetching the package lists of {suite}: 404")
            self.suite = suite

        def has(self, package: str) -> bool:
            return False

        def version(self, package: str) -> str:
            return VERSIONS[self.suite]

    monkeypatch.setattr(builds, "Archive", FakeArchive)
    monkeypatch.setattr(builds, "_suites", lambda: ["trixie-backports", "trixie", "bookworm"])
    return suites


@pytest.mark.parametrize(("wanted", "suite"), [("10.0", "trixie"), ("7.2", "bookworm")])
def test_a_version_is_found_although_a_suite_cannot_be_searched(
    reachable: set[str], tmp_path: Path, wanted: str, suite: str
) -> None:
    archive, version = builds.find_suite(wanted, X86_64, tmp_path)
    assert archive.suite == suite
    assert version.startswith(wanted)


def test_a_version_that_no_suite_has_is_wrong_usage(reachable: set[str], tmp_path: Path) -> None:
    message = (
        r"no Debian suite has QEMU 9\.9: trixie has 10\.0\.13, bookworm has 7\.2; trixie-backports "
        "could not be searched"
    )
    with pytest.raises(UsageError, match=message):
        builds.find_suite("9.9", X86_64, tmp_path)


def test_without_a_network_nothing_is_said_about_versions(
    reachable: set[str], tmp_path: Path
) -> None:
    reachable.clear()
    message = r"none of trixie-backports, .* could be searched; check the network(.|\n)*404"
    with pytest.raises(UntestableError, match=message):
        builds.find_suite("11.1", X86_64, tmp_path)
