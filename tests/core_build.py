"""Builds of the C core out of tree: with sanitizers (integration/test_core_sanitized.py), or of a
mutant (mutation/c_core.py)."""

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

# Sanitizers do not work with functions that the loader selects (bitmap.h).
PLAIN: Final = ("-std=gnu11", "-O1", "-DVECTORISED=")
SHARED: Final = ("-shared", "-fPIC", f"-I{sysconfig.get_path('include')}")
SANITIZED: Final = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def compiled(command: Sequence[str | Path]) -> str | None:
    """Run the compiler; return None, or its error messages."""
    done = subprocess.run(
        ["cc", *map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    return done.stderr or f"exit code {done.returncode}" if done.returncode else None


def build(target: Path, sources: Sequence[Path], *options: str) -> Path:
    """Compile and link `sources`.

    Raises:
        RuntimeError: the compiler reports errors.
    """
    errors = compiled([*PLAIN, *options, *sources, "-o", target])
    if errors:
        raise RuntimeError(errors)
    return target


def core_sources(tree: Path = ROOT) -> list[Path]:
    """Return the source files of `_core`."""
    return sorted((tree / CORE).glob("*.c"))


def sanitizers() -> list[str] | None:
    """Return the libraries to load before a sanitized extension; None if cc has no sanitizers."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        command = ["cc", f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found.append(done.stdout.strip())
    return found if all(map(os.path.isabs, found)) else None


def sanitized_environment(libraries: Sequence[str]) -> dict[str, str]:
    """Return the environment of a Python that loads sanitized code.

    `malloc` gives each of Python's objects its own block, and so its own red zones. Leaks are not
    reported, because Python leaks on purpose. A signal ends the process, as it does elsewhere.
    """
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
    }


def run_fuzzer(library: Path, libraries: Sequence[str], inputs: int) -> str | None:
    """Give the fuzzer's target (fuzz/core.c) random inputs; return None, or its error messages."""
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
    """Run threads on one bitmap (core_races.c) under the sanitizer for data races.

    Returns:
        None, or the sanitizer's messages.
    """
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
        # With much address-space randomisation the sanitizer fails; `setarch -R` disables it.
        if "unexpected memory mapping" not in done.stderr:
            break
    return done.stderr or f"exit code {done.returncode}" if done.returncode else None


def use_core(extension: Path) -> None:
    """Make `extension` the `dmaproof._core` of this process, which has not imported one yet."""
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
    """Copy only the core, its fuzzer and its races to `target`, to be changed there."""
    for part in (CORE, FUZZER.parent):
        shutil.copytree(ROOT / part, target / part)
    shutil.copy(ROOT / RACES, target / RACES)
    return target


if __name__ == "__main__":
    if sys.argv[1] == "fuzz":
        _fuzz(*sys.argv[2:])
    else:
        sys.exit(_test(*sys.argv[2:]))
