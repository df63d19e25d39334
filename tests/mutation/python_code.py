"""Mutants of the Python code, to measure how many mistakes in it the tests notice.

mutmut makes the mutants and runs the tests. It names a function by the path of its file. So it runs
on a copy of the installed packages, which has the compiled modules, and in which path and import
name agree. pyproject.toml lists the mutated files and their tests, and ``python_code.toml`` the
mutants that cannot be noticed. See ``README.md``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

HERE: Final = Path(__file__).parent
PROJECT: Final = HERE.parents[1]
_PACKAGES: Final = ("dmaproof", "qmp_tools")
_TYPES: Final = (
    *(sys.executable, "-m", "mypy", "--output", "json"),
    # mutmut puts all mutants of a method into its class, so each declares the same attributes.
    *("--disable-error-code", "no-redef", "--disable-error-code", "unused-ignore"),
)
_REFUSED: Final = 37
"""mutmut's exit code for a mutant that mypy refuses."""
_TOO_LONG: Final = {36, -24, 24, 152}
"""mutmut's exit codes for a mutant that runs too long twice: endless, or on a busy machine."""
_NOTICED: Final = {1, 3, 255, -9, -11} | _TOO_LONG
"""mutmut's exit codes for a mutant that fails a test, crashes, or runs too long."""
_UNTESTED: Final = 33
MUST_HOLD: Final = 95.0
"""The percentage of a target's mutants, without equivalent ones, that must be noticed."""


class Target(NamedTuple):
    """One part of the code: its files below the packages, and its fast tests."""

    name: str
    modules: list[str]
    tests: list[str]


class Mutant(NamedTuple):
    """One change of `function`: `was` and `now` are the lines that differ."""

    name: str
    function: str
    was: str
    now: str
    code: int | None

    @property
    def noticed(self) -> bool:
        """Whether a test has failed on it."""
        return self.code in _NOTICED


def settings() -> dict[str, Any]:
    """Return the section on mutation of pyproject.toml."""
    with (PROJECT / "pyproject.toml").open("rb") as file:
        section: dict[str, Any] = tomllib.load(file)["tool"]["dmaproof"]["mutation"]
    return section


def targets(section: dict[str, Any]) -> dict[str, Target]:
    """Return the targets by name, in the order of pyproject.toml."""
    return {name: Target(name, **target) for name, target in section["target"].items()}


def lay_out(work: Path, target: Target, ignored_lines: list[str], *, types: bool) -> None:
    """Make the folder in which mutmut runs: packages, tests, and a configuration for `target`."""
    shutil.rmtree(work, ignore_errors=True)
    site = Path(sysconfig.get_path("platlib"))
    for package in _PACKAGES:
        shutil.copytree(
            site / package, work / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for folder in ("docs", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "api", "qemu")
        shutil.copytree(PROJECT / folder, work / folder, ignore=ignored)
    options: dict[str, Any] = {
        "source_paths": list(_PACKAGES),
        "also_copy": ["docs"],
        "only_mutate": target.modules,
        "do_not_mutate_patterns": ignored_lines,
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "--hypothesis-profile=mutation"],
        "pytest_add_cli_args_test_selection": target.tests,
        "use_git_change_detection": False,
        # The limit for a mutant: seconds, plus a multiple of the time of its tests without it.
        "timeout_constant": 2.0,
        "timeout_multiplier": 4.0,
    }
    if types:
        options["type_check_command"] = [*_TYPES, *_PACKAGES]
    text = (PROJECT / "pyproject.toml").read_text()
    text += "\n[tool.mutmut]\n"
    # A list of strings is the same in JSON and TOML, and so are numbers and truth values.
    text += "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())
    (work / "pyproject.toml").write_text(text)


def run(work: Path, target: Target, jobs: int, sample: int | None, seed: int) -> None:
    """Let mutmut try all mutants of `target`, or `sample` of them that `seed` chooses."""
    if sample is None:
        _mutmut(work, jobs)
    else:
        # mutmut can select mutants only after it has made them. With a name that no mutant has, it
        # makes them and ends.
        _mutmut(work, jobs, ["none"], fails=True)
        names = sorted(name for _, codes in _codes(work, target) for name in codes)
        _mutmut(work, jobs, random.Random(seed).sample(names, min(sample, len(names))))
    late = [
        name
        for _, codes in _codes(work, target)
        for name, code in codes.items()
        if code in _TOO_LONG
    ]
    if late:  # most are endless, but the machine may have been busy
        _mutmut(work, jobs, late)


def _mutmut(work: Path, jobs: int, chosen: Iterable[str] = (), *, fails: bool = False) -> None:
    mutmut = Path(sysconfig.get_path("scripts")) / "mutmut"
    command = [str(mutmut), "run", "--max-children", str(jobs), *chosen]
    with (work / "mutmut.log").open("ab") as log:
        done = subprocess.run(command, cwd=work, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode and not (fails and list((work / "mutants").rglob("*.meta"))):
        tail = (work / "mutmut.log").read_text(errors="replace").replace("\r", "\n")[-3000:]
        raise SystemExit(f"mutmut failed; the end of {work / 'mutmut.log'}:\n{tail}")


def _codes(work: Path, target: Target) -> Iterator[tuple[Path, dict[str, int | None]]]:
    """Yield each mutated file, and the exit codes of its mutants by name; None if not tried."""
    for module in target.modules:
        for meta in sorted((work / "mutants").glob(f"{module}.meta")):
            yield meta.with_suffix(""), json.loads(meta.read_text())["exit_code_by_key"]


def results(work: Path, target: Target) -> list[Mutant]:
    """Return every mutant of `target` with its result."""
    found = []
    for source, codes in _codes(work, target):
        spans = json.loads(source.with_name(source.name + ".spans").read_text())["spans"]
        lines = source.read_text().splitlines()
        for name, code in codes.items():
            changed = name.rpartition(".")[2]
            original = f"{changed.partition('__mutmut_')[0]}__mutmut_orig"
            was, now = _difference(
                *(_body(lines, *spans[function]) for function in (original, changed))
            )
            found.append(Mutant(name, _readable(name), was, now, code))
    return found


def _body(lines: list[str], first: int, last: int) -> list[str]:
    """Return the lines of a function, without mutmut's names."""
    return [re.sub(r"\w+__mutmut_\w+", "", line.strip()) for line in lines[first - 1 : last]]


def _difference(before: list[str], after: list[str]) -> tuple[str, str]:
    was, now = [], []
    for line in difflib.ndiff(before, after):
        if line.startswith("- "):
            was.append(line[2:])
        elif line.startswith("+ "):
            now.append(line[2:])
    return " ".join(was), " ".join(now)


def _readable(name: str) -> str:
    """Return ``dmaproof.dma.Dma.read`` for ``dmaproof.dma.xǁDmaǁread__mutmut_1``."""
    module, _, mangled = name.partition("__mutmut_")[0].rpartition(".")
    return f"{module}.{mangled.removeprefix('xǁ').removeprefix('x_').replace('ǁ', '.')}"


def equivalents() -> set[tuple[str, str, str]]:
    """Return the mutants that no test can notice, as (function, was, now)."""
    with (HERE / "python_code.toml").open("rb") as file:
        groups = tomllib.load(file)["group"]
    return {
        (mutant["function"], mutant["was"], now)
        for group in groups
        for mutant in group["mutants"]
        for now in mutant["now"]
    }


def report(target: Target, mutants: list[Mutant], *, show: bool) -> float:
    """Print the results of the `mutants` that were tried; return the percentage noticed."""
    unnoticeable = equivalents()
    tried = [mutant for mutant in mutants if mutant.code not in (None, _REFUSED)]
    passed = [mutant for mutant in tried if not mutant.noticed or mutant.code in _TOO_LONG]
    equal = [mutant for mutant in passed if mutant[1:4] in unnoticeable]
    left = [mutant for mutant in passed if not mutant.noticed and mutant not in equal]
    late = [mutant for mutant in passed if mutant.noticed and mutant not in equal]
    noticed = len(tried) - len(equal) - len(left)
    score = 100 * noticed / max(1, noticed + len(left))
    print(
        f"{target.name:14} {len(tried):5} tried {noticed:5} noticed ({len(late)} too long) "
        f"{len(equal):4} equivalent {len(left):4} not noticed {score:6.1f} %",
        flush=True,
    )
    if show:
        for mutant in left + late:
            kind = {_UNTESTED: "untested", 0: "not noticed"}.get(mutant.code or 0, "too long")
            print(f"  {mutant.name} ({kind})\n    - {mutant.was}\n    + {mutant.now}")
    return score


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return count


def main() -> int:
    """Run the targets that the command line names.

    Returns:
        1 if fewer than `MUST_HOLD` percent of the mutants of a target were noticed, otherwise 0.
    """
    section = settings()
    known = targets(section)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "mutation")
    parser.add_argument("--jobs", type=_count, default=2, help="mutants tried at a time")
    parser.add_argument(
        "--sample", type=_count, metavar="N", help="try N random mutants of each target"
    )
    parser.add_argument("--seed", type=int, default=1, help="selects the sample")
    parser.add_argument("--types", action="store_true", help="skip mutants that mypy refuses")
    parser.add_argument("--show", action="store_true", help="print the mutants not noticed")
    parser.add_argument("--again", action="store_true", help="only report on the last run")
    arguments = parser.parse_args()
    if unknown := set(arguments.target) - set(known):
        parser.error(
            f"target not found: {', '.join(sorted(unknown))}; pyproject.toml has {', '.join(known)}"
        )
    enough = True
    for name in arguments.target or known:
        work, target = arguments.work / name, known[name]
        if not arguments.again:
            lay_out(work, target, section["ignored-lines"], types=arguments.types)
            run(work, target, arguments.jobs, arguments.sample, arguments.seed)
        elif not any(_codes(work, target)):
            parser.error(f"--again: no run of {name} in {work}")
        enough &= report(target, results(work, target), show=arguments.show) >= MUST_HOLD
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
