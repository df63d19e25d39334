"""For avocado: a matrix in a TOML file as a test reference, and its cells as runnables.

``avocado run matrix.toml`` runs a proof for each cell of the file (`qmp_tools.matrix.axes` tells
its form), ``avocado run matrix.toml:way=t.s`` those whose name has a match of the pattern. A
runnable of kind 'dmaproof' has the options of ``dmaproof prove`` as its keyword arguments; the
parameters of avocado (``-p``, or a varianter's) go before them. So it is the same on whatever host
a spawner of avocado's runs it.

A lost page fails the test, and its log tells each page's story. What a QEMU lacks skips it, and
what could not be tested is an error. ``proof.json`` and ``proof.html`` come back with the log.
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
    description = "Test resolver for matrices of dmaproof's, in TOML"

    def resolve(self, reference: str) -> ReferenceResolution:
        """The runnables of a file that has a table [matrix]."""
        path, pattern = reference_split(reference)
        criteria = check_file(path, reference, suffix=_SUFFIX, type_name="TOML file")
        if criteria is not True:
            return criteria
        # Only now: every command of avocado's loads this module.
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
        chosen = [it for it in found if pattern is None or re.search(pattern, it["uri"])]
        result = ReferenceResolutionResult.SUCCESS if chosen else ReferenceResolutionResult.NOTFOUND
        return ReferenceResolution(reference, result, [Runnable.from_dict(it) for it in chosen])


class ProofRunner(BaseRunner):  # type: ignore[misc]
    """Carries out one proof; see the module's docstring for what it takes."""

    name = KIND
    description = "Runner for proofs of dmaproof's"

    def run(self, runnable: Runnable) -> Iterator[Status]:
        """Start the proof, pass on what it prints, and tell how it came out."""
        yield StartedMessage.get()
        try:
            with LoopThread() as loop, run_folder() as folder:
                yield from self._prove(runnable, loop, folder)
        except Exception as error:  # whatever it is, it is no failure of the device's
            yield FinishedMessage.get("error", str(untestable(error)))

    def _prove(self, runnable: Runnable, loop: LoopThread, folder: Path) -> Iterator[Status]:
        from ..proof.options import ProofOptions  # late, as in `MatrixResolver.resolve`

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
        except (OSError, ValueError):  # wrong usage, or it was killed
            reason = f"the proof {process.how_it_ended()}\n{process.log_tail()}".rstrip()
            yield FinishedMessage.get("error", reason)
            return
        yield from map(_log, _stories(report))
        for name in _FILES:
            yield FileMessage.get((folder / name).read_bytes(), name)
        yield FinishedMessage.get(_result(report), report.get("reason", report["verdict"]))


def options_of(runnable: Runnable) -> dict[str, str]:
    """The options of ``dmaproof prove``: what the runnable says, and before it its parameters."""
    nodes = runnable.variant["variant"] if runnable.variant else []
    parameters = {name: value for _, node in nodes for _, name, value in node}
    given: Mapping[str, Any] = {**runnable.kwargs, **parameters}
    return {name.replace("_", "-"): str(value) for name, value in given.items()}


def _result(report: Mapping[str, Any]) -> str:
    if report.get("unsupported"):
        return "skip"
    return {0: "pass", 1: "fail"}.get(report["exit_code"], "error")


def _stories(report: Mapping[str, Any]) -> list[str]:
    """Of all lost pages: what the proof prints has only the first."""
    return [page["story"] for page in report.get("lost_pages", ())]


def _log(line: str) -> Status:
    message: Status = LogMessage.get(printable(line.rstrip("\n")))
    return message


class RunnerApp(BaseRunnerApp):  # type: ignore[misc]
    """What avocado's spawners start."""

    PROG_NAME = f"avocado-runner-{KIND}"
    PROG_DESCRIPTION = "nrunner application for proofs of dmaproof's"
    RUNNABLE_KINDS_CAPABLE: Final = [KIND]


def main() -> None:
    """The command ``avocado-runner-dmaproof``."""
    RunnerApp(print).run()


if __name__ == "__main__":
    main()
