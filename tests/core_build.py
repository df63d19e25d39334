"""The C core built out of tree: with sanitizers (integration/test_core_sanitized.py), or a mutant
of it (mutation/c_core.py)."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
CORE: Final = Path("plugin/dmaproof/core")
FUZZER: Final = Path("tests/fuzz/core.c")
RACES: Final = Path("tests/core_races.c")

# Sanitizers do not work with functions that the loader picks (bitmap.h).
PLAIN: Final = ("-std=gnu11", "-O1", "-DVECTORISED=")
SHARED: Final = ("-shared", "-fPIC", f"-I{sysconfig.get_path('include')}")
SANITIZED: Final = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def compiled(command: Sequence[str | Path]) -> str | None:
    """Run a compiler; None, or what it complains of."""
    done = subprocess.run(
        ["cc", *map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    return done.stderr or f"exit code {done.returncode}" if done.returncode else None


def build(target: Path, sources: Sequence[Path], *options: str) -> Path:
    """Compile and link `sources`.

    Raises:
        RuntimeError: the compiler refuses.
    """
    complaint = compiled([*PLAIN, *options, *sources, "-o", target])
    if complaint:
        raise RuntimeError(complaint)
    return target


def core_sources(tree: Path = ROOT) -> list[Path]:
    """The files that make up `_core`."""
    return sorted((tree / CORE).glob("*.c"))


def sanitizers() -> list[str] | None:
    """The libraries that a sanitized extension needs loaded first; None if cc has none."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        command = ["cc", f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found.append(done.stdout.strip())
    return found if all(map(os.path.isabs, found)) else None


def sanitized_environment(libraries: Sequence[str]) -> dict[str, str]:
    """The environment of a Python into which sanitized code is loaded.

    `malloc` gives each of Python's objects a block, and so red zones, of its own. Python leaks on
    purpose, and a signal is to end the process as it does elsewhere.
    """
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
    }


def run_fuzzer(library: Path, libraries: Sequence[str], inputs: int) -> str | None:
    """Give the fuzzer's target (fuzz/core.c) random inputs; None, or what it complains of."""
    done = subprocess.run(
        [sys.executable, __file__, "fuzz", library, str(inputs)],
        env=sanitized_environment(libraries),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    return done.stderr or f"exit code {done.returncode}" if done.returncode else None


def run_races(tree: Path, target: Path) -> str | None:
    """Run threads on one bitmap (core_races.c) under the sanitizer of data races; None, or what
    it complains of."""
    sources = [file for file in core_sources(tree) if file.name != "module.c"]
    build(target, [tree / RACES, *sources], "-w", "-g", "-fsanitize=thread", "-pthread")
    for wrapper in ([], ["setarch", "-R"]):
        done = subprocess.run(
            [*wrapper, target],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
        )
        if "unexpected memory mapping" not in done.stderr:  # more random addresses than it can take
            break
    return done.stderr or f"exit code {done.returncode}" if done.returncode else None


def use_core(extension: Path) -> None:
    """Make `extension` the `dmaproof._core` of this process, which has not imported it."""
    loader = importlib.machinery.ExtensionFileLoader("dmaproof._core", str(extension))
    specification = importlib.util.spec_from_loader("dmaproof._core", loader)
    assert specification is not None
    assert "dmaproof._core" not in sys.modules
    module = importlib.util.module_from_spec(specification)
    loader.exec_module(module)
    sys.modules["dmaproof._core"] = module


def _fuzz(library: str, inputs: str) -> None:
    target = ctypes.PyDLL(library).LLVMFuzzerTestOneInput
    target.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    source = random.Random(1)
    for _ in range(int(inputs)):
        data = source.randbytes(source.randrange(400))
        target(data, len(data))


def _test(extension: str, *arguments: str) -> int:
    import pytest

    use_core(Path(extension))
    return pytest.main(["-p", "no:cacheprovider", "-p", "no:dmaproof", *arguments])


def copy_tree(target: Path) -> Path:
    """A tree with the core, its fuzzer and its races alone, to be changed."""
    for part in (CORE, FUZZER.parent):
        shutil.copytree(ROOT / part, target / part)
    shutil.copy(ROOT / RACES, target / RACES)
    return target


if __name__ == "__main__":
    if sys.argv[1] == "fuzz":
        _fuzz(*sys.argv[2:])
    else:
        sys.exit(_test(*sys.argv[2:]))
