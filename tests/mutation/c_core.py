"""Mutants of the C core, to measure how many mistakes in it the tests notice.

README.md says how to run it. Each mutant is one change in one line of plugin/dmaproof/core. It is
compiled and tested. A failed test, a crash or an endless loop notices it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))
import core_build

EQUIVALENTS: Final = Path(__file__).with_name("c_core.toml")
SANITIZERS: Final = "sanitizers"
TESTS: Final = (
    "tests/unit/test_core.py",
    "tests/integration/test_core_guards.py",
    SANITIZERS,
    "tests/property/test_core.py",
    "tests/unit/test_iova_bitmap.py",
    "tests/property/test_dirty_tracker.py",
    "tests/unit/test_dirty_tracker.py",
    "tests/property/test_iova_bitmap.py",
)
"""The tests run in this order, the fast ones that notice most first; a failure ends the run."""
TIMEOUT_S: Final = 600
"""The limit for a test file that waits; a busy one reaches its limit of processor time earlier."""
SPARE_CPU_S: Final = 1
TIMES_CPU: Final = 6
"""With a mutant, a test file may take this many times its processor time with the unchanged core,
plus `SPARE_CPU_S`. The load of the machine has no effect on processor time."""
PLUGINS: Final = ("_hypothesis_pytestplugin", "pytest_timeout")
"""The only plugins of pytest that the tests need; any other would cost time for each mutant."""
MEMORY_BYTES: Final = 8 << 30
FUZZER_INPUTS: Final = 20_000

SWAPS: Final = (
    ("<=", "<"), ("<", "<="), (">=", ">"), (">", ">="), ("==", "!="), ("!=", "=="),
    ("+", "-"), ("-", "+"), ("*", "/"), ("/", "*"), ("%", "/"), ("<<", ">>"), (">>", "<<"),
    ("&", "|"), ("|", "&"), ("^", "&"), ("&&", "||"), ("||", "&&"),
    ("+=", "-="), ("|=", "&="), ("&=", "|="), ("++", "--"),
)  # fmt: skip
SWAP: Final = dict(SWAPS)
OPERATOR: Final = re.compile(r" (<=|>=|==|!=|<<|>>|&&|\|\||\+=|-=|\|=|&=|[-+*/%<>&|^]) ")
INCREMENT: Final = re.compile(r"\+\+")
NEGATION: Final = re.compile(r"(?<=[(\s&|])[~!](?=[\w(*])")
NUMBER: Final = re.compile(r"(?<![\w.\"])\d+(?![\w\"])")
TRUTH: Final = re.compile(r"\b(true|false)\b")
STATEMENT: Final = re.compile(
    r"(?!return\b.+|(?:const |unsigned |u?int\w*|struct |bool |size_t )).+;"  # no declarations
)


@dataclass(frozen=True)
class Mutant:
    """One changed line (from 0) of a file of the core, and the line above it."""

    file: str
    line: int
    above: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line + 1}: {self.before.strip()}  ->  {self.after.strip()}"


class Fate(StrEnum):
    """The result of a mutant; only the last two count for the score."""

    REFUSED = "refused by the compiler"
    SAME_CODE = "same machine code"
    EQUIVALENT = "equivalent"
    NOTICED = "noticed"
    SURVIVED = "SURVIVED"


def mutants_of(file: Path) -> Iterator[Mutant]:
    """Yield every mutant of `file`."""
    within_comment, above = False, ""
    for number, line in enumerate(file.read_text().splitlines()):
        text = line.strip()
        within_comment |= text.startswith("/*")
        if not within_comment and text and not text.startswith(("//", "#", '"', '{"')):
            for changed in dict.fromkeys(_changes(line)):
                if changed != line:
                    yield Mutant(file.name, number, above, line, changed)
        within_comment &= "*/" not in text
        above = line


def _changes(line: str) -> Iterator[str]:
    code = line.partition("//")[0].rstrip()
    for found in OPERATOR.finditer(code):
        yield _put(code, found.start(1), found.end(1), SWAP.get(found[1], found[1]))
    for found in INCREMENT.finditer(code):
        yield _put(code, found.start(), found.end(), "--")
    for found in NEGATION.finditer(code):
        yield _put(code, found.start(), found.end(), "")
    if '"' not in code:  # formats and messages
        for found in NUMBER.finditer(code):
            yield _put(code, found.start(), found.end(), str(int(found[0]) + 1))
    for found in TRUTH.finditer(code):
        yield _put(code, found.start(), found.end(), "false" if found[0] == "true" else "true")
    indent = len(code) - len(code.lstrip())
    if STATEMENT.fullmatch(code.strip()):
        yield code[:indent] + ";"


def _put(code: str, start: int, end: int, replacement: str) -> str:
    return code[:start] + replacement + code[end:]


class Equivalents:
    """The mutants in ``c_core.toml`` that no caller can distinguish from the original.

    An entry names a line of a file and the changed lines. If the file has several equal lines and
    the entry is for one of them, it also names the line above.
    """

    def __init__(self, file: Path) -> None:
        self._entries = tomllib.loads(file.read_text())["equivalent"]

    def holds(self, mutant: Mutant) -> bool:
        """Return whether an entry names `mutant`."""
        return any(
            entry["file"] == mutant.file
            and entry["line"] == mutant.before.strip()
            and mutant.after.strip() in entry["becomes"]
            and entry.get("above", mutant.above.strip()) == mutant.above.strip()
            for entry in self._entries
        )

    def unused(self, file: str, mutants: Sequence[Mutant]) -> list[str]:
        """Return the changes in entries for `file` that are no longer among its `mutants`."""
        made = {(mutant.before.strip(), mutant.after.strip()) for mutant in mutants}
        return [
            f"{entry['line']}  ->  {after}"
            for entry in self._entries
            if entry["file"] == file
            for after in entry["becomes"]
            if (entry["line"], after) not in made
        ]


def examine(mutant: Mutant, folder: Path, tests: Mapping[str, int]) -> tuple[Fate, str]:
    """Build and test a mutant.

    Args:
        mutant: the change.
        folder: the folder with the object files of the unchanged core.
        tests: test files in the order to run, each with its limit of processor time in seconds.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-", dir=folder) as name:
        tree = core_build.copy_tree(Path(name))
        changed = tree / core_build.CORE / mutant.file
        lines = changed.read_text().splitlines(keepends=True)
        assert lines[mutant.line].rstrip("\n") == mutant.before
        lines[mutant.line] = mutant.after + "\n"
        changed.write_text("".join(lines))
        of_header = changed.suffix == ".h"
        objects, same = [], True
        for source in core_build.core_sources(tree):
            original = folder / f"{source.stem}.o"
            if not of_header and source != changed:
                objects.append(original)
                continue
            target = tree / f"{source.stem}.o"
            if _compile(source, target):
                return Fate.REFUSED, ""
            same &= target.read_bytes() == original.read_bytes()
            objects.append(target)
        if same:
            return Fate.SAME_CODE, ""
        extension = tree / "_core.abi3.so"
        if core_build.compiled(["-shared", *objects, "-o", extension]):
            return Fate.REFUSED, ""
        for file, cpu_s in tests.items():
            answer = _sanitize(tree) if file == SANITIZERS else _test(extension, file, cpu_s)[0]
            if answer:
                return Fate.NOTICED, f"{file}: {answer}"
        return Fate.SURVIVED, ""


def _compile(source: Path, target: Path) -> str | None:
    options = ["-std=gnu11", "-O1", "-DVECTORISED=", "-w", "-fPIC", core_build.SHARED[-1], "-c"]
    # Paths are relative, so that the machine code does not contain the folder's name.
    return core_build.compiled([*options, source, "-o", target])


def _sanitize(tree: Path) -> str | None:
    """Run the fuzzer's target, then threads that may race; return None, or what noticed."""
    libraries = core_build.sanitizers()
    if libraries is None:
        return None
    options = (*core_build.SHARED, *core_build.SANITIZED, "-w")
    harness = core_build.build(tree / "fuzzer.so", [tree / core_build.FUZZER], *options)
    try:
        if core_build.run_fuzzer(harness, libraries, FUZZER_INPUTS):
            return "addresses, undefined behaviour"
        return "data races" if core_build.run_races(tree, tree / "races") else None
    except subprocess.TimeoutExpired:
        return "endless"


def _test(extension: Path, tests: str, cpu_s: int) -> tuple[str | None, float]:
    """Run the tests in a fork of this process, which has imported their modules.

    Returns:
        None if they pass, otherwise the reason; and their processor time in seconds.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        with contextlib.suppress(BaseException):
            os._exit(_run_tests(extension, tests, cpu_s))
        os._exit(99)
    until_s = time.monotonic() + TIMEOUT_S
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            answer = None if code == 0 else f"exit code {code}"
            if code in (-signal.SIGXCPU, -signal.SIGKILL):
                answer = "endless"
            return answer, used.ru_utime + used.ru_stime
        if time.monotonic() > until_s:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "endless", TIMEOUT_S
        time.sleep(0.01)


def _limits(extension: Path, tests: Sequence[str]) -> dict[str, int]:
    """Return the limit of processor time, in seconds, of each test file.

    `extension` is the unchanged core.

    Raises:
        SystemExit: the unchanged core fails its tests.
    """
    limits = {}
    for file in tests:
        if file == SANITIZERS:
            limits[file] = 0  # the sanitizers have their own limits
            continue
        failure, took_s = _test(extension, file, TIMEOUT_S)
        if failure:
            raise SystemExit(f"the unchanged core fails {file}: {failure}")
        limits[file] = math.ceil(SPARE_CPU_S + TIMES_CPU * took_s)
    return limits


def _run_tests(extension: Path, tests: str, cpu_s: int) -> int:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ["CI"] = "true"  # the same cases for each mutant
    core_build.use_core(extension)
    return int(
        pytest.main(
            [
                *("-x", "-q", "-p", "no:cacheprovider", "-p", "no:dmaproof"),
                *(option for plugin in PLUGINS for option in ("-p", plugin)),
                *("-p", "no:faulthandler", "-p", "no:unraisableexception"),
                *("--tb=no", "--assert=plain"),  # the reason of a failure is not printed
                "--hypothesis-profile=mutation",
                tests,
            ]
        )
    )


def _prepare() -> None:
    """Import the modules that all tests need in each worker, but none that imports the core."""
    for name in ("hypothesis.stateful", "jsonschema", "numpy", "pytest", *PLUGINS):
        importlib.import_module(name)
    gc.freeze()  # otherwise the collector of each fork would visit, and so copy, all objects
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(core_build.ROOT)


def main() -> int:
    """Print every mutant that survives, and the score of each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="of plugin/dmaproof/core")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth mutant")
    parser.add_argument("--match", default="", metavar="TEXT", help="only lines that contain TEXT")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE")
    parser.add_argument("--verbose", action="store_true", help="print all other mutants, too")
    arguments = parser.parse_args()
    core = core_build.ROOT / core_build.CORE
    names = arguments.files or sorted(
        file.name for file in core.iterdir() if file.suffix == ".c" or file.name == "bitmap.h"
    )
    chosen = [
        mutant
        for name in names
        for mutant in mutants_of(core / name)
        if arguments.match in mutant.before
    ][:: arguments.every]
    known = Equivalents(EQUIVALENTS)
    for name in names:
        for line in known.unused(name, [*mutants_of(core / name)]):
            print(f"{EQUIVALENTS.name}: {name} no longer has this mutant; remove the entry: {line}")
    score: dict[str, Counter[Fate]] = {name: Counter() for name in names}
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="c-core-") as temporary:
        folder = Path(temporary)
        for source in core_build.core_sources():
            failure = _compile(source, folder / f"{source.stem}.o")
            assert failure is None, failure
        core_build.compiled(["-shared", *folder.glob("*.o"), "-o", folder / "_core.abi3.so"])
        with ProcessPoolExecutor(arguments.jobs, context, _prepare) as pool:
            limits = pool.submit(_limits, folder / "_core.abi3.so", arguments.tests).result()
            pending = {
                pool.submit(examine, mutant, folder, limits): mutant
                for mutant in chosen
                if not known.holds(mutant)
            }
            for mutant in set(chosen) - set(pending.values()):
                score[mutant.file][Fate.EQUIVALENT] += 1
            for future in as_completed(pending):
                mutant = pending[future]
                fate, how = future.result()
                score[mutant.file][fate] += 1
                if fate == Fate.SURVIVED or arguments.verbose:
                    print(f"{fate} {mutant}  {how}".rstrip(), flush=True)
    return _report(score)


def _report(score: dict[str, Counter[Fate]]) -> int:
    print(f"\n{'file':<16}{'noticed':>9}{'survived':>10}{'score':>8}{'equivalent':>12}")
    total: Counter[Fate] = Counter()
    for name, counts in [*score.items(), ("all", total)]:
        noticed, survived = counts[Fate.NOTICED], counts[Fate.SURVIVED]
        share = f"{100 * noticed / (noticed + survived):.1f}%" if noticed + survived else "-"
        print(f"{name:<16}{noticed:>9}{survived:>10}{share:>8}{counts[Fate.EQUIVALENT]:>12}")
        total += counts
    return 1 if total[Fate.SURVIVED] else 0


if __name__ == "__main__":
    sys.exit(main())
