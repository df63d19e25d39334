"""The errors about a QEMU that does not answer on QMP; a script simulates the QEMU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmp_tools.qemu.qemu import running_qemu
from qmp_tools.qemu.qmp import QmpError, QmpTimeoutError

CLOSES_QMP = (
    'for word; do case $word in socket,id=qmp,fd=*) exec {fd}>&"${word##*=}"-;; esac; done; '
    "exec {fd}>&-; "
)


def start(folder: Path, script: str, timeout_s: float) -> None:
    """Start the bash `script` instead of QEMU."""
    program = folder / "qemu"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)

    async def start_it() -> None:
        async with running_qemu("source", program, [], folder, timeout_s=timeout_s):
            pass

    asyncio.run(start_it())


def test_a_qemu_that_ends_late_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(QmpError, match="source QEMU ended with exit code 7 before it answered"):
        start(tmp_path, f"{CLOSES_QMP} sleep 1.5; exit 7", 600)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo starting; exec sleep 1000",
            "has not sent a QMP greeting within 1 s; .*\n.*\n    starting",
        ),
        (f"{CLOSES_QMP} exec sleep 1000", "closed its QMP socket but has not ended within 1 s"),
    ],
)
def test_a_qemu_that_does_not_answer_in_time_is_reported(
    script: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(QmpTimeoutError, match=f"source QEMU {message}"):
        start(tmp_path, script, 1)
