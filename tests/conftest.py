"""Markers, fixtures and requirements that all test suites share."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, settings

from support.command import Tool

_TESTS: Final = Path(__file__).parent
_IS_WORKER: Final = "PYTEST_XDIST_WORKER" in os.environ
_TAKE_MINUTES: Final = ("test_debian.py", "test_distributions.py", "test_passthrough.py")

# Test machines are busy, so examples have no deadline. Other settings are hypothesis's defaults.
settings.register_profile(
    "unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")
# Each mutant is tried with the same examples, and a failing example need not be shrunk.
settings.register_profile(
    "mutation",
    settings.get_profile("unhurried"),
    derandomize=True,
    database=None,
    max_examples=50,
    phases=(Phase.explicit, Phase.generate),
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the name of its suite; skip the tests on QEMU if QEMU is not installed.

    With DMAPROOF_NO_SKIP=1 these tests fail instead. If several processes share the tests, those
    that take minutes run first, so that the other processes do not wait for them at the end.
    """
    if _IS_WORKER:
        items.sort(key=lambda item: item.path.name not in _TAKE_MINUTES)
    for item in items:
        item.add_marker(item.path.relative_to(_TESTS).parts[0])
    if shutil.which("qemu-system-x86_64") is not None or os.environ.get("DMAPROOF_NO_SKIP") == "1":
        return
    no_qemu = pytest.mark.skip(reason="qemu-system-x86_64 is not installed: see 'dmaproof doctor'")
    for item in items:
        if item.get_closest_marker("qemu") is not None:
            item.add_marker(no_qemu)


@pytest.fixture
def much_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run the test alone among all workers' tests that use this fixture: it needs gigabytes."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if _IS_WORKER else folder
    with (shared / "much-memory").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def tool(tmp_path_factory: pytest.TempPathFactory) -> Tool:
    """The dmaproof command, with its own temporary folder, which must be empty afterwards."""
    # The name is short because the run's folder holds Unix sockets.
    return Tool(Path(tmp_path_factory.mktemp("t")))
