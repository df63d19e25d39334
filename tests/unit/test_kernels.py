"""The choice of the Linux guest's kernel: a given one, the host's own, or a package."""

from __future__ import annotations

import errno
import gzip
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.arch import ARCHITECTURES, find_architecture
from qmp_tools.arch.architecture import Architecture
from qmp_tools.guest import kernels
from qmp_tools.guest.installed_kernels import installed_images
from qmp_tools.guest.kernel import Kernel, kernel_of_file
from qmp_tools.guest.kernels import KernelFiles, find_kernel, kernel_source
from qmp_tools.guest.modules import Modules
from support.kernel_files import ARM, RELEASE, RISCV, bz_image, put, vmlinux

HOST = find_architecture(None)
KERNELS = {
    "x86_64": bz_image(gzip.compress(vmlinux())),
    "aarch64": gzip.compress(ARM),
    "riscv64": RISCV,
}
FOREIGN = next(each for name, each in ARCHITECTURES.items() if each is not HOST)
WANTED = ("virtio_pci", "virtio_blk")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "dmaproof/guest"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Let the distribution have one kernel package, and return a list of what was fetched."""
    fetched: list[str] = []

    def fetch(
        architecture: Architecture, page_bytes: int | None, failures: list[str] | None
    ) -> Iterator[Kernel]:
        if failures is None:
            return
        fetched.append(architecture.name)
        yield Kernel(tmp_path / "image", Modules("6.1.0-9", None), page_bytes, "package linux")

    monkeypatch.setattr(kernels, "package_kernels", fetch)
    return fetched


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Iterator[Kernel]:
        arguments[-1].append("package linux: apt-get is not installed")
        yield from ()

    monkeypatch.setattr(kernels, "package_kernels", fail)


def install(root: Path, place: str = f"lib/modules/{RELEASE}/vmlinuz", *, built_in: str) -> Path:
    """Install the host's kernel, and its modules without files."""
    image = root / place
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(KERNELS[HOST.name])
    folder = root / "lib/modules" / RELEASE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modules.builtin").write_text("".join(f"a/{name}.ko\n" for name in built_in.split()))
    return image


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    "place",
    [f"lib/modules/{RELEASE}/vmlinuz", f"boot/vmlinuz-{RELEASE}", "boot/vmlinuz-lts"],
    ids=["Fedora, Arch and openSUSE", "Debian", "Alpine"],
)
def test_the_hosts_own_kernel_is_used(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    image = install(tmp_path, place, built_in="virtio_pci virtio_blk")
    kernel = find_kernel(HOST, WANTED, root=tmp_path)
    assert str(kernel) == f"{RELEASE} (the host's {image})"
    assert kernel.modules.folder == tmp_path / "lib/modules" / RELEASE
    assert f"the guest's kernel is {kernel}" in caplog.messages


def test_a_kernel_without_the_driver_is_skipped(
    tmp_path: Path, packages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    install(tmp_path, built_in="virtio_pci")
    assert find_kernel(HOST, WANTED, root=tmp_path).origin == "package linux"
    assert packages == [HOST.name]
    assert "no module virtio_blk" in caplog.messages[0]
    assert "CONFIG_VIRTIO_BLK=y" in caplog.messages[0]


def refuse_to_read(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Let this user not read `file`, also if the user is root."""
    read = Path.read_bytes

    def refusing(path: Path) -> bytes:
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)


@pytest.mark.usefixtures("packages")
def test_a_kernel_that_only_root_may_read_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    image = install(tmp_path, f"boot/vmlinuz-{RELEASE}", built_in="virtio_pci virtio_blk")
    refuse_to_read(monkeypatch, image)
    assert find_kernel(HOST, WANTED, root=tmp_path).origin == "package linux"
    assert caplog.messages[0] == f"skipped a kernel: {image}: this user may not read it"


@pytest.mark.usefixtures("no_packages")
def test_without_any_kernel_every_way_to_get_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = install(tmp_path, f"boot/vmlinuz-{RELEASE}", built_in="virtio_pci virtio_blk")
    refuse_to_read(monkeypatch, image)
    message = (
        rf"no kernel for the Linux guest on {HOST.name}: .*; run 'sudo chmod a\+r {image}'.*; "
        r"or give a kernel with --kernel FILE --modules DIR; or, .*apt-get update.*:\n"
        rf"    {image}: this user may not read it\n    package linux: apt-get is not installed"
    )
    with pytest.raises(UntestableError, match=message):
        find_kernel(HOST, WANTED, root=tmp_path)


def test_the_host_has_no_kernel_for_another_architecture(
    tmp_path: Path, packages: list[str]
) -> None:
    install(tmp_path, built_in="virtio_pci virtio_blk")
    assert find_kernel(FOREIGN, WANTED, root=tmp_path).origin == "package linux"
    assert packages == [FOREIGN.name]


@pytest.mark.usefixtures("no_packages")
def test_a_kernel_without_a_folder_of_modules_is_skipped(tmp_path: Path) -> None:
    image = install(tmp_path, "boot/vmlinuz", built_in="")
    folder = tmp_path / "lib/modules" / RELEASE
    folder.rename(folder.with_name("another version"))
    with pytest.raises(UntestableError, match=rf"{image}: no modules of kernel {RELEASE} were"):
        find_kernel(HOST, WANTED, root=tmp_path)


@pytest.mark.usefixtures("packages")
def test_a_file_that_is_not_a_kernel_is_skipped(tmp_path: Path) -> None:
    install(tmp_path, built_in="virtio_pci virtio_blk").write_bytes(b"damaged")
    assert find_kernel(HOST, WANTED, root=tmp_path).origin == "package linux"


def test_the_running_kernel_is_tried_first_and_then_the_newest(tmp_path: Path) -> None:
    for version in ("6.9.1", "6.10.2", "6.2.0", "5.0.0"):
        folder = tmp_path / "usr/lib/modules" / version
        folder.mkdir(parents=True)
        (folder / "vmlinuz").touch()
    (tmp_path / "lib").symlink_to("usr/lib")
    boot = tmp_path / "boot"
    boot.mkdir()
    (boot / "vmlinuz-6.10.2").touch()
    (boot / "vmlinuz-5.0.0").symlink_to("../lib/modules/5.0.0/vmlinuz")
    (boot / "vmlinuz-linux").touch()
    (boot / "config-6.10.2").touch()
    images = [str(image.relative_to(tmp_path)) for image in installed_images(tmp_path, "6.2.0")]
    assert images == [
        "lib/modules/6.2.0/vmlinuz",
        "lib/modules/6.10.2/vmlinuz",
        "boot/vmlinuz-6.10.2",
        "lib/modules/6.9.1/vmlinuz",
        "lib/modules/5.0.0/vmlinuz",
        "boot/vmlinuz-linux",
    ]
    assert installed_images(tmp_path / "empty", "6.2.0") == []


def test_a_given_kernel_is_used_with_its_modules(tmp_path: Path, packages: list[str]) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(KERNELS[HOST.name])
    modules = tmp_path / "modules"
    put(modules, "virtio_pci", "")
    put(modules, "virtio_blk", "")
    kernel = find_kernel(HOST, WANTED, KernelFiles(image, modules))
    assert str(kernel) == f"{RELEASE} (--kernel {image})"
    assert list(kernel.modules.load_order(WANTED)) == list(WANTED)
    assert packages == []
    assert kernel.image.read_bytes() == {"x86_64": vmlinux(), "aarch64": ARM}[HOST.name]


def test_a_given_kernel_without_modules_has_its_built_in_drivers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    image = tmp_path / "kernel"
    image.write_bytes(KERNELS[HOST.name])
    assert find_kernel(HOST, WANTED, KernelFiles(image)).modules.load_order(WANTED) == {}
    assert any("only drivers that are built in can be used" in line for line in caplog.messages)
    (tmp_path / f"config-{RELEASE}").write_text("CONFIG_VIRTIO_PCI=y\n")
    with pytest.raises(UntestableError, match="CONFIG_VIRTIO_BLK is not set in"):
        find_kernel(HOST, WANTED, KernelFiles(image))


def test_files_that_cannot_be_the_users_kernel_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(KERNELS[HOST.name])
    for files, message in (
        (KernelFiles(tmp_path), "--kernel .*: not found, or not a regular file"),
        (KernelFiles(image, tmp_path / "no"), "--modules .*/no: not found, or not a folder"),
        (KernelFiles(image, tmp_path), f"--modules .*: no modules of kernel {RELEASE}: expected"),
    ):
        with pytest.raises(UsageError, match=message):
            find_kernel(HOST, WANTED, files)
    with pytest.raises(UntestableError, match=f"kernel is a kernel for {HOST.name}, and the guest"):
        find_kernel(FOREIGN, WANTED, KernelFiles(image))
    refuse_to_read(monkeypatch, image)
    with pytest.raises(UsageError, match=r"--kernel .*: this user may not read.*chmod a\+r"):
        find_kernel(HOST, WANTED, KernelFiles(image))


def test_a_folder_that_the_user_may_not_read_is_not_blamed_on_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, modules = tmp_path / "kernel", tmp_path / "private"
    image.write_bytes(KERNELS[HOST.name])
    modules.mkdir()

    def refusing(step: Callable[..., Iterator[Path]]) -> Callable[..., Iterator[Path]]:
        def take(folder: Path, *arguments: str) -> Iterator[Path]:
            if folder.is_relative_to(tmp_path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            return step(folder, *arguments)

        return take

    for step in ("iterdir", "glob"):
        monkeypatch.setattr(Path, step, refusing(getattr(Path, step)))
    with pytest.raises(UsageError, match=r"--modules .*private: this user may not read the folder"):
        find_kernel(HOST, WANTED, KernelFiles(image, modules))
    assert find_kernel(HOST, WANTED, KernelFiles(image)).modules.folder is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match="--kernel /proc/self/mem: Input/output error; use a"):
        find_kernel(HOST, WANTED, KernelFiles(Path("/proc/self/mem")))


def test_a_guest_that_cannot_have_such_pages_is_not_advised() -> None:
    for page_bytes, advised in ((None, True), (64 << 10, False)):
        search = kernels._Search(HOST, WANTED, page_bytes, Path("/"))
        assert ("--guest bare" in search.explanation()) is advised


def test_a_kernel_with_pages_of_another_size_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(KERNELS[HOST.name])
    size = kernel_of_file(image, HOST.name, origin="here").page_bytes
    assert size is not None
    assert find_kernel(HOST, WANTED, KernelFiles(image), size).page_bytes == size
    with pytest.raises(UntestableError, match=f"has pages of {size} bytes, not of {size * 4}"):
        find_kernel(HOST, WANTED, KernelFiles(image), size * 4)


@pytest.mark.usefixtures("no_packages")
def test_a_kernel_that_no_distribution_packages_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Kernel(tmp_path / "Image", Modules("7.0", None), 65536, "built by dmaproof")
    monkeypatch.setattr(kernels, "built_kernel", lambda architecture, page_bytes: built)
    assert find_kernel(FOREIGN, WANTED, page_bytes=65536, root=tmp_path) == built
    with pytest.raises(UntestableError, match="no kernel for the Linux guest"):
        find_kernel(FOREIGN, WANTED, root=tmp_path)  # of any size: nothing is built

    def fail(*arguments: object) -> None:
        raise UntestableError("make is not installed")

    monkeypatch.setattr(kernels, "built_kernel", fail)
    with pytest.raises(UntestableError, match=r"\n    make is not installed"):
        find_kernel(FOREIGN, WANTED, page_bytes=65536, root=tmp_path)


def test_an_unpacked_kernel_is_cached_by_its_content(tmp_path: Path, cache: Path) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(KERNELS[HOST.name])
    first = kernel_of_file(image, HOST.name, origin="here")
    unpacked = first.image.stat()
    image.rename(tmp_path / "renamed")
    again = kernel_of_file(tmp_path / "renamed", HOST.name, origin="there")
    assert again.image == first.image
    assert again.image.stat().st_ino == unpacked.st_ino
    (tmp_path / "renamed").write_bytes(gzip.compress(KERNELS[HOST.name]))
    other = kernel_of_file(tmp_path / "renamed", HOST.name, origin="there")
    assert other.image != first.image
    assert other.image.read_bytes() == first.image.read_bytes()
    assert {other.image.parent.parent, first.image.parent.parent} == {cache}


def test_a_damaged_cache_is_reported(tmp_path: Path) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(KERNELS[HOST.name])
    folder = kernel_of_file(image, HOST.name, origin="here").image.parent
    (folder / "kernel.json").write_text("{")
    with pytest.raises(UntestableError, match=rf"kernel in {folder} is damaged .*; remove this"):
        kernel_of_file(image, HOST.name, origin="here")


def test_the_source_of_the_kernel_is_known_without_a_fetch(
    tmp_path: Path, packages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: str | None = "linux-image-amd64"
    monkeypatch.setattr(kernels, "fetchable_package", lambda architecture: known)
    source = kernel_source(HOST, root=tmp_path)
    assert (source.text, source.is_fetched) == ("package linux-image-amd64", False)
    known = None
    with pytest.raises(UntestableError, match="no kernel for the Linux guest"):
        kernel_source(HOST, root=tmp_path)
    install(tmp_path, built_in="virtio_pci virtio_blk")
    source = kernel_source(HOST, root=tmp_path)
    assert source.is_fetched
    assert source.text.startswith(f"{RELEASE} (the host's ")
    assert packages == []
