"""Fresh Debian systems to run programs in: a tree of debootstrap's, entered by chroot.

What is mounted in it is mounted in a namespace that ends with the program, so whatever is killed,
no mount is left. apt and pip reach the archives that they reach on this machine, and what they
downloaded is kept for the next tree, as are the trees themselves before anything is installed.
"""

from __future__ import annotations

import ast
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError
from qmp_tools.host import archive
from qmp_tools.host.user_folders import cache_folder

VARIABLES: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
}
"""The environment of each program in a tree."""
_CERTIFICATES: Final = "etc/ssl/certs/ca-certificates.crt"
_OWN_CERTIFICATES: Final = "usr/local/share/ca-certificates/machine.crt"
"""The folder from which the package ca-certificates adds to the bundle when it rebuilds it."""
_NETWORK_FILES: Final = ("etc/resolv.conf", "etc/hosts", "etc/apt/auth.conf", "etc/apt/auth.conf.d")
_NETWORK_VARIABLES: Final = re.compile(
    r"(\w+_proxy|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE)", re.IGNORECASE
)
_NETWORK_SETTINGS: Final = re.compile(r"Acquire::(https?|ftp|Check-|Retries|ForceIPv)")
_TIMEOUT_S: Final = 900.0

_ENTER: Final = """\
root=$1; shift
mount --bind "$root" "$root"  # programs that call pivot_root need a root that is a mount
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
    mkdir -p "$1" "$root$2"
    mount --bind "$1" "$root$2"
    shift 2
done
shift
exec chroot "$root" "$@"
"""


def why_not() -> str | None:
    """Return what this machine is missing for such trees."""
    if os.geteuid() != 0:
        return "only root can make a Debian tree and enter it"
    if shutil.which("debootstrap") is None:
        return "no debootstrap here: apt-get install debootstrap"
    try:
        archive.own_codename()
    except UntestableError as error:
        return str(error)
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False).returncode:
        return "namespaces are forbidden here: a container needs --privileged"
    return None


@dataclass(frozen=True)
class Tree:
    """A Debian system in the folder `root`; `shared` are folders of this machine, and where they
    are in it."""

    root: Path
    shared: Mapping[Path, Path]
    variables: Mapping[str, str]

    def run(
        self, *command: str, folder: Path, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` as root in `folder` of the system."""
        mounts = [os.fspath(path) for pair in self.shared.items() for path in pair]
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        return subprocess.run(
            [
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"),
                *("sh", "-ec", _ENTER, "sh", os.fspath(self.root), *mounts, "--"),
                *("env", "-i", f"--chdir={folder}", *variables, *command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )


def kept_folder() -> Path:
    """Return the folder for files that one run of the tests keeps for the next."""
    return cache_folder().with_name("dmaproof-tests")


@contextmanager
def fresh_tree(suite: str, root: Path, shared: Mapping[Path, Path]) -> Iterator[Tree]:
    """A minimal system of `suite` in `root`, which is removed in the end.

    Others that want one of the same suite wait, since apt does not share its downloads.
    """
    cache = kept_folder()
    packages = cache / f"{suite}-packages"
    packages.mkdir(parents=True, exist_ok=True)
    with (cache / f"{suite}-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            _unpack_base(suite, cache / f"{suite}.tar", root)
            _connect(suite, root)
            yield with_pip(root, {packages: Path("/var/cache/apt/archives"), **shared})
        finally:
            shutil.rmtree(root, ignore_errors=True)


def with_pip(root: Path, shared: Mapping[Path, Path]) -> Tree:
    """Return the system in `root`, whose pip reaches the same indices as this machine's."""
    pip, pip_folders = _pip_settings(root)
    variables = {**_network_variables(root), **pip, **VARIABLES}
    return Tree(root, {**pip_folders, **shared}, variables)


def _unpack_base(suite: str, base: Path, root: Path) -> None:
    root.mkdir()
    tar = ("tar", "--numeric-owner", "-C", os.fspath(root))
    if base.exists():
        _run(*tar, "-xpf", os.fspath(base))
        return
    mirror = archive.sources_list(suite).splitlines()[0].split()[-3]
    proxy = _apt_settings().get("Acquire::http::Proxy")
    _run(
        *("debootstrap", "--variant=minbase", suite, os.fspath(root), mirror),
        **({"http_proxy": proxy} if proxy else {}),
    )
    partial = base.with_suffix(f".{os.getpid()}")
    _run(*tar, "-cpf", os.fspath(partial), ".")
    partial.rename(base)


def _run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr}"
    return done.stdout


def _connect(suite: str, root: Path) -> None:
    """Let apt in `root` reach the same archives as on this machine."""
    (root / "etc/apt/sources.list").write_text(archive.sources_list(suite))
    settings = [f'{name} "{value}";\n' for name, value in _apt_settings().items()]
    (root / "etc/apt/apt.conf.d/machine").write_text("".join(settings))
    (root / "etc/dpkg/dpkg.cfg.d/machine").write_text("force-unsafe-io\n")
    for name in _NETWORK_FILES:
        _copy(Path("/", name), root / name)
    for name in (_CERTIFICATES, _OWN_CERTIFICATES):
        _copy(Path("/", _CERTIFICATES), root / name)


def _apt_settings() -> dict[str, str]:
    """Return the settings with which this machine's apt reaches archives, such as proxies."""
    found = re.findall(r'^(\S+) "(.*)";$', _run("apt-config", "dump"), re.MULTILINE)
    return {name: value for name, value in found if _NETWORK_SETTINGS.match(name)}


def _pip_settings(root: Path) -> tuple[dict[str, str], dict[Path, Path]]:
    """This machine's settings of pip as variables, and the folders that they name.

    Files that they name are copied into `root`.
    """
    pip = (sys.executable, "-m", "pip")
    variables = {"PIP_CACHE_DIR": _run(*pip, "cache", "dir").strip()}
    folders = {Path(variables["PIP_CACHE_DIR"])}
    for line in _run(
        *pip, "config", "list"
    ).splitlines():  # the settings of the environment come first
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2].upper().replace("-", "_")
        words = str(ast.literal_eval(value)).split()
        variables.setdefault(f"PIP_{option}", " ".join(words))
        for path in (Path(word.removeprefix("file://")) for word in words):
            if path.is_absolute() and path.is_dir():
                folders.add(path.parent)  # an index refers to files beside it
            elif path.is_absolute():
                _copy(path, root / path.relative_to("/"))
    return variables, {folder: folder for folder in folders}


def _network_variables(root: Path) -> dict[str, str]:
    variables = {
        name: value for name, value in os.environ.items() if _NETWORK_VARIABLES.fullmatch(name)
    }
    for value in variables.values():
        if value.startswith("/"):
            _copy(Path(value), root / value[1:])
    return variables


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder of files, if it exists."""
    if source.is_dir():
        for file in source.iterdir():
            _copy(file, target / file.name)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a link, which leads to this machine's own file
        shutil.copy(source, target)
