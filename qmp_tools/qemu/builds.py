"""Fetch QEMU builds from the distribution's archive, each with all its libraries in its own folder.

Packages of a newer release do not install on an older one, but they run from a folder if that
folder's own dynamic loader starts them with its libraries, modules and firmware. A small script
does that, so a fetched QEMU is a path like any other QEMU. The script replaces itself by QEMU
(exec), so the process id stays the same.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from ..arch.architecture import Architecture
from ..host.archive import Archive, own_codename, replace_folder, unpack
from ..host.captured import run_captured
from ..host.unexpected import writing_to
from ..host.user_folders import data_folder

_logger = logging.getLogger(__name__)

_RELEASES: Final = ("bookworm", "trixie")
"""The releases to search for a version, besides the machine's own release."""
_PACKAGES: Final = ("qemu-system-data", "qemu-utils", "ipxe-qemu")
"""The packages besides those of the guest's architecture."""
_VIRTIOFSD: Final = "virtiofsd"
"""A separate package from Debian 13 on."""
_PROGRAMS: Final = {
    "qemu-storage-daemon": "usr/bin",
    "qemu-img": "usr/bin",
    _VIRTIOFSD: "usr/libexec",
}
"""The programs besides QEMU itself, and their folders in the packages."""
_SUITE_FILE: Final = "suite"
_PATCHES_FILE: Final = "patches"
"""Has the names of an own build's patches."""
REMEDY: Final = "set XDG_DATA_HOME to a writable folder with enough space"

_OWN_ROOT: Final = '$(dirname "$(readlink -f "$0")")/root'
_WRAPPER: Final = """\
#!/bin/sh
# Runs the {program} of a folder with the folder's loader, libraries, modules and firmware.
{variables}root={root}
loader=$(echo "$root"/usr/lib/*/ld-linux*.so.*)
libraries=$(dirname "$loader")
export QEMU_MODULE_DIR="$libraries/qemu"
exec "$loader" --library-path "$libraries"{preload} \\
    "$root/{place}/{program}"{firmware} "$@"
"""
_PRELOADING: Final = """\
#!/bin/sh
# Runs a program with a library preloaded.
{variables}export LD_PRELOAD={library}"${{LD_PRELOAD:+:$LD_PRELOAD}}"
exec {program} "$@"
"""
_FIRMWARE: Final = (
    ' -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" \\\n    -L "$root/usr/lib/ipxe/qemu"'
)


@dataclass(frozen=True)
class QemuBuild:
    """A QEMU of the system, a fetched or an own one; `path` is its program.

    The version of an own build ends with its name: '10.0.13+fixed'. `patches` are the names of the
    patches that it was built with.
    """

    version: str
    suite: str
    path: Path
    patches: tuple[str, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether it was built on this machine by `own_build`."""
        return "+" in self.version

    def fits(self, wanted: str) -> bool:
        """Return whether '11.1' or '11.1+NAME' is this version, which may have more numbers.

        An own build fits only with its name.
        """
        numbers, _, name = self.version.partition("+")
        wanted_numbers, _, wanted_name = wanted.partition("+")
        return name == wanted_name and f"{numbers}.".startswith(f"{wanted_numbers}.")


def home(architecture: Architecture) -> Path:
    """Return the folder of the builds for guests of `architecture`.

    Raises:
        UntestableError: this user has no data folder.
    """
    return data_folder() / "qemu" / architecture.name


def _order(build: QemuBuild) -> tuple[tuple[int, ...], str]:
    numbers, _, name = build.version.partition("+")
    return tuple(int(number) for number in re.findall(r"\d+", numbers)), name


def installed(architecture: Architecture) -> list[QemuBuild]:
    """Return the fetched builds for guests of `architecture`, oldest version first."""
    return [build for build in _all_builds(architecture) if not build.is_own]


def own_builds(architecture: Architecture) -> list[QemuBuild]:
    """Return the builds of ``dmaproof qemu build`` for guests of `architecture`, oldest first."""
    return [build for build in _all_builds(architecture) if build.is_own]


def _all_builds(architecture: Architecture) -> list[QemuBuild]:
    try:
        folder = home(architecture)
    except UntestableError:  # without a data folder, no build was fetched
        return []
    files = folder.glob(f"[0-9]*/{_SUITE_FILE}")
    return sorted((_described(file.parent, architecture) for file in files), key=_order)


def _described(folder: Path, architecture: Architecture) -> QemuBuild:
    patches = folder / _PATCHES_FILE
    names = tuple(patches.read_text().splitlines()) if patches.exists() else ()
    suite = (folder / _SUITE_FILE).read_text().strip()
    return QemuBuild(folder.name, suite, folder / architecture.qemu_program, names)


def is_whole(program: Path) -> bool:
    """Return whether `program` is a build with all its libraries in its folder."""
    return (program.parent / _SUITE_FILE).is_file()


def build_folder(version: str, architecture: Architecture) -> Path:
    """Return the folder of a fetched QEMU of this `version`, such as '11.1', or of an own build.

    Raises:
        UsageError: no QEMU of that version was fetched or built.
    """
    for build in reversed([*installed(architecture), *own_builds(architecture)]):
        if build.fits(version):
            return build.path.parent
    raise UsageError(
        f"--qemu {version}: this version was not fetched; run 'dmaproof qemu fetch "
        f"{version}{architecture.fetch_options}', or give the path of a QEMU that you have built, "
        "such as ./build"
    )


def files_of_build(program: Path) -> list[Path]:
    """Return all files of the fetched QEMU with this `program`; empty for any other program."""
    if not is_whole(program):
        return []
    return [file for file in (program.parent / "root").rglob("*") if file.is_file()]


def fetch(wanted: str, architecture: Architecture) -> QemuBuild:
    """Fetch the QEMU of a suite ('trixie-backports') or of a version ('11.1').

    It emulates guests of `architecture`.

    Raises:
        UsageError: the archive's suites have other versions.
        UntestableError: the archive cannot be reached, or the fetched QEMU does not run.
    """
    with writing_to(home(architecture), REMEDY):
        return _fetch(wanted, architecture)


def _fetch(wanted: str, architecture: Architecture) -> QemuBuild:
    with new_build(architecture) as build:
        archive, version = find_suite(wanted, architecture, build.parent)
        _logger.info("fetching QEMU %s and its libraries from %s", version, archive.suite)
        unpack_qemu(archive, architecture, build)
        return finish(build, QemuBuild(version, archive.suite, Path()), architecture)


@contextmanager
def new_build(architecture: Architecture) -> Iterator[Path]:
    """Yield an empty folder for a build; its parent is a temporary folder for anything else."""
    home(architecture).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=home(architecture)) as temporary:
        build = Path(temporary) / "build"
        build.mkdir()
        yield build


def unpack_qemu(archive: Archive, architecture: Architecture, build: Path) -> None:
    """Fetch the QEMU of `archive` with libraries and firmware, and unpack it into `build`."""
    with_virtiofsd = (_VIRTIOFSD,) if archive.has(_VIRTIOFSD) else ()
    fetched = archive.fetch_closure(
        (
            *_qemu_packages(architecture, archive),
            *architecture.firmware_packages,
            *_PACKAGES,
            *with_virtiofsd,
        )
    )
    _logger.info("unpacking %d packages", len(fetched))
    for package in fetched:
        unpack(package, build / "root")


def finish(build: Path, described: QemuBuild, architecture: Architecture) -> QemuBuild:
    """Make the unpacked `build` run, try it, and move it to its place.

    Args:
        build: the folder of `new_build`.
        described: the build; its path is not used.
        architecture: the architecture of its guests.

    Raises:
        UntestableError: QEMU does not run.
    """
    program = architecture.qemu_program
    make_whole(build, {program: "usr/bin", **_PROGRAMS})
    (build / _SUITE_FILE).write_text(described.suite + "\n")
    (build / _PATCHES_FILE).write_text("".join(f"{name}\n" for name in described.patches))
    _try(build / program)
    target = home(architecture) / described.version
    replace_folder(build, target)
    return replace(described, path=target / program)


def _qemu_packages(architecture: Architecture, archive: Archive) -> list[str]:
    """Return the suite's packages of QEMU for `architecture`; the first one has the program."""
    newer = architecture.newer_qemu_package
    if newer is not None and archive.has(newer):
        return [newer]
    return architecture.qemu_packages["debian"].split()


def find_suite(wanted: str, architecture: Architecture, folder: Path) -> tuple[Archive, str]:
    """Find the suite that has the `wanted` QEMU, and QEMU's upstream version there.

    Args:
        wanted: a suite ('trixie-backports') or a version ('11.1').
        architecture: the architecture of the guests.
        folder: an existing folder for apt's state.

    Raises:
        UsageError: the archive's suites have other versions.
        UntestableError: the archive cannot be reached.
    """
    is_version = wanted[:1].isdigit()
    suites = _suites() if is_version else [wanted]
    seen: list[str] = []
    failures: dict[str, UntestableError] = {}
    for suite in suites:
        _logger.info("searching %s", suite)
        try:
            archive = Archive(suite, folder / suite)
            version = _upstream(archive.version(_qemu_packages(architecture, archive)[0]))
        except UntestableError as error:
            failures[suite] = error
            continue
        if not is_version or version == wanted or version.startswith(wanted + "."):
            return archive, version
        seen.append(f"{suite} has {version}")
    if not seen:
        suite, failure = next(iter(failures.items()))
        raise UntestableError(
            f"cannot fetch QEMU {wanted}: none of {', '.join(suites)} could be searched; check the "
            f"network and apt's sources. For {suite}:\n{failure}"
        )
    unknown = f"; {', '.join(failures)} could not be searched" if failures else ""
    raise UsageError(f"no Debian suite has QEMU {wanted}: {', '.join(seen)}{unknown}")


def _suites() -> list[str]:
    releases = list(dict.fromkeys((*_RELEASES, own_codename())))
    return [f"{name}{pocket}" for name in reversed(releases) for pocket in ("-backports", "")]


def _upstream(version: str) -> str:
    """Return '10.0.13' for a Debian version such as '1:10.0.13+ds-0+deb13u1'."""
    match = re.match(r"(?:\d+:)?([\d.]*\d)", version)
    if match is None:
        raise UntestableError(
            f"expected a version number in the version of QEMU's package, got {version!r}"
        )
    return match[1]


def make_whole(build: Path, programs: Mapping[str, str]) -> None:
    """Make the packages unpacked in ``root`` run: merge /usr, and write a script for each program.

    `programs` maps each program's name to its folder in the packages.
    """
    root = build / "root"
    for name in ("lib", "lib64"):
        old, new = root / name, root / "usr" / name
        if old.is_dir() and not old.is_symlink():
            shutil.copytree(old, new, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(old)
        if not old.is_symlink():
            old.symlink_to(f"usr/{name}")
    for program, place in programs.items():
        if not (root / place / program).exists():
            continue
        script = build / program
        script.write_text(_wrapper(program, place, _OWN_ROOT))
        script.chmod(0o755)


def _wrapper(program: str, place: str, root: str, *, preload: str = "", variables: str = "") -> str:
    firmware = _FIRMWARE if program.startswith("qemu-system") else ""
    return _WRAPPER.format(
        program=program,
        place=place,
        firmware=firmware,
        root=root,
        preload=preload,
        variables=variables,
    )


def preloading(program: Path, library: Path, script: Path, environment: Mapping[str, str]) -> Path:
    """Write a `script` that runs the QEMU `program` with `library` preloaded, and return it.

    QEMU has the variables of `environment`. A fetched QEMU's own loader preloads the library, so
    that no other program does, which may have another libc.
    """
    quoted = shlex.quote(str(library))
    variables = "".join(f"export {key}={shlex.quote(text)}\n" for key, text in environment.items())
    if (program.parent / _SUITE_FILE).is_file():
        root = shlex.quote(str(program.parent.resolve() / "root"))
        preload = f" --preload {quoted}"
        text = _wrapper(program.name, "usr/bin", root, preload=preload, variables=variables)
    else:
        quoted_program = shlex.quote(str(program))
        text = _PRELOADING.format(library=quoted, program=quoted_program, variables=variables)
    script.write_text(text)
    script.chmod(0o755)
    return script


def _try(program: Path) -> None:
    for option in ("--version", "-machine help"):
        done = run_captured([program, *option.split()], timeout_s=60)
        if done.returncode:
            raise UntestableError(f"this QEMU does not run: {done.stderr.strip()}")
