"""Set-ups of proofs that are never carried out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.devices.emulated import EmulatedDevice
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.guest.workload import Workload
from qmp_tools.matrix.cells import Cell
from qmp_tools.matrix.result_cache import key_of
from qmp_tools.proof.model import Setup
from qmp_tools.proof.options import ProofOptions
from qmp_tools.qemu.machine import GIB, Machine
from qmp_tools.qemu.program_files import ProgramFiles


def setup(memory_bytes: int = GIB, cpus: int = 2, seed: int = 1) -> Setup:
    """Return a set-up whose programs need not exist."""
    qemu = Path("/bin/sh")
    machine = Machine(X86_64, "q35", "tcg", memory_bytes, cpus, Path("/kernel"))
    return Setup(
        ProofOptions(guest="bare", seed=seed),
        qemu,
        qemu,
        machine,
        "bare",
        Workload(seed=seed),
        EmulatedDevice(DeviceOptions(seed=seed)),
    )


def setup_of_files(folder: Path) -> Setup:
    """Return a set-up of files in `folder` that a test can change."""
    qemu, kernel, initramfs = (folder / name for name in ("qemu", "kernel", "initramfs"))
    for file in (qemu, kernel, initramfs):
        file.write_text("one")
    machine = replace(setup().machine, kernel=kernel, initramfs=initramfs)
    return replace(setup(), qemu=qemu, qemu_destination=qemu, machine=machine)


def key(cell: Cell, proof: Setup) -> str:
    """Return the key of `cell` in the result cache."""
    return key_of(cell, proof, ProgramFiles())
