"""The freestanding guest and the probe compile for each architecture, without warnings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qmp_tools.arch import ARCHITECTURES
from qmp_tools.arch.architecture import Architecture
from qmp_tools.guest import bare
from qmp_tools.guest.build import compile_c, sources
from support.architectures import require_guests

STRICT = ("-std=gnu11", "-ffreestanding", "-nostdlib", "-static", "-Wall", "-Wextra", "-Werror")
WITH_BARE_GUEST = [each for each in ARCHITECTURES.values() if "bare" in each.guests]


@pytest.mark.parametrize("architecture", WITH_BARE_GUEST, ids=lambda each: each.name)
def test_the_compiler_has_no_warnings(tmp_path: Path, architecture: Architecture) -> None:
    require_guests(architecture, in_qemu=False)
    folder = sources() / "bare"
    files = [*folder.glob("*.c"), *(folder / architecture.name).glob("*.[cS]")]
    assert architecture.freestanding_options is not None
    compile_c(
        [*files, sources() / "workload.c"],
        tmp_path / "guest",
        *STRICT,
        *architecture.freestanding_options,
        architecture=architecture,
    )


@pytest.mark.parametrize("architecture", WITH_BARE_GUEST, ids=lambda each: each.name)
def test_a_changed_header_makes_other_guests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: Architecture
) -> None:
    require_guests(architecture, in_qemu=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "guests"
    shutil.copytree(sources(), copy)
    monkeypatch.setattr(bare, "sources", lambda: copy)
    before = (bare.bare_guest(architecture).kernel, bare.probe_guest(architecture))
    for header in (copy / "bare" / architecture.name).glob("*.h"):
        header.write_text(header.read_text() + "\n")
    after = (bare.bare_guest(architecture).kernel, bare.probe_guest(architecture))
    assert not set(before) & set(after)
