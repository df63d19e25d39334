"""The distribution's kernel packages: which are searched, and what a fetched one becomes."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.arch import ARCHITECTURES, find_architecture
from qmp_tools.arch.architecture import KernelPackage
from qmp_tools.guest.kernel_package import fetchable_package, package_kernels
from qmp_tools.host import archive
from qmp_tools.host.archive import OwnRelease
from support.kernel_files import ARM, RELEASE, RISCV, bz_image, put, vmlinux

HOST = find_architecture(None)
FOREIGN = next(each for each in ARCHITECTURES.values() if each is not HOST)
KERNELS = {
    "x86_64": bz_image(gzip.compress(vmlinux())),
    "aarch64": ARM,
    "riscv64": RISCV,
}
DEBIAN = OwnRelease("Debian GNU/Linux", ("debian",), "bookworm")
UBUNTU = OwnRelease("Ubuntu", ("ubuntu", "debian"), "noble")
META = HOST.kernels[4096].name


class FakeArchive:
    """An archive of packages: their dependencies by name; some have a kernel or modules."""

    def __init__(self, packages: dict[str, Sequence[str]]) -> None:
        self.packages = packages
        self.fetched: list[str] = []
        self.suites: list[str] = []

    def dependencies(self, package: str) -> list[str]:
        if package not in self.packages:
            raise UntestableError(f"no package {package}")
        return list(self.packages[package])

    def fetch(self, package: str) -> Path:
        self.fetched.append(package)
        return Path(package)

    def unpack(self, package: Path, system: Path) -> None:
        """Write the files of a package: a kernel, its modules, or a document."""
        name = package.name
        system.mkdir(parents=True, exist_ok=True)
        if name.startswith(
            ("linux-image-6.12.9-whole", "linux-image-6.12.9-generic", "linux-binary-6")
        ):
            image = system / f"boot/vmlinuz-{RELEASE}"
            config = image.with_name(f"config-{RELEASE}")
            if name.startswith("linux-binary"):
                image = system / f"usr/lib/modules/{RELEASE}/vmlinuz"
                config = image.with_name("config")
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(KERNELS[(FOREIGN if self.suites else HOST).name])
            config.write_text("CONFIG_VIRTIO_BLK=m\n")
        if name.startswith(("linux-image-6.12.9-whole", "linux-modules-6")):
            folder = system / "usr/lib/modules" / RELEASE
            put(folder / "kernel", "virtio_blk", "")
            (folder / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeArchive:
    """The archive of a Debian machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = FakeArchive({})
    monkeypatch.setattr(archive, "own_release", lambda: DEBIAN)
    monkeypatch.setattr(archive, "own_origin", lambda: "Debian")
    monkeypatch.setattr(archive, "own_codename", lambda origin: "bookworm")
    monkeypatch.setattr(archive, "dependencies", fake.dependencies)
    monkeypatch.setattr(archive, "fetch_own", lambda package, folder: fake.fetch(package))
    monkeypatch.setattr(archive, "unpack", fake.unpack)

    def private(suite: str, folder: Path, debian: str, **options: object) -> FakeArchive:
        fake.suites.append(f"{suite} {debian} {options}")
        return fake

    monkeypatch.setattr(archive, "Archive", private)
    return fake


WHOLE = {META: ["linux-image-6.12.9-whole"], "linux-image-6.12.9-whole": ["kmod", "linux-base"]}
SPLIT = {
    META: ["linux-base-x", "linux-image-6.12.9-x", "linux-modules-x"],
    "linux-base-x": ["linux-base-6.12.9-x"],
    "linux-base-6.12.9-x": [],
    "linux-image-6.12.9-x": ["linux-base-6.12.9-x", "linux-binary-6.12.9-x"],
    "linux-binary-6.12.9-x": ["linux-base-6.12.9-x"],
    "linux-modules-x": ["linux-modules-6.12.9-x"],
    "linux-modules-6.12.9-x": ["kmod"],
}


@pytest.mark.parametrize("known", [WHOLE, SPLIT], ids=["Debian 12 and 13", "newer Debian"])
def test_a_kernel_is_put_together_from_its_packages(
    packages: FakeArchive, known: dict[str, Sequence[str]]
) -> None:
    packages.packages = known
    failures: list[str] = []
    (kernel,) = package_kernels(HOST, None, failures)
    assert failures == []
    assert packages.fetched == list(dict.fromkeys(packages.fetched))
    assert set(packages.fetched) == known.keys()
    real = [name for name in known if name.startswith("linux-image-6")]
    assert str(kernel) == f"{RELEASE} (package {real[0]})"
    assert kernel.page_bytes == 4096 or HOST.name == "aarch64"
    assert list(kernel.modules.load_order(["virtio_pci", "virtio_blk"])) == ["virtio_blk"]
    with pytest.raises(UntestableError, match=r"CONFIG_VIRTIO_NET is not set in .*/config"):
        kernel.modules.load_order(["virtio_net"])
    names = sorted(file.name for file in kernel.image.parent.iterdir())
    assert names == ["config", "image", "kernel.json", "modules", "origin"]

    packages.fetched.clear()
    assert list(package_kernels(HOST, None, None)) == [kernel]
    assert packages.fetched == []


def test_a_package_without_a_kernel_is_reported(packages: FakeArchive) -> None:
    packages.packages = {META: []}
    failures: list[str] = []
    assert list(package_kernels(HOST, None, failures)) == []
    assert failures == [
        f"package {META}: {META} of the distribution's archive: no kernel (vmlinuz) is in these "
        "packages"
    ]


def test_ubuntu_has_a_small_and_a_complete_kernel(
    packages: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "own_release", lambda: UBUNTU)
    packages.packages = {
        "linux-image-virtual": ["linux-image-6.12.9-generic"],
        "linux-image-generic": ["linux-image-6.12.9-generic", "linux-modules-6.12.9-extra"],
        "linux-image-6.12.9-generic": ["kmod", "linux-modules-6.12.9-generic"],
        "linux-modules-6.12.9-generic": [],
        "linux-modules-6.12.9-extra": ["linux-modules-6.12.9-generic"],
    }
    found = package_kernels(HOST, None, [])
    assert next(found).origin == "package linux-image-6.12.9-generic"
    assert "linux-modules-6.12.9-extra" not in packages.fetched
    next(found)
    assert "linux-modules-6.12.9-extra" in packages.fetched
    assert fetchable_package(HOST) == "linux-image-virtual"


def test_a_newer_release_is_searched_for_what_the_own_one_lacks(packages: FakeArchive) -> None:
    package = KernelPackage("linux-image-other", "trixie")
    failures: list[str] = []
    assert list(package_kernels(replace(FOREIGN, kernels={4096: package}), None, failures)) == []
    assert [suite.split()[:2] for suite in packages.suites] == [
        ["bookworm", FOREIGN.debian],
        ["trixie", FOREIGN.debian],
    ]
    assert failures == [
        "package linux-image-other: no package linux-image-other",
        "package linux-image-other of trixie: no package linux-image-other",
    ]


def test_the_updates_of_a_release_may_be_missing(
    packages: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.packages = {
        FOREIGN.kernels[4096].name: ["linux-image-6.12.9-whole"],
        "linux-image-6.12.9-whole": [],
    }
    tried = []

    def private(suite: str, folder: Path, debian: str, **options: object) -> FakeArchive:
        tried.append(options)
        if options.get("pockets", True):
            raise UntestableError("the mirror is not complete")
        packages.suites.append(suite)
        return packages

    monkeypatch.setattr(archive, "Archive", private)
    (kernel,) = package_kernels(FOREIGN, None, [])
    assert kernel.version == RELEASE
    assert tried == [{"origin": "Debian"}, {"origin": "Debian", "pockets": False}]


def test_without_a_package_of_this_page_size_nothing_is_searched(packages: FakeArchive) -> None:
    failures: list[str] = []
    assert list(package_kernels(HOST, 12345, failures)) == []
    assert failures == [f"no package with a kernel for {HOST.name} has pages of 12345 bytes"]
