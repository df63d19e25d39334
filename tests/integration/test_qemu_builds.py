"""The start of a fetched QEMU on a machine of another suite."""

from __future__ import annotations

import subprocess
from pathlib import Path

from qmp_tools.qemu.builds import make_whole


def test_a_fetched_program_runs_by_its_own_loader(tmp_path: Path) -> None:
    """Debian 12's packages have an absolute link, which would lead to the machine's loader."""
    libraries = tmp_path / "root/lib/x86_64-linux-gnu"
    loader = libraries / "ld-linux-x86-64.so.2"
    links = tmp_path / "root/lib64"
    for folder in (libraries, links, tmp_path / "root/usr/bin"):
        folder.mkdir(parents=True)
    loader.write_text('#!/bin/sh\necho "the folder\'s loader: $3"\n')
    loader.chmod(0o755)
    (links / loader.name).symlink_to(f"/lib/x86_64-linux-gnu/{loader.name}")
    program = tmp_path / "root/usr/bin/qemu-img"
    program.touch()
    make_whole(tmp_path, {"qemu-img": "usr/bin"})
    done = subprocess.run([tmp_path / "qemu-img"], capture_output=True, text=True, check=True)
    assert done.stdout == f"the folder's loader: {program}\n"
