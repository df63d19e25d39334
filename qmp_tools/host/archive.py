"""Fetch packages of the distribution's archive into a private folder, without root.

apt fetches the packages and checks their signatures. It runs with its own state, cache and sources,
so it neither reads nor changes the system's package state. The archive's address and keys are those
of the machine's own apt. A package of another architecture comes from the same archive.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from .blocking_work import blocking_work
from .captured import run_captured

_TIMEOUT_S: Final = 900.0
DEBIAN: Final = "Debian"
"""The origin of Debian's archive, in which every architecture and release is at one address."""
_SECURITY_LABEL: Final = "Debian-Security"
_POCKETS: Final = ("-updates", "-backports", "-security")


@dataclass(frozen=True, order=True)
class _Repository:
    label: str
    uri: str
    codename: str
    origin: str
    release: str
    architecture: str


def _run(command: Sequence[str], what: str, folder: Path | None = None) -> str:
    """Return the output of `command`; `what` says in messages what the command does."""
    try:
        with blocking_work():
            done = run_captured(
                command,
                timeout_s=_TIMEOUT_S,
                cwd=folder,
                env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            )
    except FileNotFoundError:
        raise UntestableError(
            f"{what} needs {command[0]}, which is not installed; use a Debian machine or container"
        ) from None
    except subprocess.TimeoutExpired:
        raise UntestableError(
            f"{what}: {command[0]} has not ended within {_TIMEOUT_S:.0f} s; check the network, "
            "and try again"
        ) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        lines = "\n".join(f"    {line}" for line in errors or done.stderr.splitlines()[-5:])
        raise UntestableError(
            f"{what}: {command[0]} ended with exit code {done.returncode} and printed:\n{lines}"
        )
    return done.stdout


def _all_repositories() -> list[_Repository]:
    fields = ("LABEL", "REPO_URI", "CODENAME", "ORIGIN", "RELEASE", "ARCHITECTURE")
    listing = _run(
        [
            *("apt-get", "indextargets", "--format"),
            *("\t".join(f"$({name})" for name in fields), "Created-By: Packages"),
        ],
        "looking up the machine's package sources",
    )
    rows = {tuple(line.split("\t")) for line in listing.splitlines()}
    return sorted(_Repository(*row) for row in rows if len(row) == len(fields))


def _repositories(origin: str) -> list[_Repository]:
    """Return the repositories of `origin` in the configuration of the machine's apt.

    Raises:
        UntestableError: none was found: apt has no package lists, or this is another distribution.
    """
    found = [repository for repository in _all_repositories() if repository.origin == origin]
    if not found:
        raise UntestableError(
            f"apt knows no {origin} archive: on {origin}, run 'apt-get update' once as root; on "
            f"another distribution, use a {origin} container"
        )
    return found


@dataclass(frozen=True)
class OwnRelease:
    """The machine's distribution and its release, from os-release(5).

    `ids` has the name of the distribution ('ubuntu') and of those from which it derives.
    """

    name: str
    ids: Sequence[str]
    codename: str

    @property
    def is_ubuntu(self) -> bool:
        """Whether its packages are Ubuntu's."""
        return "ubuntu" in self.ids


def own_release() -> OwnRelease:
    """Return the machine's release."""
    try:
        fields = platform.freedesktop_os_release()
    except OSError:  # a container without the file
        fields = {}
    ids = [fields.get("ID", "linux"), *fields.get("ID_LIKE", "").split()]
    return OwnRelease(
        fields.get("NAME", "this distribution"), ids, fields.get("VERSION_CODENAME", "")
    )


def own_origin() -> str:
    """Return the origin of the archive of the machine's distribution, such as 'Debian' or 'Ubuntu'.

    A derived distribution may use the archive of the one from which it derives.

    Raises:
        UntestableError: apt has no package lists of such an archive.
    """
    release = own_release()
    origins = {repository.origin.lower(): repository.origin for repository in _all_repositories()}
    for name in (*release.ids, DEBIAN.lower()):
        if name in origins:
            return origins[name]
    raise UntestableError(
        f"apt has no package lists of the archive of {release.name}: run 'apt-get update' once as "
        "root"
    )


def own_codename(origin: str = DEBIAN) -> str:
    """Return the codename of the machine's own release, such as 'bookworm'."""
    repositories = _repositories(origin)
    main = next((found for found in repositories if found.label != _SECURITY_LABEL), None)
    if main is None:
        raise UntestableError(
            f"apt's sources have no main {origin} archive; add it, and run 'apt-get update'"
        )
    return _without_pocket(main.codename)


def _without_pocket(suite: str) -> str:
    return re.sub("|".join(_POCKETS), "", suite)


def sources_list(
    suite: str,
    origin: str = DEBIAN,
    architecture: str | None = None,
    *,
    pockets: bool = True,
) -> str:
    """Return the lines of a sources.list for `suite` and the release that it extends.

    Args:
        suite: the suite of the archive, such as 'trixie-backports'.
        origin: the archive's origin. Only Debian's archive has suites that apt does not list.
        architecture: Debian's name of the packages' architecture; None is the machine's.
        pockets: whether to include the updates of the release, which no suite needs to be whole.
    """
    repositories = _repositories(origin)
    release = _without_pocket(suite)
    keyring = Path(f"/usr/share/keyrings/{origin.lower()}-archive-keyring.gpg")
    # Without the keyring's package, apt uses the keys that the machine trusts.
    keys = f"[signed-by={keyring}] " if keyring.exists() else ""
    if origin != DEBIAN:
        known = [each for each in repositories if _without_pocket(each.release) == release]
        own = [each for each in known if each.architecture == architecture]
        pairs = sorted(
            {(each.uri, each.release) for each in own or known if pockets or each.release == suite}
        )
        return "".join(f"deb {keys}{uri} {name} main\n" for uri, name in pairs)
    lines = []
    for label in (DEBIAN, _SECURITY_LABEL):
        repository = next((found for found in repositories if found.label == label), None)
        if repository is None or (label == _SECURITY_LABEL and not pockets):
            continue
        if label == _SECURITY_LABEL:
            suites = [f"{release}-security"]
        else:
            suites = [release, f"{release}-updates"] if pockets else [release]
            suites += [suite] if suite not in suites else []
        lines += [f"deb {keys}{repository.uri} {name} main" for name in suites]
    return "\n".join(lines) + "\n"


class Archive:
    """apt for `suite` (such as 'trixie-backports') with all its state in `folder`.

    `architecture` is Debian's name of that of the packages, such as 'arm64'; None is that of this
    machine. `origin` and `pockets` are as for `sources_list`.

    Raises:
        UntestableError: apt is not installed, the archive cannot be reached, or it has no `suite`.
    """

    def __init__(
        self,
        suite: str,
        folder: Path,
        architecture: str | None = None,
        *,
        origin: str = DEBIAN,
        pockets: bool = True,
    ) -> None:
        self.suite = suite
        self._origin = origin
        self._architecture = architecture
        self._folder = folder.absolute()
        for name in ("lists/partial", "archives/partial"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        (self._folder / "sources.list").write_text(
            sources_list(suite, origin, architecture, pockets=pockets)
        )
        self._apt("apt-get", "update", what=f"fetching the package lists of {suite}")

    def _apt(self, program: str, *arguments: str, what: str, folder: Path | None = None) -> str:
        settings: dict[str, str | Path] = {
            "Dir::State": self._folder,
            "Dir::State::lists": self._folder / "lists",
            "Dir::State::status": self._folder / "status",
            "Dir::Cache": self._folder,
            "Dir::Cache::archives": self._folder / "archives",
            "Dir::Etc::sourcelist": self._folder / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-",
            "Dir::Etc::preferencesparts": "-",
            "Acquire::Languages": "none",
            "APT::Get::AllowUnauthenticated": "false",
            "APT::Update::Error-Mode": "any",
            # As root, apt would fetch as the user _apt, who may not enter a private folder.
            "APT::Sandbox::User": "root",
        }
        if self._architecture is not None:
            settings |= dict.fromkeys(
                ("APT::Architecture", "APT::Architectures"), self._architecture
            )
        options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        return _run([program, *options, *arguments], what, folder)

    def has(self, package: str) -> bool:
        """Return whether the suite, or the release that it extends, has `package`."""
        return self._candidate(package) is not None

    def version(self, package: str) -> str:
        """Return the version of `package` that apt would install from the suite."""
        version = self._candidate(package)
        if version is None:
            raise UntestableError(
                f"{self._origin}'s suite {self.suite} has no package {package}"
                + (f" for {self._architecture}" if self._architecture else "")
            )
        return version

    def _candidate(self, package: str) -> str | None:
        policy = self._apt("apt-cache", "-t", self.suite, "policy", package, what="asking apt")
        match = re.search(r"^\s*Candidate: (\S+)", policy, re.MULTILINE)
        return match[1] if match and match[1] != "(none)" else None

    def dependencies(self, package: str) -> list[str]:
        """Return the names of the packages that `package` of this suite depends on.

        Raises:
            UntestableError: the suite has no such package.
        """
        self.version(package)
        what = f"asking apt about {package}"
        listing = self._apt("apt-cache", "-t", self.suite, "depends", package, what=what)
        return _depends(listing)

    def fetch(self, package: str) -> Path:
        """Download `package`, without its dependencies.

        Raises:
            UntestableError: the suite has no such package, or the download fails.
        """
        archives = self._folder / "archives"
        self.version(package)
        self._apt(
            *("apt-get", "-t", self.suite, "download", package),
            what=f"downloading {package} from {self.suite}",
            folder=archives,
        )
        return next(archives.glob(f"{package}_*.deb"))

    def fetch_source(self, package: str) -> Path:
        """Download the source package of `package`; return its description, a .dsc.

        The files that it lists are beside it. apt compares all of them with the signed index.

        Raises:
            UntestableError: the suite has no such package, or the download fails.
        """
        listed = self._folder / "sources.list"
        lines = listed.read_text()
        listed.write_text(lines + lines.replace("deb ", "deb-src "))
        self._apt("apt-get", "update", what=f"fetching the source lists of {self.suite}")
        sources = self._folder / "sources"
        sources.mkdir()
        self._apt(
            *("apt-get", "-t", self.suite, "source", "--download-only", package),
            what=f"downloading the source of {package} from {self.suite}",
            folder=sources,
        )
        return next(sources.glob("*.dsc"))

    def fetch_closure(self, packages: Sequence[str]) -> list[Path]:
        """Download `packages` and all their dependencies, as for an empty system."""
        self._apt(
            "apt-get",
            *("-t", self.suite, "install", "--download-only", "--yes", "--no-install-recommends"),
            *packages,
            what=f"downloading {', '.join(packages)} from {self.suite}",
        )
        return sorted((self._folder / "archives").glob("*.deb"))


def fetch_own(package: str, folder: Path) -> Path:
    """Download `package` of the machine's own release, without dependencies, into `folder`."""
    _run(
        ["apt-get", "-o", "APT::Sandbox::User=root", "download", package],
        f"downloading {package}",
        folder,
    )
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise UntestableError(f"apt-get download {package} succeeded, but wrote no package")
    return found[-1]


def dependencies(package: str) -> list[str]:
    """Return the names of the packages that `package` of the machine's own release depends on.

    Raises:
        UntestableError: apt is not installed, or knows no such package.
    """
    return _depends(_run(["apt-cache", "depends", package], f"asking apt about {package}"))


def _depends(listing: str) -> list[str]:
    return re.findall(r"^\s*Depends: ([^<\s]+)", listing, re.MULTILINE)


def unpack(package: Path, folder: Path) -> None:
    """Unpack the files of a .deb into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _run(["dpkg-deb", "-x", str(package), str(folder)], f"unpacking {package.name}")


def replace_folder(fresh: Path, target: Path) -> None:
    """Replace the folder `target` by the finished folder `fresh`."""
    if target.exists():
        old = target.with_name(f"{target.name}.old-{os.getpid()}")
        target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(target)
