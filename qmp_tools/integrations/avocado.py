"""avocado: a test class that migrates a guest under DMA load, and a RAM check for any test.

::

    from qmp_tools.integrations.avocado import MigrationTest

    class Disk(MigrationTest):
        def test(self):
            self.migrate()
            self.assert_ram_equal()
            self.assert_dma_survived()

The test's parameters are `PARAMETERS`, given by avocado's ``-p name=value`` or a varianter. If a
prerequisite is missing, the test is cancelled with the reason; with DMAPROOF_NO_SKIP=1 it is an
error. The test's output folder gets the verdict as JSON and HTML, and the logs of QEMU and device.

avocado calls setUp and tearDown in two threads, and the thread of setUp ends before tearDown. A
QEMU dies with the thread that started it (PR_SET_PDEATHSIG), so the thread of a
`blocking.Environment` starts the QEMUs: it lives from setUp to tearDown.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from avocado import Test

from dmaproof.errors import UntestableError

from ..blocking import Environment, RunningQemu, StepwiseProof
from ..devices.device import AttachedDevice
from ..proof.options import OPTIONS, ProofOptions
from ..qemu.opening import AnyQemu
from ..ram_check.outcome import RamDiffersError
from ..reports import check_report, report
from ..reports.html import to_html

PARAMETERS: Final = tuple(OPTIONS)
"""The names of the parameters: the options of ``dmaproof prove``, with the same defaults."""


class MigrationTest(Test):  # type: ignore[misc]
    """A guest of dmaproof's on `source` with a `device`, and a `destination` that waits for it.

    :avocado: enable
    """

    source: RunningQemu
    destination: RunningQemu
    device: AttachedDevice
    _started: contextlib.ExitStack
    _environment: Environment
    _proof: StepwiseProof

    def setUp(self) -> None:
        """Start the device and both QEMUs."""
        chosen = {name: self.params.get(name) for name in PARAMETERS}
        self._started = contextlib.ExitStack()
        self._environment = self._started.enter_context(Environment())
        try:
            self._proof = self._environment.start_proof(ProofOptions.of(chosen))
        except UntestableError as error:
            if os.environ.get("DMAPROOF_NO_SKIP") == "1":
                raise
            self.cancel(str(error))
        self.source, self.destination = self._proof.source, self._proof.destination
        self.device = self._proof.device

    def migrate(self) -> None:
        """Migrate while the device writes guest RAM; both guests are paused afterwards.

        Raises:
            UntestableError: the guest did not boot, or the migration failed.
        """
        self._proof.migrate()

    def assert_ram_equal(self) -> None:
        """Fail if pages were lost, and report where each was lost."""
        proof = self._proof.compare()
        _write(self, "ram", report.to_json(proof), report.to_text(proof))
        if proof.verdict.lost:
            self.fail(proof.verdict.sentence)

    def assert_dma_survived(self) -> None:
        """Fail unless every page is equal and was reported dirty, and the guest found no error.

        A run that tested nothing fails too.
        """
        proof = self._proof.verdict()
        _write(self, "proof", report.to_json(proof), report.to_text(proof))
        if proof.verdict.exit_code:
            self.fail(proof.verdict.sentence)

    def tearDown(self) -> None:
        """Keep the logs; end and reap all processes."""
        with self._started:
            for log in self._environment.logs():
                shutil.copy(log, self.outputdir)


def check_ram(
    test: Test,
    source: AnyQemu,
    destination: AnyQemu,
    *,
    expect_migration: bool = True,
    report_name: str = "ram",
) -> None:
    """Fail `test` unless all RAM of two QEMUs is equal.

    Each is the path of a QMP socket, or an object that executes QMP commands (see `check`). The
    guests must still be paused after the migration, and no other client may use the sockets; see
    docs/check.md. Without `expect_migration`, any two paused QEMUs are compared. The reports are
    `report_name` with ``.json`` and ``.html`` in the test's output folder.

    Raises:
        UsageError: a socket does not exist.
        UntestableError: the RAM could not be compared, the QEMUs have not migrated, or a guest has
            run since.
    """
    with Environment() as environment:
        outcome = environment.check(source, destination, expect_migration=expect_migration)
    _write(test, report_name, check_report.to_json(outcome), check_report.to_text(outcome))
    try:
        outcome.require_equal()
    except RamDiffersError as error:
        test.fail(str(error))


def _write(test: Test, name: str, answer: dict[str, Any], text: str) -> None:
    for line in text.splitlines():
        test.log.info(line)
    folder = Path(test.outputdir)
    (folder / f"{name}.json").write_text(json.dumps(answer, indent=2) + "\n")
    (folder / f"{name}.html").write_text(to_html(answer))
