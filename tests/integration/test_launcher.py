"""The launcher, in checkouts of a small project that is built in a second without network."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

import pytest

from qmp_tools.arch import ARCHITECTURES
from support.scratch import scratch_folder

pytestmark = pytest.mark.timeout(600)

LAUNCHER: Final = Path(__file__).parents[2] / "dmaproof"
PROJECT: Final = """\
[build-system]
build-backend = "backend"
backend-path = ["."]
requires = []
"""
BACKEND: Final = """\
import zipfile

NAME = "dmaproof-1-py3-none-any.whl"
INFO = "dmaproof-1.dist-info"
PROGRAM = '''
import sys
from pathlib import Path

def main(): print("runs in", sys.prefix, *sys.argv[1:])
def checker(): print(Path(sys.argv[0]).name, *sys.argv[1:])
'''
SCRIPTS = '''
[console_scripts]
dmaproof = program:main
mypy = program:checker
pytest = program:checker
ruff = program:checker
'''

def build_wheel(folder, config_settings=None, metadata_directory=None):
    files = {
        "program.py": PROGRAM,
        "importlinter/cli.py": 'def lint_imports_command(): print("lint-imports")',
        f"{INFO}/METADATA": "Metadata-Version: 2.1\\nName: dmaproof\\nVersion: 1\\n",
        f"{INFO}/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{INFO}/entry_points.txt": SCRIPTS,
    }
    record = "".join(f"{name},,\\n" for name in (*files, f"{INFO}/RECORD"))
    with zipfile.ZipFile(f"{folder}/{NAME}", "w") as wheel:
        for name, text in {**files, f"{INFO}/RECORD": record}.items():
            wheel.writestr(name, text)
    return NAME
"""


def check_out(folder: Path) -> Path:
    """Make a checkout in `folder` in which nothing was built, and return it."""
    # The launcher runs a module of the checkout.
    for name in ("plugin", "qmp_tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(LAUNCHER.parent / name, folder / name, ignore=ignored)
    (folder / "guests").mkdir()
    for name in ("meson.build", "README.md"):
        (folder / name).touch()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "backend.py").write_text(BACKEND)
    shutil.copy(LAUNCHER, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs_in_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the programs that the launcher needs into PATH, so that it installs no package."""
    folder = tmp_path_factory.mktemp("programs")
    of_guests = {(arch.qemu_program, f"{arch.gnu}-gcc") for arch in ARCHITECTURES.values()}
    for name in ("qemu-img", "qemu-storage-daemon", *chain.from_iterable(of_guests)):
        (folder / name).touch(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with scratch_folder() as folder:
        yield folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return check_out(tmp_path / "checkout")


@pytest.fixture(scope="module")
def built_once(programs_in_path: None) -> Iterator[Path]:
    """A folder with 'checkout', in which the launcher has run, and its copy 'original'."""
    with scratch_folder() as folder:
        assert_runs_in(check_out(folder / "checkout"))
        shutil.copytree(folder / "checkout", folder / "original", symlinks=True)
        yield folder


@pytest.fixture
def built(built_once: Path) -> Path:
    """A checkout that was built in its present place, since built files contain its path."""
    checkout = built_once / "checkout"
    shutil.rmtree(checkout, ignore_errors=True)  # the last test may have moved or changed it
    shutil.copytree(built_once / "original", checkout, symlinks=True)
    return checkout


def launch(launcher: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [launcher, *(words or ["doctor"])],
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_runs_in(checkout: Path, launcher: Path | None = None) -> None:
    done = launch(launcher or checkout / "dmaproof")
    assert done.stdout == f"runs in {checkout}/.venv doctor\n", done.stderr
    assert done.returncode == 0


def test_a_symlink_leads_to_the_checkout(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/first").symlink_to("../checkout/dmaproof")
    (tmp_path / "bin/second").symlink_to(tmp_path / "bin/first")
    assert_runs_in(checkout, tmp_path / "bin/second")
    assert len(list((tmp_path / "bin").iterdir())) == 2


def test_a_checkout_runs_after_it_was_copied_or_moved(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a copy"
    shutil.copytree(built, copy, symlinks=True)
    assert_runs_in(copy)
    assert_runs_in(built.rename(tmp_path / "moved"))


def test_a_missing_interpreter_is_replaced(built: Path) -> None:
    for python in (built / ".venv/bin").glob("python*"):
        python.unlink()
        python.symlink_to("/nowhere/python3")
    assert_runs_in(built)


def test_an_interpreter_of_another_release_is_replaced(built: Path) -> None:
    """After an upgrade of the system, .venv has the packages of the old release."""
    (packages,) = (built / ".venv/lib").iterdir()
    packages.rename(packages.with_name("python3.9"))
    environment = built / ".venv/environment"
    environment.write_text(f"{environment.read_text().rpartition(' ')[0]} 9\n")
    assert_runs_in(built)


def test_a_missing_program_is_installed_again(built: Path) -> None:
    (built / ".venv/bin/dmaproof").unlink()
    assert_runs_in(built)


def test_a_build_is_repeated_only_when_its_sources_have_changed(built: Path) -> None:
    assert launch(built / "dmaproof").stderr == ""
    (built / "plugin/new.py").touch()
    again = launch(built / "dmaproof").stderr
    assert "building" in again
    assert "creating" not in again


def test_the_fast_tests_run_with_the_linters_and_fetch_nothing(built: Path) -> None:
    done = launch(built / "dmaproof", "test", "--fast", "-k", "ring")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.startswith("runs in")] == [
        "ruff check",
        "ruff format --check",
        "mypy",
        "lint-imports",
        "pytest -n auto --dist worksteal tests/unit tests/property -k ring",
    ]
    assert "qemu fetch" not in done.stdout


def test_all_tests_run_with_the_linters_on_a_newer_qemu(built: Path) -> None:
    done = launch(built / "dmaproof", "test", "-k", "ring")
    assert done.returncode == 0, done.stderr
    *fetched, check, form, types, imports, tests = done.stdout.splitlines()
    fetches = [f"runs in {built}/.venv qemu fetch 11.1 --arch {name}" for name in ARCHITECTURES]
    assert fetched == fetches
    assert [check, form, types] == ["ruff check", "ruff format --check", "mypy"]
    assert imports == "lint-imports"
    workers = min(len(os.sched_getaffinity(0)) + 1, 8)
    assert tests == f"pytest -n {workers} --dist worksteal -k ring"


def test_a_failure_of_pip_is_reported_and_pip_is_run_again(checkout: Path) -> None:
    (checkout / "backend.py").write_text("raise OSError('no space')\n")
    done = launch(checkout / "dmaproof")
    assert done.returncode == 3
    assert "no space" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"dmaproof: pip could not install {checkout}: ")
    (checkout / "backend.py").write_text(BACKEND)
    assert_runs_in(checkout)


def test_an_environment_that_cannot_be_made_is_reported(checkout: Path) -> None:
    (checkout / ".venv").touch()
    done = launch(checkout / "dmaproof")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("dmaproof: python3 -m venv")


def test_a_failed_set_up_exits_with_3(built: Path) -> None:
    """Exit code 1 would mean that pages were lost."""
    (built / ".venv/state").unlink()
    (built / ".venv/state").mkdir()
    done = launch(built / "dmaproof")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == "dmaproof: the set-up failed for the reason above"


EDITABLE: Final = """

def build_editable(folder, config_settings=None, metadata_directory=None):
    with open(f"{config_settings['build-dir']}.builds", "a") as file:
        file.write("editable ")
    return build_wheel(folder)
"""


@pytest.fixture
def developed(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that was set up for work on dmaproof, where ninja is installed."""
    with (checkout / "backend.py").open("a") as file:
        file.write(EDITABLE)
    with (checkout / "pyproject.toml").open("a") as file:
        file.write('[project]\nname = "dmaproof"\ndynamic = ["version"]\n')
    (tmp_path / "ninja").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    subprocess.run([checkout / "dmaproof", "develop"], check=True, timeout=300)
    assert (checkout / ".venv/build.builds").read_text() == "editable "
    return checkout


def test_an_edit_needs_no_build_in_a_developed_checkout(developed: Path) -> None:
    (developed / "plugin/new.py").touch()
    assert_runs_in(developed)
    assert launch(developed / "dmaproof").stderr == ""
    assert (developed / ".venv/build.builds").read_text() == "editable "


def test_a_required_package_without_a_wheel_is_built_in_a_developed_checkout(
    developed: Path, tmp_path: Path
) -> None:
    wheel: dict[str, Any] = {}
    exec(BACKEND.replace("dmaproof", "needed").replace("program.py", "needed.py"), wheel)
    needed = wheel["build_wheel"](tmp_path)
    source = tmp_path / "sdist"
    source.mkdir()
    (source / "backend.py").write_text("import needed\n" + BACKEND.replace("dmaproof", "sdist"))
    requires = f'requires = ["needed @ {(tmp_path / needed).as_uri()}"]'
    (source / "pyproject.toml").write_text(PROJECT.replace("requires = []", requires))
    backend = (developed / "backend.py").read_text()
    (developed / "backend.py").write_text(
        backend.replace("Version: 1", f"Version: 1\\nRequires-Dist: sdist @ {source.as_uri()}")
    )
    (developed / "meson.build").write_text("# another version\n")
    assert_runs_in(developed)


def test_a_checkout_stays_developed_when_its_metadata_changes(developed: Path) -> None:
    (developed / "meson.build").write_text("# another version\n")
    assert_runs_in(developed)
    assert (developed / ".venv/build.builds").read_text() == "editable editable "


def test_a_checkout_stays_developed_when_it_moves_or_pip_fails(
    developed: Path, tmp_path: Path
) -> None:
    moved = developed.rename(tmp_path / "moved")
    backend = (moved / "backend.py").read_text()
    (moved / "backend.py").write_text("raise OSError('no space')\n")
    assert launch(moved / "dmaproof").returncode == 3
    (moved / "backend.py").write_text(backend)
    assert_runs_in(moved)
    assert (moved / ".venv/build.builds").read_text() == "editable "
