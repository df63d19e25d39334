"""A command that runs inside another root file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.host.unpacked_root import SOURCE, run_inside
from support.command import TIMEOUT_S


def test_a_failing_command_inside_is_reported(tmp_path: Path) -> None:
    for name in ("dev", "proc", "mnt", "inside"):
        (tmp_path / name).mkdir()
    with pytest.raises(UntestableError, match="building nothing failed"):
        run_inside(tmp_path, tmp_path / "inside", "true", "building nothing", 30.0)


def test_a_command_runs_inside_a_root_file_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run_inside(Path("/"), tmp_path, "id -u; ls /mnt", "listing", TIMEOUT_S) == "0\nfile\n"


def test_a_source_is_mounted_and_cannot_be_modified(tmp_path: Path) -> None:
    source = tmp_path / "my source"
    source.mkdir()
    (source / "file").write_text("content")
    script = f"cat {SOURCE}/file; touch {SOURCE}/file 2>/mnt/refused || true"
    output = run_inside(Path("/"), tmp_path, script, "reading", TIMEOUT_S, source=source)
    assert output == "content"
    assert "Read-only file system" in (tmp_path / "refused").read_text()
