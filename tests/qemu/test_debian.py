"""README's two commands, in fresh trees of the Debian releases that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from qmp_tools.host.user_folders import data_folder
from support.checkout import check_out
from support.debian_tree import Tree, fresh_tree, kept_folder, why_not
from support.scratch import scratch_folder

pytestmark = pytest.mark.timeout(3600)

CHECKOUT: Final = Path("/root/dmaproof")
TIMEOUT_S: Final = 1500.0
TYPES: Final = Path("/root/types")
"""The cache of mypy in the tree, so that mypy checks only what has changed since the last run."""
SOME_TESTS: Final = (
    "tests/unit/test_doctor.py",
    "tests/unit/test_linux_guest.py",
    "tests/unit/test_matrix.py",
    "tests/integration/test_doctor.py",
    "tests/integration/test_result_cache.py",
    "tests/integration/test_run_inside.py::test_a_command_runs_inside_a_root_file_system",
    "tests/qemu/test_devices.py::test_a_disk_and_a_network_share_a_log",
    "tests/qemu/test_third_party.py::test_qemu_storage_daemon",
)
"""The tests that depend on the release: on its Python, its kernel and its QEMU."""


@pytest.fixture(params=["bookworm", "trixie"])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    if reason := why_not():
        pytest.skip(reason)
    types = kept_folder() / f"{request.param}-mypy"
    types.mkdir(parents=True, exist_ok=True)
    shared = {
        data_folder(): Path("/root/.local/share/dmaproof"),  # fetched QEMUs
        types: TYPES,
    }
    with (
        scratch_folder() as folder,
        fresh_tree(request.param, folder / "tree", shared) as tree,
    ):
        check_out(tree.root / CHECKOUT.relative_to("/"))
        yield tree


def test_commands_of_the_readme(tree: Tree) -> None:
    def run(*command: str) -> str:
        done = tree.run(*command, folder=CHECKOUT, timeout_s=TIMEOUT_S)
        assert done.returncode == 0, done.stdout[-8000:]
        return done.stdout

    assert "PASS: all pages are equal" in run("./dmaproof", "prove")
    assert "fetched with the first proof" in run(
        "env", "XDG_CACHE_HOME=/tmp/empty", "./dmaproof", "doctor"
    )
    test = ("env", f"MYPY_CACHE_DIR={TYPES}", "./dmaproof", "test", "-rf")
    assert " passed" in run(*test, *SOME_TESTS)
    assert str(tree.root) not in Path("/proc/self/mountinfo").read_text()
