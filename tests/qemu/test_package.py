"""The built wheel as users install it: alone, in empty environments, away from the sources."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from support.scratch import scratch_folder

pytestmark = pytest.mark.timeout(1800)

ROOT: Final = Path(__file__).parents[2]
MINORS: Final = (11, 12, 13, 14)
"""The minor versions of Python 3 that the package's metadata names."""
PROOF: Final = ("prove", "--guest", "bare", "--accel", "tcg", "--json", "-")


def interpreter(minor: int) -> Path | None:
    """Return a Python 3.`minor`: the one that runs this, one in PATH, or one of pyenv's."""
    if sys.version_info[:2] == (3, minor):
        return Path(sys.executable)
    name = f"python3.{minor}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [*pyenv.glob(f"versions/3.{minor}.*/bin/{name}")]
    if in_path := shutil.which(name):
        found.append(Path(in_path))
    return next((python for python in found if _makes_environments(python)), None)


def _makes_environments(python: Path) -> bool:
    """Return whether it can make environments (pyenv's shims in PATH may fail)."""
    command: list[str | Path] = [python, "-c", "import venv"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Place:
    """An empty folder to run programs in; guests are built there from the installed sources."""

    folder: Path

    def run(self, *command: str | Path, exit_code: int = 0) -> str:
        """Run a command and return its output."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={
                **{name: value for name, value in os.environ.items() if "PYTHON" not in name},
                "TMPDIR": str(self.folder),
                "XDG_CACHE_HOME": str(self.folder / "cache"),
                "PIPX_HOME": str(self.folder / "pipx"),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == exit_code, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, python: Path, *packages: str | Path) -> Path:
        """Install `packages` into an empty environment, and return the folder of its programs."""
        self.run(python, "-m", "venv", "venv")
        scripts = self.folder / "venv" / "bin"
        self.run(scripts / "pip", "install", "--quiet", "--no-compile", *packages)
        return scripts


@pytest.fixture
def place() -> Iterator[Place]:
    with scratch_folder() as folder:
        yield Place(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the committed files, and with the wheel that is built of it."""
    folder = tmp_path_factory.mktemp("dist")
    command: list[str | Path] = [sys.executable, "-m", "build", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def committed() -> set[str]:
    command = ["git", "-C", str(ROOT), "ls-tree", "-r", "--name-only", "HEAD"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_sdist_has_every_committed_file(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {file.name.partition("/")[2] for file in archive.getmembers() if file.isfile()}
    assert names - {"PKG-INFO"} == committed()


def test_one_wheel_serves_all_later_versions_of_python(wheel: Path) -> None:
    assert wheel.name.endswith(f"-cp311-abi3-linux_{platform.machine()}.whl")


def test_the_wheel_has_code_and_guests(wheel: Path) -> None:
    wanted = set()
    for name in committed():
        if name.startswith("plugin/dmaproof/core/"):
            wanted.add("dmaproof/_core.abi3.so")
        elif name == "plugin/dmaproof/bench/strategies.c":  # compiled when a benchmark needs it
            wanted.add("dmaproof/bench/strategies.c")
        elif name.startswith("plugin/"):
            wanted.add(re.sub(r"\.c$", ".abi3.so", name.removeprefix("plugin/")))
        elif name.startswith("qmp_tools/"):
            wanted.add(name)
        elif name.startswith("guests/"):
            wanted.add(f"qmp_tools/{name}")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == wanted


@pytest.mark.parametrize("minor", MINORS)
def test_the_wheel_alone_carries_out_a_proof(minor: int, wheel: Path, place: Place) -> None:
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"Python 3.{minor} not found: pyenv install 3.{minor}")
    scripts = place.install(python, wheel)
    where = "import dmaproof, qmp_tools, sys; print(dmaproof.__file__, qmp_tools.__file__)"
    for file in place.run(scripts / "python", "-c", where).split():
        assert Path(file).is_relative_to(place.folder / f"venv/lib/python3.{minor}/site-packages")
    proof = json.loads(place.run(scripts / "dmaproof", *PROOF))
    assert proof["exit_code"] == 0
    assert proof["sensitivity"]["guaranteed_detectable"] > 1000


def test_pipx_runs_the_wheel(wheel: Path, place: Place) -> None:
    pipx = (sys.executable, "-m", "pipx", "run", "--spec", str(wheel))
    assert json.loads(place.run(*pipx, "dmaproof", *PROOF))["exit_code"] == 0


def test_the_pytest_project_of_the_docs(wheel: Path, place: Place) -> None:
    """The project passes as docs/pytest.md shows it, and fails with an injected fault."""
    scripts = place.install(Path(sys.executable), wheel, "pytest")
    page = (ROOT / "docs" / "pytest.md").read_text()
    found = re.search("A whole project:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert found
    project = place.folder / "test_project.py"
    project.write_text(found[1])
    pytest_command = (scripts / "pytest", "-ra", "--basetemp=base", "--dmaproof-accel=tcg")
    assert "2 passed" in place.run(*pytest_command)
    project.write_text(found[1].replace("vhost_user_blk(", 'vhost_user_blk(fault="drop-pages", '))
    assert "1 failed, 1 passed" in place.run(*pytest_command, exit_code=1)
