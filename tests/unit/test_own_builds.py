"""The names of own builds of QEMU, and the command line that makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.cli.main import main
from qmp_tools.host import distribution
from qmp_tools.qemu import builds, choice
from qmp_tools.qemu.builds import QemuBuild


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let only the builds below this folder be available."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(distribution, "system_qemu", lambda architecture: None)
    return tmp_path / "dmaproof/qemu/x86_64"


def add(data: Path, version: str) -> Path:
    (data / version).mkdir(parents=True)
    (data / version / "suite").write_text("trixie\n")
    return data / version / X86_64.qemu_program


def test_an_own_build_is_chosen_only_by_its_name(data: Path) -> None:
    fetched, own = add(data, "10.0.13"), add(data, "10.0.13+fixed")
    add(data, "10.0.13+fixed-2")
    for wanted in ("10", "10.0", "10.0.13", None):
        assert choice.find_qemu(wanted, X86_64) == fetched
    for wanted in ("10+fixed", "10.0+fixed", "10.0.13+fixed"):
        assert choice.find_qemu(wanted, X86_64) == own


def test_own_builds_are_not_among_the_fetched_ones(data: Path) -> None:
    for version in ("11.1.3", "10.0.13+9", "10.0.13", "9.2.1+b", "9.2.1+a"):
        add(data, version)
    assert [build.version for build in builds.installed(X86_64)] == ["10.0.13", "11.1.3"]
    own = [build.version for build in builds.own_builds(X86_64)]
    assert own == ["9.2.1+a", "9.2.1+b", "10.0.13+9"]
    assert all(build.is_own == ("+" in build.version) for build in builds.own_builds(X86_64))
    assert not QemuBuild("10.0.13", "trixie", data).is_own


def test_an_unknown_name_is_wrong_usage(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(data, "10.0.13+fixed")
    assert main(["prove", "--qemu", "10.0+other", "--guest", "bare"]) == 2
    assert "available: 10.0.13+fixed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "qemu build needs the version or suite of the distribution's QEMU"),
        (["--source", "x", "--patch", "y"], "--patch y: with --source, apply patches to your own"),
        (["--source", "/nowhere"], "this is not QEMU's source: configure and VERSION not found"),
        (["10.0", "--patch", "/nowhere"], "--patch /nowhere: No such file or directory"),
        (["10.0", "--name", "a/b"], "--name a/b: expected letters, digits"),
        (["10.0", "--name", "+"], "--name +: expected letters, digits"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_fetched(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["qemu", "build", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not data.exists()
