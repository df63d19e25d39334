"""Proofs of guests whose kernels have larger pages than the dirty log's 4 KiB."""

from __future__ import annotations

import pytest

from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.guest.kernel_build import built_kernel
from qmp_tools.qemu.builds import installed
from qmp_tools.qemu.choice import find_qemu
from support.architectures import require_guests
from support.command import Tool


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("size", ["16K", "64K"])
def test_every_page_survives_in_a_guest_with_larger_pages(tool: Tool, size: str) -> None:
    require_guests(AARCH64)
    if size == "64K":  # to build this kernel takes five minutes of CPU time
        built_kernel(AARCH64, 64 << 10)
    builds = installed(AARCH64)
    qemu = str(builds[-1].path if builds else find_qemu(None, AARCH64))
    options = ("--arch", "aarch64", "--guest", "linux", "--guest-pages", size, "--qemu", qemu)
    report = tool.run("prove", *options, "--json", "-", "--quiet").report
    assert report["exit_code"] == 0, report["verdict"]
    # The guest names the addresses of wrong pages, and of those that only QEMU writes.
    assert report["sensitivity"]["guaranteed_detectable"] >= 8192
    assert not tool.leftovers()
