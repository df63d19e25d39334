"""What suites share: their markers, a fixture of the command, and what the machine must have."""

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
_TAKE_MINUTES: Final = ("test_debian.py", "test_passthrough.py")

# Machines are busy, so no example has a time; everything else is as hypothesis chooses it.
settings.register_profile(
    "unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")
# A mutant has only to be noticed, each time by the same examples, and not to be explained.
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
    """Mark each test with the name of its suite, and skip those on real QEMU where there is none.

    With DMAPROOF_NO_SKIP=1 they fail instead. Where several processes share the tests, those that
    take minutes come first, lest all others wait for one of them in the end.
    """
    if _IS_WORKER:
        items.sort(key=lambda item: item.path.name not in _TAKE_MINUTES)
    for item in items:
        item.add_marker(item.path.relative_to(_TESTS).parts[0])
    if shutil.which("qemu-system-x86_64") is not None or os.environ.get("DMAPROOF_NO_SKIP") == "1":
        return
    lacking = pytest.mark.skip(reason="no QEMU here: apt-get install qemu-system-x86")
    for item in items:
        if item.get_closest_marker("qemu") is not None:
            item.add_marker(lacking)


@pytest.fixture
def much_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For a test whose guests have gigabytes of RAM: of all workers' tests, one at a time."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if _IS_WORKER else folder
    with (shared / "much-memory").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def tool(tmp_path_factory: pytest.TempPathFactory) -> Tool:
    """The dmaproof command, with a temporary folder of its own that must be empty afterwards."""
    # Short, since the run's folder holds Unix sockets.
    return Tool(Path(tmp_path_factory.mktemp("t")))
