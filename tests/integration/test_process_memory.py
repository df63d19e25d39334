"""The memory of another user's process."""

from __future__ import annotations

import os
import subprocess

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.memory.process_memory import mappings_of


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed: run the tests as root")
def test_the_memory_of_another_users_process_is_refused() -> None:
    unprivileged = 65534
    with subprocess.Popen(["sleep", "60"]) as process:
        os.seteuid(unprivileged)
        try:
            with pytest.raises(
                UntestableError, match=r"belongs to user root; run dmaproof as root"
            ):
                mappings_of(process.pid, "source QEMU")
        finally:
            os.seteuid(0)
            process.kill()
