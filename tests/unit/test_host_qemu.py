"""A QEMU that was built on this machine: what L1 needs of it, and what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.passthrough.l1 import host_qemu

NAME = "qemu-system-x86_64"


class FakeQemu:
    """The answers of a QEMU in `folder`, and of ldd."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "qemu/build" / NAME
        self.program.parent.mkdir(parents=True)
        self.program.write_text("program")
        self.program.chmod(0o755)
        (self.program.parent / "accel-tcg-x86_64.so").touch()
        libraries = [folder / "lib 64/libglib.so.0", folder / "lib 64/ld-linux.so.2"]
        self.firmware = [folder / "pc-bios", folder / "share"]
        for made in (folder / "lib 64", *self.firmware):
            made.mkdir()
        for file in libraries:
            file.write_text(file.name)
        for made in self.firmware:
            (made / "bios-256k.bin").write_text(made.name)
        (self.firmware[1] / "kvmvapic.bin").touch()
        (self.firmware[1] / "edk2-x86_64-code.fd").touch()
        self.listing = (
            "\tlinux-vdso.so.1 (0x00007ffd)\n"
            f"\tlibglib.so.0 => {libraries[0]} (0x00007f3a)\n"
            f"\t{libraries[1]} (0x00007f3b)\n"
        )
        self.has_vfio = True

    def run(self, command: Sequence[str | Path], **_: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        if words[0] == "ldd":
            return subprocess.CompletedProcess(words, 0, self.listing, "")
        if words[1] == "-L":
            output = "".join(f"{folder}\n" for folder in self.firmware)
            return subprocess.CompletedProcess(words, 0, output, "")
        if words[1] == "-device":
            return subprocess.CompletedProcess(words, 0 if self.has_vfio else 1, "", "")
        return subprocess.CompletedProcess(words, 0, "QEMU emulator", "")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    found = FakeQemu(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(host_qemu, "run_captured", found.run)
    return found


def test_a_build_is_copied_with_its_loader_libraries_modules_and_firmware(fake: FakeQemu) -> None:
    folder = host_qemu.qemu_for_l1(fake.program.parent)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == [
        "firmware/bios-256k.bin",
        "firmware/kvmvapic.bin",
        "libraries/ld-linux.so.2",
        "libraries/libglib.so.0",
        "modules/accel-tcg-x86_64.so",
        f"program/{NAME}",
        NAME,
    ]
    assert (folder / "firmware/bios-256k.bin").read_text() == "pc-bios"
    assert 'exec "$folder/libraries/ld-linux.so.2"' in (folder / NAME).read_text()
    for path in (fake.program, fake.program.parents[1]):
        assert host_qemu.qemu_for_l1(path) == folder
    fake.program.write_text("built again")
    assert host_qemu.qemu_for_l1(fake.program) != folder


def test_a_fetched_qemu_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for name in (NAME, "suite", "root/file"):
        (tmp_path / name).touch()
    assert host_qemu.qemu_for_l1(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("name", "found"), [("", "is a folder without this program"), ("none", "does not exist")]
)
def test_a_path_without_a_qemu_is_refused(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(UsageError, match=rf"expected {NAME} .* {found}; .*x86_64-softmmu"):
        host_qemu.qemu_for_l1(tmp_path / name)


def test_a_qemu_without_vfio_pci_is_refused(fake: FakeQemu) -> None:
    fake.has_vfio = False
    with pytest.raises(UsageError, match="has no device vfio-pci; build QEMU with CONFIG_VFIO"):
        host_qemu.qemu_for_l1(fake.program)


def test_a_missing_library_is_named(fake: FakeQemu) -> None:
    fake.listing += "\tliburing.so.2 => not found\n"
    with pytest.raises(UntestableError, match=r"libraries not found: liburing\.so\.2"):
        host_qemu.qemu_for_l1(fake.program)


def test_a_static_qemu_is_refused(fake: FakeQemu) -> None:
    fake.listing = ""
    with pytest.raises(UntestableError, match="ldd lists no loader"):
        host_qemu.qemu_for_l1(fake.program)
