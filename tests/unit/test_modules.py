"""The modules of any distribution's kernel: which exist, which are built in, and their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.guest.modules import Modules, find_modules
from support.kernel_files import module, put

VERSION = "6.1.0-9"


@pytest.fixture(params=["lib/modules", "usr/lib/modules"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A system, or an unpacked kernel package."""
    folder = tmp_path / request.param / VERSION
    drivers = folder / "kernel/drivers"
    put(drivers, "sd_mod", "scsi_mod,t10-pi")
    put(drivers, "scsi_mod", "scsi-common", ".xz")
    put(drivers, "t10-pi", "crc64", ".zst")
    put(drivers, "scsi_common", "", ".gz")
    put(drivers, "unwanted", "sd_mod")
    (folder / "modules.builtin").write_text("kernel/lib/crc64.ko\nkernel/drivers/built-in.ko\n")
    return tmp_path


def of_system(system: Path) -> Modules:
    return find_modules(VERSION, system / f"boot/vmlinuz-{VERSION}", system)


def test_modules_come_after_what_they_depend_on(system: Path) -> None:
    loaded = of_system(system).load_order(["built_in", "sd_mod"])
    assert list(loaded) == ["scsi_common", "scsi_mod", "t10_pi", "sd_mod"]
    assert loaded["scsi_mod"] == module("scsi-common")
    assert list(of_system(system).load_order(["t10_pi"])) == ["t10_pi"]  # crc64 is built in


def test_picked_modules_are_those_of_the_same_kernel(system: Path) -> None:
    picked = system / "picked"
    of_system(system).pick(["sd_mod", "built_in", "vmxnet3"], picked)
    names = sorted(file.name for file in picked.glob("*.ko"))
    assert names == ["scsi_common.ko", "scsi_mod.ko", "sd_mod.ko", "t10_pi.ko"]
    wanted = ["built_in", "sd_mod"]
    assert Modules(VERSION, picked).load_order(wanted) == of_system(system).load_order(wanted)
    with pytest.raises(UntestableError, match=r"6\.1\.0-9 has no module vmxnet3"):
        Modules(VERSION, picked).load_order(["vmxnet3"])


def test_a_missing_module_names_the_option_of_the_kernel(system: Path) -> None:
    message = (
        r"the kernel 6\.1\.0-9 has no module vmxnet3: .*/lib/modules/6\.1\.0-9 has neither a file "
        r"for it nor a line in modules\.builtin; use a kernel with CONFIG_VMXNET3=m or "
        r"CONFIG_VMXNET3=y"
    )
    with pytest.raises(UntestableError, match=message):
        of_system(system).load_order(["sd_mod", "vmxnet3"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("CONFIG_VMXNET3=m", r"config-6\.1\.0-9 has CONFIG_VMXNET3=m; .*linux-modules-extra"),
        ("# CONFIG_VMXNET3 is not set", r"CONFIG_VMXNET3 is not set in .*config-6\.1\.0-9; use"),
    ],
)
def test_the_configuration_says_why_a_module_is_missing(
    system: Path, line: str, message: str
) -> None:
    (system / "boot").mkdir()
    (system / f"boot/config-{VERSION}").write_text(f"CONFIG_VMXNET=y\n{line}\n")
    with pytest.raises(UntestableError, match=message):
        of_system(system).load_order(["vmxnet3"])


def test_a_missing_list_of_what_is_built_in_is_not_the_kernels_fault(system: Path) -> None:
    built_in = next(system.rglob("modules.builtin"))
    built_in.rename(built_in.with_name("modules.order"))
    built_in.with_name("modules.dep").write_text("kernel/drivers/sd_mod.ko:\n")
    with pytest.raises(UntestableError, match=r"no module vmxnet3: .*; copy modules\.builtin, wh"):
        of_system(system).load_order(["vmxnet3"])


@pytest.mark.parametrize("name", ["modules.dep", "modules.builtin", "config"])
def test_a_damaged_list_is_not_a_defect(system: Path, name: str) -> None:
    folder = next(system.rglob("modules.builtin")).parent
    (folder / name).write_bytes(b"\xff\xfe\x80 kernel\n" * 9)
    with pytest.raises(UntestableError, match="has no module vmxnet3"):
        of_system(system).load_order(["vmxnet3"])


def test_a_damaged_name_of_a_dependency_is_not_a_defect(system: Path) -> None:
    file = next(system.rglob("sd_mod.ko"))
    file.write_bytes(file.read_bytes().replace(b"scsi_mod", b"scsi\xffmod"))
    with pytest.raises(UntestableError, match="has no module scsi"):
        of_system(system).load_order(["sd_mod"])


def test_a_missing_dependency_is_named(system: Path) -> None:
    next(system.rglob("t10-pi.ko.zst")).unlink()
    with pytest.raises(UntestableError, match=r"has no module t10_pi: .*whose modules are compl"):
        of_system(system).load_order(["sd_mod"])


def test_the_list_of_depmod_decides_between_two_modules_of_a_name(system: Path) -> None:
    folder = of_system(system).folder
    assert folder is not None
    newer = put(folder / "updates", "unwanted", "")
    names = [
        str(file.relative_to(folder))
        for file in folder.rglob("*.ko*")
        if "unwanted" not in str(file)
    ]
    lines = [f"{name}:\n" for name in (*names, newer.relative_to(folder))]
    (folder / "modules.dep").write_text("".join(lines))
    assert of_system(system).load_order(["unwanted"]) == {"unwanted": module("")}


@pytest.mark.parametrize("image", ["boot/vmlinuz", f"lib/modules/{VERSION}/vmlinuz", "vmlinuz"])
def test_modules_are_found_above_the_kernel(system: Path, image: str) -> None:
    assert find_modules(VERSION, system / image, None).folder == of_system(system).folder


def test_a_build_tree_has_modules_and_configuration(tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("drivers/virtio/virtio_pci.ko\n")
    (tmp_path / ".config").write_text("CONFIG_VIRTIO_BLK=m\n")
    put(tmp_path / "drivers/block", "virtio_blk", "")
    found = find_modules("6.19-rc1", tmp_path / "arch/x86/boot/bzImage", None)
    assert found == Modules("6.19-rc1", tmp_path, tmp_path / ".config")
    assert list(found.load_order(["virtio_pci", "virtio_blk"])) == ["virtio_blk"]


@pytest.mark.parametrize("given", [".", "lib", "lib/modules", f"lib/modules/{VERSION}"])
def test_the_folder_may_be_given_in_several_ways(tmp_path: Path, given: str) -> None:
    folder = tmp_path / "lib/modules" / VERSION
    put(folder, "virtio_blk", "")
    (folder / "modules.order").touch()
    image = tmp_path / "elsewhere/vmlinuz"
    found = find_modules(VERSION, image, tmp_path / given)
    assert found.folder == (None if given == "lib" else folder)
    assert find_modules("another version", image, tmp_path).folder is None


def test_a_module_of_another_kernel_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / VERSION
    file = put(folder, "virtio_blk", "")
    file.write_bytes(module("") + b"vermagic=6.12.9 SMP\0")
    message = (
        rf"virtio_blk\.ko is for kernel 6\.12\.9, and the kernel is {VERSION}; give .*--modules"
    )
    renamed = folder.rename(tmp_path / "modules")
    with pytest.raises(UntestableError, match=message):
        Modules(VERSION, renamed).load_order(["virtio_blk"])
    assert Modules("6.12.9", renamed).load_order(["virtio_blk"])
    assert Modules("bzImage", renamed).load_order(["virtio_blk"])
    compatible = renamed.rename(folder)
    assert Modules(VERSION, compatible).load_order(["virtio_blk"])


def test_without_modules_only_built_in_drivers_are_usable(tmp_path: Path) -> None:
    assert Modules(VERSION, None).load_order(["virtio_pci", "virtio_blk"]) == {}
    config = tmp_path / "config"
    config.write_text("CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_BLK=m\n")
    modules = Modules(VERSION, None, config)
    assert modules.load_order(["virtio_pci"]) == {}
    with pytest.raises(UntestableError, match=r"CONFIG_VIRTIO_BLK=m; give the folder with --modul"):
        modules.load_order(["virtio_pci", "virtio_blk"])
    with pytest.raises(UntestableError, match=r"CONFIG_VIRTIO_NET is not set in .*config; use a"):
        modules.load_order(["virtio_net"])


def test_a_module_that_cannot_be_read_is_named(system: Path) -> None:
    file = next(system.rglob("sd_mod.ko"))
    file.unlink()
    file.mkdir()
    with pytest.raises(UntestableError, match=r"module .*/sd_mod\.ko: Is a directory"):
        of_system(system).load_order(["sd_mod"])
