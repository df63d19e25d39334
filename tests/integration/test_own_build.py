"""``dmaproof qemu build``: a small source tree, with a configure and a Makefile of its own.

The tree is built by the machine's own compiler, so nothing is fetched. What differs from a real
build is where the tools, the libraries and the source package come from.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.arch import find_architecture
from qmp_tools.arch.architecture import Architecture
from qmp_tools.cli.main import main
from qmp_tools.qemu import own_build
from qmp_tools.qemu.builds import QemuBuild
from qmp_tools.qemu.choice import find_qemu

_NEEDED: Final = ("make", "cc", "patch", "ldd")
pytestmark = [
    pytest.mark.skipif(not find_architecture(None).is_host, reason="no such guest"),
    pytest.mark.skipif(
        not all(map(shutil.which, _NEEDED)), reason=f"needs the programs {', '.join(_NEEDED)}"
    ),
]

CONFIGURE: Final = """\
#!/bin/sh
case $1 in --help) echo '--target-list=LIST --disable-download tcg tools'; exit ;; esac
echo "$@" >options
cat >Makefile <<END
all = {programs}
\\$(all): ${{0%/*}}/qemu.c
\tmkdir -p storage-daemon
\tcc -o \\$@ ${{0%/*}}/qemu.c
END
"""
PROGRAM: Final = """\
#include <stdio.h>
int main(void)
{
    puts("QEMU emulator version 9.9.9");
    puts("as it was released");
    return 0;
}
"""
PATCH: Final = """\
--- a/qemu.c
+++ b/qemu.c
@@ -2,6 +2,6 @@
 int main(void)
 {
     puts("QEMU emulator version 9.9.9");
-    puts("%s");
+    puts("%s");
     return 0;
 }
"""


def patch_file(folder: Path, name: str, old: str, new: str) -> Path:
    file = folder / name
    file.write_text(PATCH % (old, new))
    return file


def write_tree(folder: Path, program: str) -> Path:
    """Make a source tree with the files that a build needs."""
    folder.mkdir(parents=True)
    programs = f"{program} qemu-img storage-daemon/qemu-storage-daemon"
    (folder / "configure").write_text(CONFIGURE.format(programs=programs))
    (folder / "configure").chmod(0o755)
    (folder / "VERSION").write_text("9.9.9\n")
    (folder / "qemu.c").write_text(PROGRAM)
    (folder / "roms").mkdir()
    return folder


def write_package(folder: Path, program: str) -> Path:
    """Make a source package of this tree with one patch of the distribution; return its .dsc."""
    packed = folder.parent / "packed"
    tree = write_tree(packed / "qemu-9.9.9", program)
    patches = packed / "debian/patches"
    patches.mkdir(parents=True)
    (patches / "series").write_text("# the distribution's patches\n\nown.patch\n")
    patch_file(patches, "own.patch", "as it was released", "as Debian patches it")
    folder.mkdir()
    sums = []
    for name, content in (("qemu_9.9.9.orig", tree), ("qemu_9.9.9-1.debian", packed / "debian")):
        file = folder / f"{name}.tar.gz"
        with tarfile.open(file, "w:gz") as tar:
            tar.add(content, arcname=content.name)
        size, checksum = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
        sums.append(f" {checksum} {size} {file.name}\n")
    dsc = folder / "qemu_9.9.9-1.dsc"
    dsc.write_text(
        "Format: 3.0 (quilt)\nSource: qemu\nVersion: 1:9.9.9-1\nChecksums-Sha256:\n" + "".join(sums)
    )
    return dsc


@dataclass
class FakeArchive:
    """An archive with one source package."""

    dsc: Path
    suite: str = "trixie"

    def fetch_source(self, package: str) -> Path:
        return self.dsc


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """Let builds use this machine's compiler, libraries and folders below `tmp_path`."""
    architecture = find_architecture(None)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = FakeArchive(write_package(tmp_path / "package", architecture.qemu_program))

    def unpack_qemu(archive: FakeArchive, architecture: Architecture, build: Path) -> None:
        listed = subprocess.run(["ldd", "/bin/true"], capture_output=True, text=True, check=True)
        libraries = build / "root/usr/lib/libraries"
        libraries.mkdir(parents=True)
        (build / "root/usr/bin").mkdir()
        for word in listed.stdout.split():
            if word.startswith("/"):
                shutil.copy(word, libraries)

    monkeypatch.setattr(own_build, "_tools", lambda suite: Path("/"))
    monkeypatch.setattr(own_build, "find_suite", lambda *wanted: (archive, "9.9.9"))
    monkeypatch.setattr(own_build, "unpack_qemu", unpack_qemu)
    return architecture


def output_of(build: QemuBuild) -> str:
    return subprocess.run([build.path], capture_output=True, text=True, check=True).stdout


def folders(tmp_path: Path) -> set[str]:
    """Return the names of all folders of builds and of the cache."""
    return {
        path.name
        for folder in (tmp_path / "data/dmaproof/qemu", tmp_path / "cache/dmaproof/qemu")
        for path in (*folder.glob("*"), *folder.glob("*/*"))
        if path.is_dir()
    }


def test_a_patched_build_is_found_by_its_name(
    architecture: Architecture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = patch_file(tmp_path, "first.patch", "as Debian patches it", "as I patch it")
    second = patch_file(tmp_path, "second.patch", "as I patch it", "fixed")
    build = own_build.build_patched("9.9", architecture, [first, second], "fixed")
    assert build.version == "9.9.9+fixed"
    assert output_of(build).endswith("\nfixed\n")
    assert find_qemu("9.9+fixed") == find_qemu("9.9.9+fixed") == build.path
    assert build.path.with_name("qemu-img").exists()
    with pytest.raises(UsageError, match=r"--qemu 9\.9\.9: neither a program"):
        find_qemu("9.9.9")
    assert main(["qemu", "list"]) == 0
    assert f"9.9.9+fixed\ttrixie\t{architecture.name}\t{build.path}\tfirst.patch, second.patch" in (
        capsys.readouterr().out
    )


def test_without_patches_the_build_is_the_distributions(
    architecture: Architecture, tmp_path: Path
) -> None:
    build = own_build.build_patched("9.9", architecture, [])
    assert build.version == "9.9.9+built"
    assert output_of(build).endswith("\nas Debian patches it\n")


def test_the_same_source_and_patches_are_built_once(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = patch_file(tmp_path, "one.patch", "as Debian patches it", "fixed")
    build = own_build.build_patched("9.9", architecture, [patch])
    before = build.path.stat().st_mtime_ns
    assert own_build.build_patched("9.9", architecture, [patch]).path == build.path
    assert build.path.stat().st_mtime_ns == before
    patch_file(tmp_path, "one.patch", "as Debian patches it", "fixed again")
    assert output_of(own_build.build_patched("9.9", architecture, [patch])).endswith("again\n")


def test_a_patch_that_does_not_apply_is_named_and_leaves_no_build(
    architecture: Architecture, tmp_path: Path
) -> None:
    own_build.build_patched("9.9", architecture, [])
    before = folders(tmp_path)
    good = patch_file(tmp_path, "good.patch", "as Debian patches it", "fixed")
    bad = patch_file(tmp_path, "bad.patch", "of another version", "fixed")
    with pytest.raises(
        UsageError, match=r"--patch .*bad\.patch: the patch does not apply to QEMU 9"
    ):
        own_build.build_patched("9.9", architecture, [good, bad])
    assert folders(tmp_path) == before


def test_the_compilers_errors_are_reported(architecture: Architecture, tmp_path: Path) -> None:
    own_build.build_patched("9.9", architecture, [])
    before = folders(tmp_path)
    bad = patch_file(tmp_path, "bad.patch", "as Debian patches it", '" no string')
    with pytest.raises(UntestableError, match=r"building QEMU failed:(.|\n)*qemu\.c:6:\d+: error:"):
        own_build.build_patched("9.9", architecture, [bad])
    assert folders(tmp_path) == before


def test_a_tree_is_built_again_after_a_change(architecture: Architecture, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "own", architecture.qemu_program)
    build = own_build.build_own(tree, architecture, name="mine")
    assert build.version == "9.9.9+mine"
    assert output_of(build).endswith("\nas it was released\n")
    (options,) = (tmp_path / "cache").rglob("build/options")
    known = "--disable-download --enable-tools --enable-tcg"
    assert options.read_text().split(maxsplit=1)[1] == f"{known}\n"
    first = options.stat().st_mtime_ns
    (tree / "qemu.c").write_text(PROGRAM.replace("as it was released", "changed"))
    assert output_of(own_build.build_own(tree, architecture, name="mine")).endswith("changed\n")
    assert options.stat().st_mtime_ns == first  # only compiled again
    assert {path.name for path in tree.iterdir()} == {"configure", "VERSION", "qemu.c", "roms"}


@pytest.mark.parametrize(
    ("missing", "message"),
    [("VERSION", "this is not QEMU's source: VERSION not found"), ("configure", "configure not")],
)
def test_another_folder_is_not_qemus_source(
    architecture: Architecture, tmp_path: Path, missing: str, message: str
) -> None:
    tree = write_tree(tmp_path / "own", architecture.qemu_program)
    (tree / missing).unlink()
    with pytest.raises(UsageError, match=message):
        own_build.build_own(tree, architecture)
