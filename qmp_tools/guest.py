"""The guests: built on this machine, kept in the user's cache, and understood when they speak.

The Linux guest is the distribution's own kernel, unpacked to its ELF (QEMU enters that by PVH,
which saves the decompressor's seconds under TCG), with an initramfs of one static program,
``guests/linux/init.c``, and the virtio modules. The probe guest (``guests/probe``) is a few dozen
bytes of machine code. See docs/guests.md.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import lzma
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from . import archive

Say = Callable[[str], None]

_KERNEL_PACKAGE: Final = "linux-image-amd64"
_COMMAND_LINE: Final = (
    "console=ttyS0 quiet panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check "
    "random.trust_cpu=on cryptomgr.notests transparent_hugepage=never"
)
_MODULES: Final = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)
"""In the order in which they depend on each other."""


@dataclass(frozen=True)
class Workload:
    """What the Linux guest's init does; the same names as its parameters. Sizes in pages.

    `write_every`: one of so many requests writes a block or reads one back; 0: none does.
    `max_pages`: the most pages that one request reads.
    """

    threads: int = 4
    hot: int = 1024
    once: int = 8192
    churn: int = 4096
    seed: int = 1
    write_every: int = 16
    max_pages: int = 8

    def __post_init__(self) -> None:
        bounds = {
            "threads": (1, 64),
            "hot": (64, 1 << 24),
            "once": (0, 1 << 24),
            "churn": (0, 1 << 24),
            "seed": (0, (1 << 64) - 1),
            "write_every": (0, 1 << 30),
            "max_pages": (1, 15),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise UsageError(
                    f"workload: {name}={getattr(self, name)} is not between {low} and {high}"
                )


@dataclass(frozen=True)
class LinuxGuest:
    """A kernel as ELF and its initramfs."""

    kernel: Path
    initramfs: Path
    version: str

    def command_line(self, workload: Workload) -> str:
        """The kernel's command line, behind ``--`` the parameters of init."""
        parameters = " ".join(f"{name}={value}" for name, value in asdict(workload).items())
        return f"{_COMMAND_LINE} -- {parameters}"


@dataclass(frozen=True)
class GuestReport:
    """One line of the guest: a verb, and what it says by key."""

    verb: str
    values: dict[str, str]


def parse_line(line: str) -> GuestReport:
    """Parse ``verb key=value key="two words"``.

    Raises:
        UntestableError: the line is nothing that a guest of ours says.
    """
    try:
        verb, *pairs = shlex.split(line)
        values = dict(pair.split("=", 1) for pair in pairs)
    except ValueError:
        raise UntestableError(f"the guest said something unintelligible: {line!r}") from None
    return GuestReport(verb, values)


# Building ---------------------------------------------------------------------------------------


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dmaproof" / "guest"


def _sources() -> Path:
    """The folder ``guests``: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    for folder in (here / "guests", here.parent / "guests"):
        if (folder / "linux" / "init.c").is_file():
            return folder
    raise UntestableError(f"the guests' sources are missing beside {here}; install dmaproof anew")


@contextmanager
def _fresh_folder(target: Path) -> Iterator[Path | None]:
    """A folder to fill in `target`'s place, or None if another process has filled it meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            yield None
            return
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=target.parent))
        try:
            yield fresh
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def linux_guest(say: Say = lambda text: None) -> LinuxGuest:
    """The Linux guest; the first time its kernel is fetched and its init compiled.

    Raises:
        UntestableError: the kernel cannot be had, or there is no compiler.
    """
    kernel = _linux_kernel(say)
    version = (kernel / "version").read_text().strip()
    init = _sources() / "linux" / "init.c"
    digest = hashlib.sha256(version.encode() + b"\0" + init.read_bytes()).hexdigest()[:16]
    target = _cache() / f"linux-{digest}"
    if not target.is_dir():
        with _fresh_folder(target) as fresh:
            if fresh is not None:
                say("building the guest's initramfs")
                compile_c(init, fresh / "init", "-static", "-pthread", "-std=c11")
                (fresh / "initramfs").write_bytes(
                    _initramfs((fresh / "init").read_bytes(), kernel / "modules")
                )
    return LinuxGuest(kernel / "vmlinux", target / "initramfs", version)


def _linux_kernel(say: Say) -> Path:
    """A folder with ``vmlinux``, ``modules/`` and ``version``."""
    target = _cache() / "kernel"
    if target.is_dir():
        return target
    with _fresh_folder(target) as fresh:
        if fresh is not None:
            real = archive.dependencies(_KERNEL_PACKAGE)
            if not real:
                raise UntestableError(
                    f"apt knows no package {_KERNEL_PACKAGE}: run 'apt-get update' once"
                )
            say(f"fetching the guest's kernel ({real[0]}), once")
            unpacked = fresh / "unpacked"
            archive.unpack(archive.fetch_own(real[0], fresh), unpacked)
            image = next((unpacked / "boot").glob("vmlinuz-*"))
            (fresh / "vmlinux").write_bytes(kernel_elf(image.read_bytes()))
            (fresh / "version").write_text(image.name.removeprefix("vmlinuz-"))
            _pick_modules(unpacked, fresh / "modules")
            shutil.rmtree(unpacked)
            for package in fresh.glob("*.deb"):
                package.unlink()
    return target


def kernel_elf(image: bytes) -> bytes:
    """The ELF inside a bzImage (Linux x86 boot protocol 2.08: payload_offset, payload_length).

    Raises:
        UntestableError: this is no such image, or its compression is not known here.
    """
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise UntestableError("the kernel is no bzImage")
    start = (image[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[start + offset : start + offset + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload[:-4])  # the uncompressed size is put behind it
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _pipe(["zstd", "-dcq"], payload)
    raise UntestableError(f"the kernel's compression ({payload[:4].hex()}) is not known here")


def _pipe(command: list[str], data: bytes) -> bytes:
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=120, check=False)
    except FileNotFoundError:
        raise UntestableError(
            f"{command[0]} is needed to unpack the kernel: apt-get install {command[0]}"
        ) from None
    if not done.stdout:
        raise UntestableError(f"{command[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _pick_modules(unpacked: Path, folder: Path) -> None:
    folder.mkdir()
    order = []
    for name in _MODULES:
        found = next((unpacked / "lib/modules").rglob(f"{name}.ko*"), None)
        if found is None:  # then it is built into the kernel
            continue
        content = found.read_bytes()
        if found.suffix == ".xz":
            content = lzma.decompress(content)
        (folder / f"{name}.ko").write_bytes(content)
        order.append(f"/modules/{name}.ko\n")
    (folder / "order").write_text("".join(order))


def compile_c(source: Path, target: Path, *options: str) -> None:
    """Compile `source` with the machine's C compiler.

    Raises:
        UntestableError: there is no compiler, or it refuses.
    """
    command = ["cc", "-O2", *options, "-o", str(target), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        raise UntestableError(
            "a C compiler is needed to build the guest: apt-get install gcc libc6-dev"
        ) from None
    if done.returncode:
        raise UntestableError(f"{shlex.join(command)} failed:\n{done.stderr}")


def _initramfs(init: bytes, modules: Path) -> bytes:
    files = {f"modules/{file.name}": file.read_bytes() for file in sorted(modules.iterdir())}
    return newc_archive({"init": init, **files})


def newc_archive(files: dict[str, bytes]) -> bytes:
    """A cpio archive in the 'newc' form (kernel documentation, initramfs buffer format).

    Folders are made for the `files`, all of which may be executed.
    """
    archive_bytes = bytearray()

    def add(name: str, mode: int, content: bytes = b"") -> None:
        encoded = name.encode() + b"\0"
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        archive_bytes.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        archive_bytes.extend(bytes(-len(archive_bytes) % 4))
        archive_bytes.extend(content)
        archive_bytes.extend(bytes(-len(archive_bytes) % 4))

    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    for folder in ("dev", "proc", *folders):
        add(folder, 0o040755)
    for name, content in files.items():
        add(name, 0o100755, content)
    add("TRAILER!!!", 0)
    return bytes(archive_bytes)


def probe_guest() -> Path:
    """The freestanding guest whose vCPU dirties a few pages for ever.

    Raises:
        UntestableError: there is no compiler.
    """
    source = _sources() / "probe" / "probe.S"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    target = _cache() / f"probe-{digest}"
    if not target.is_dir():
        with _fresh_folder(target) as fresh:
            if fresh is not None:
                options = ("-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none")
                compile_c(source, fresh / "probe", *options, "-Wl,-Ttext=0x100000")
    return target / "probe"
