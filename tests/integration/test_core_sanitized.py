"""The C core under the compiler's sanitizers for addresses, undefined behaviour and data races."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

import core_build
from core_build import CORE, FUZZER, ROOT, SANITIZED, SHARED

INPUTS = 30_000
"""The number of inputs for the fuzzer's target, which take some seconds."""


@pytest.fixture(scope="module")
def libraries() -> list[str]:
    found = core_build.sanitizers()
    if found is None:
        pytest.skip("cc has no sanitizers on this machine: apt-get install gcc")
    return found


CORE_TESTS: Final = ("tests/unit/test_core.py", "tests/integration/test_core_guards.py")


def run(command: Sequence[str | Path], **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=options or None,
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )


def fuzz(tree: Path, folder: Path, libraries: Sequence[str]) -> str | None:
    target = folder / "fuzzer.so"
    core_build.build(target, [tree / FUZZER], *SHARED, *SANITIZED)
    return core_build.run_fuzzer(target, libraries, INPUTS)


def test_the_core_passes_its_tests_under_sanitizers(tmp_path: Path, libraries: list[str]) -> None:
    extension = core_build.build(
        tmp_path / "_core.abi3.so", core_build.core_sources(), *SHARED, *SANITIZED
    )
    done = run(
        [sys.executable, core_build.__file__, "test", extension, "-q", *CORE_TESTS],
        **core_build.sanitized_environment(libraries),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_fuzzers_target_finds_nothing(tmp_path: Path, libraries: list[str]) -> None:
    assert fuzz(ROOT, tmp_path, libraries) is None


@pytest.mark.parametrize(
    ("file", "right", "wrong", "message"),
    [
        # The word at a ragged end is accessed as a whole word.
        ("bitmap.h", "end = (start + bytes - base) / 8;", "end = (start + bytes - base + 7) / 8;",
         "AddressSanitizer: heap-buffer-overflow"),
        ("runs.c", "rest ? (unsigned)__builtin_ctzll(rest) : 64", "(unsigned)__builtin_ctzll(rest)",
         "runtime error: passing zero to ctz"),
        ("bitmap.h", "return mask & ~old;", "return mask;", "_core is wrong"),
    ],
)  # fmt: skip
def test_the_fuzzers_target_finds_an_injected_bug(
    tmp_path: Path, libraries: list[str], file: str, right: str, wrong: str, message: str
) -> None:
    """This shows that the test above can fail."""
    changed = core_build.copy_tree(tmp_path / "tree") / CORE / file
    text = changed.read_text()
    assert text.count(right) == 1
    changed.write_text(text.replace(right, wrong))
    failure = fuzz(tmp_path / "tree", tmp_path, libraries)
    assert failure is not None
    assert message in failure


@pytest.mark.usefixtures("libraries")
def test_threads_that_share_a_bitmap_do_not_race(tmp_path: Path) -> None:
    assert core_build.run_races(ROOT, tmp_path / "races") is None


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("runs.c", "__builtin_popcountll(load(words + i))", "__builtin_popcountll(words[i])"),
        ("merge.c", "~load(to + i)", "~to[i]"),
        ("merge.c", "return shared ? merge_shifted(to, from, 0, count, true)",
         "return shared ? merge_shifted(to, from, 0, count, false)"),
        # A word is read as a whole although another thread writes in it.
        ("merge.c", "- (bit % 64 != 0)", "- (bit % 65 != 0)"),
        ("bitmap.h", "atomic_fetch_or((_Atomic uint8_t *)(bytes + i), part)",
         "bytes[i]; bytes[i] |= part"),
        # The first word is accessed as a whole word although it has bytes of another user.
        ("bitmap.h", "first = start != base,", "first = 0,"),
    ],
)  # fmt: skip
def test_an_injected_race_is_found(tmp_path: Path, file: str, right: str, wrong: str) -> None:
    """This shows that the test above can fail."""
    tree = core_build.copy_tree(tmp_path / "tree")
    changed = tree / CORE / file
    text = changed.read_text()
    assert text.count(right) == 1
    changed.write_text(text.replace(right, wrong))
    assert "data race" in (core_build.run_races(tree, tmp_path / "races") or "")
