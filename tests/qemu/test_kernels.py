"""Proofs with kernels that the user gives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qmp_tools.arch import find_architecture
from qmp_tools.arch.architecture import KernelPackage
from qmp_tools.guest.drivers import VIRTIO_BLK
from qmp_tools.guest.kernels import find_kernel
from qmp_tools.host import archive
from support.command import Tool
from support.kernel_files import FORMS

HOST = find_architecture(None)
SMALL = ("--workload", "write_once=256,churn=64,hot=64", "--requests-after", "100")


def setup_of_pass(tool: Tool, *arguments: str) -> Any:
    """Run a proof that must pass, and return the set-up in its report."""
    outcome = tool.run("prove", "--json", "-", *SMALL, *arguments)
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    return outcome.report["setup"]


def test_a_compressed_kernel_boots_with_compressed_modules(tool: Tool, tmp_path: Path) -> None:
    kernel = find_kernel(HOST, VIRTIO_BLK.modules)
    image = tmp_path / "vmlinux.zst"
    image.write_bytes(FORMS[".zst"](kernel.image.read_bytes()))
    folder = tmp_path / "root/usr/lib/modules" / kernel.version
    folder.mkdir(parents=True)
    built_in = {*VIRTIO_BLK.modules} - kernel.modules.load_order(VIRTIO_BLK.modules).keys()
    (folder / "modules.builtin").write_text("".join(f"{name}.ko\n" for name in sorted(built_in)))
    forms = [".gz", ".xz", ".zst"]
    for number, (name, module) in enumerate(kernel.modules.load_order(VIRTIO_BLK.modules).items()):
        form = forms[number % len(forms)]
        hyphens = name.replace("_", "-")
        (folder / f"{hyphens}.ko{form}").write_bytes(FORMS[form](module))
    found = setup_of_pass(tool, "--kernel", str(image), "--modules", str(tmp_path / "root"))
    assert found["guest_kernel"] == f"{kernel.version} (--kernel {image})"


def test_a_kernel_that_only_qemu_can_unpack_boots(tool: Tool) -> None:
    """Debian's cloud kernel for x86-64 is compressed with lz4."""
    if not shutil.which("apt-get") or archive.own_origin() != archive.DEBIAN:
        pytest.skip("only Debian has this kernel")
    package = KernelPackage(f"linux-image-cloud-{HOST.debian}")
    cloud = find_kernel(replace(HOST, kernels={4096: package}), VIRTIO_BLK.modules)
    assert cloud.version.endswith(f"cloud-{HOST.debian}")
    assert cloud.modules.folder is not None
    files = ("--kernel", str(cloud.image), "--modules", str(cloud.modules.folder))
    assert setup_of_pass(tool, *files)["guest_kernel"].startswith(f"{cloud.version} (--kernel ")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--kernel", "/etc/passwd"], 3, "/etc/passwd is not a kernel: expected a bzImage"),
        (["--kernel", "/no/such/kernel"], 2, "--kernel /no/such/kernel: not found"),
        (["--kernel", "vmlinuz", "--guest", "bare"], 2, "--kernel: the guest bare has no kernel"),
        (["--modules", "/"], 2, "--modules needs --kernel FILE"),
        (["--guest-pages", "64K", "--guest", "bare"], 2, "--guest-pages: the guest bare has no"),
        (["--guest-pages", "64K", "--arch", "x86_64"], 3, "with such pages; expected one of 4K"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused(
    tool: Tool, arguments: list[str], exit_code: int, message: str
) -> None:
    outcome = tool.run("prove", *arguments)
    assert (outcome.exit_code, message in outcome.errors) == (exit_code, True), outcome.errors
