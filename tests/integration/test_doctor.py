"""The doctor's facts about this machine."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from qmp_tools.arch import find_architecture
from qmp_tools.doctor import gather_facts
from support.command import Tool


def test_a_machine_without_programs_misses_qemu_compiler_and_kernel(
    tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-ups themselves, without QEMU, compiler, apt and kernel."""
    for name in ("PATH", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tool.folder))
    outcome = tool.run("doctor", "--json", "-")
    assert outcome.exit_code == 3, outcome.errors
    states = {found["name"]: found["state"] for found in outcome.report["findings"]}
    missing = {name for name, state in states.items() if state == "missing"}
    assert missing == {"QEMU", "C compiler", "guest's kernel"}
    assert states["Python"] == "ok"
    assert not tool.leftovers()


def test_a_format_without_its_module_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lzma", None)
    assert gather_facts(find_architecture("x86_64")).missing_formats == {
        "xz": "lzma",
        "lzma": "lzma",
    }


def test_a_temporary_folder_with_too_long_a_path_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    facts = gather_facts(find_architecture("x86_64"))
    assert "too long for Unix sockets" in str(facts.temporary_error)
    assert facts.qemu_error is None or "TMPDIR" not in facts.qemu_error
    assert not list(folder.iterdir())


def test_only_extras_for_users_are_examined() -> None:
    extras = gather_facts(find_architecture("x86_64")).extras
    assert set(extras) == {"avocado", "avocado-vt", "bench", "libvirt"}


def test_an_extra_that_is_not_installed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert gather_facts(find_architecture("x86_64")).extras["bench"] == ["matplotlib"]


def test_the_doctor_recommends_a_device_that_the_machine_has(tool: Tool) -> None:
    outcome = tool.run("doctor", "--arch", "s390x", "--json", "-")
    assert "--guest linux --arch s390x --device echo" in outcome.report["verdict"]
