"""avocado: a matrix in a TOML file as a test reference, and its cells as runnables.

``avocado run matrix.toml`` carries out a proof for each cell of the file, whose form
`qmp_tools.matrix.axes` describes. ``avocado run matrix.toml:scenario=t.s`` carries out the cells
whose name matches the pattern. A runnable of kind 'dmaproof' has the options of ``dmaproof prove``
as keyword arguments; avocado's parameters (``-p``, or a varianter's) replace them. A runnable is
complete, so it is the same on every host on which an avocado spawner runs it.

A lost page fails the test, and the log has the story of each page. A scenario or option that a QEMU
does not support skips the test; a proof that could not be carried out is an error. ``proof.json``
and ``proof.html`` are returned with the log.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from avocado.core.nrunner.app import BaseRunnerApp
from avocado.core.nrunner.runnable import Runnable
from avocado.core.nrunner.runner import BaseRunner
from avocado.core.plugin_interfaces import Resolver
from avocado.core.references import reference_split
from avocado.core.resolver import ReferenceResolution, ReferenceResolutionResult, check_file
from avocado.core.utils.messages import FileMessage, FinishedMessage, LogMessage, StartedMessage

from dmaproof.errors import UsageError, printable

from ..host.loop_thread import LoopThread
from ..host.process import Process
from ..host.run_folder import run_folder
from ..host.unexpected import untestable

KIND: Final = "dmaproof"
_SUFFIX: Final = ".toml"
_FILES: Final = ("proof.json", "proof.html")

Status = dict[str, Any]


class MatrixResolver(Resolver):  # type: ignore[misc]
    """Finds the cells of a matrix."""

    name = KIND
    description = "Test resolver for dmaproof matrices in TOML"

    def resolve(self, reference: str) -> ReferenceResolution:
        """Return the runnables of a file that has a table [matrix]."""
        path, pattern = reference_split(reference)
        criteria = check_file(path, reference, suffix=_SUFFIX, type_name="TOML file")
        if criteria is not True:
            return criteria
        # Imported here, since every avocado command loads this module.
        from ..matrix.avocado_recipe import runnables
        from ..matrix.axes import is_matrix, read_matrix

        if not is_matrix(Path(path)):
            info = f'File "{path}" has no table [matrix]'
            return ReferenceResolution(reference, ReferenceResolutionResult.NOTFOUND, info=info)
        try:
            found = runnables(read_matrix(Path(path)))
        except UsageError as error:
            return ReferenceResolution(
                reference, ReferenceResolutionResult.CORRUPT, info=str(error)
            )
        chosen = [each for each in found if pattern is None or re.search(pattern, each["uri"])]
        result = ReferenceResolutionResult.SUCCESS if chosen else ReferenceResolutionResult.NOTFOUND
        return ReferenceResolution(reference, result, [Runnable.from_dict(one) for one in chosen])


class ProofRunner(BaseRunner):  # type: ignore[misc]
    """Carries out one proof; the module's docstring describes its runnable."""

    name = KIND
    description = "Runner for dmaproof proofs"

    def run(self, runnable: Runnable) -> Iterator[Status]:
        """Start the proof, pass its output on, and report its result."""
        yield StartedMessage.get()
        try:
            with LoopThread() as loop, run_folder() as folder:
                yield from self._prove(runnable, loop, folder)
        except Exception as error:  # no such error is a failure of the device
            yield FinishedMessage.get("error", str(untestable(error)))

    def _prove(self, runnable: Runnable, loop: LoopThread, folder: Path) -> Iterator[Status]:
        from ..proof.options import ProofOptions  # imported here as in `MatrixResolver.resolve`

        options = ProofOptions.of(options_of(runnable)).words()
        program = [sys.executable, "-m", "qmp_tools.cli", "prove", *options]
        reports = [f"--json={folder / _FILES[0]}", f"--report={folder / _FILES[1]}"]
        log = folder / "proof.log"
        process = loop.run(Process.start("proof", [*program, *reports], log))
        try:
            with log.open(errors="replace") as lines:
                for status in self.running_loop(process.died.done):
                    yield status
                    yield from map(_log, lines)
                yield from map(_log, lines)
            yield from self._end(process, folder)
        finally:
            loop.run(process.end())

    def _end(self, process: Process, folder: Path) -> Iterator[Status]:
        try:
            report = json.loads((folder / _FILES[0]).read_text())
        except (OSError, ValueError):  # after wrong usage, or if it was killed
            reason = f"the proof {process.how_it_ended()}\n{process.log_tail()}".rstrip()
            yield FinishedMessage.get("error", reason)
            return
        yield from map(_log, _stories(report))
        for name in _FILES:
            yield FileMessage.get((folder / name).read_bytes(), name)
        yield FinishedMessage.get(_result(report), report.get("reason", report["verdict"]))


def options_of(runnable: Runnable) -> dict[str, str]:
    """Return the options of ``dmaproof prove``; a parameter replaces an option of the runnable."""
    nodes = runnable.variant["variant"] if runnable.variant else []
    parameters = {name: value for _, node in nodes for _, name, value in node}
    given: Mapping[str, Any] = {**runnable.kwargs, **parameters}
    return {name.replace("_", "-"): str(value) for name, value in given.items()}


def _result(report: Mapping[str, Any]) -> str:
    if report.get("unsupported"):
        return "skip"
    return {0: "pass", 1: "fail"}.get(report["exit_code"], "error")


def _stories(report: Mapping[str, Any]) -> list[str]:
    """Return the stories of all lost pages; the proof prints only the first ones."""
    return [page["story"] for page in report.get("lost_pages", ())]


def _log(line: str) -> Status:
    message: Status = LogMessage.get(printable(line.rstrip("\n")))
    return message


class RunnerApp(BaseRunnerApp):  # type: ignore[misc]
    """The program that avocado's spawners start."""

    PROG_NAME = f"avocado-runner-{KIND}"
    PROG_DESCRIPTION = "nrunner application for dmaproof proofs"
    RUNNABLE_KINDS_CAPABLE: Final = [KIND]


def main() -> None:
    """Run the command ``avocado-runner-dmaproof``."""
    RunnerApp(print).run()


if __name__ == "__main__":
    main()
