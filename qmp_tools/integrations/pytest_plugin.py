"""The pytest plugin: fixtures that start QEMUs, migrate them and compare their RAM.

pytest finds the plugin by its entry point once dmaproof is installed; docs/pytest.md shows a whole
project. Fixtures and tests are synchronous (`blocking`), so they neither need a plugin for
asynchronous tests nor disturb one. Every pytest run of the environment loads this module, so only
the fixtures that need heavy modules import them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import pytest

from dmaproof.errors import UntestableError, UsageError, printable

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

    from ..blocking import Environment, Pair, RunningQemu, StepwiseProof
    from ..proof.model import Proof
    from ..proof.options import ProofOptions
    from ..qemu.opening import AnyQemu
    from ..ram_check.outcome import Check

T = TypeVar("T")

_MARKERS: Final = (
    "kvm: the fixtures' guests run under KVM; the test is skipped if KVM does not run them",
    "tcg: the fixtures' guests run under TCG",
    'qemu_version(specifier): the test needs a QEMU such as ">=9" (or ">=8.2,<10")',
)
_OPTIONS: Final = {
    "qemu": ("PATH|VERSION", "the QEMU of the fixtures (default: the system's)"),
    "qemu-destination": ("PATH|VERSION", "the destination's QEMU (default: the same)"),
    "accel": ("kvm|tcg", "the accelerator of tests that are not marked kvm or tcg"),
    "guest": ("NAME", "the guest of vhost_user_blk (default: bare)"),
    "seed": ("N", "seed of an earlier run, to repeat vhost_user_blk's random choices"),
    "reports": ("FOLDER", "write the JSON and HTML reports of each verdict to this folder"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugin."""
    group = parser.getgroup("dmaproof", "dmaproof: QEMUs, migrations and their RAM")
    for name, (metavar, what) in _OPTIONS.items():
        group.addoption(f"--dmaproof-{name}", metavar=metavar, help=what)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and refuse a wrong option before any test runs."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    # By default pytest drops records below WARNING; the report of a failure needs the steps.
    logging.getLogger("qmp_tools").setLevel(logging.INFO)
    accelerator = _option(config, "accel")
    if accelerator not in (None, "kvm", "tcg"):
        raise pytest.UsageError(f"--dmaproof-accel: expected kvm or tcg, got {accelerator!r}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse malformed markers before any test runs."""
    for item in items:
        _wanted_versions(item)
        _marked_accelerator(item)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that this machine or its QEMU does not support."""
    versions = _wanted_versions(item)
    if versions:
        version = _qemu_version(item.config)
        unmet = [str(each) for each in versions if not each.contains(version, prereleases=True)]
        if unmet:
            _unavailable(
                f"the test needs QEMU {' and '.join(unmet)}, found {version}: run 'dmaproof qemu "
                "fetch VERSION', and then pytest with --dmaproof-qemu VERSION"
            )
    if _marked_accelerator(item) == "kvm":
        if _option(item.config, "accel") == "tcg":
            _unavailable("marked kvm: leave out --dmaproof-accel tcg")
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            _unavailable("this user may not open /dev/kvm: 'dmaproof doctor' says how to fix it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the verdicts and the last lines of the logs to the report of a failure."""
    report = yield
    if report.failed and call.when == "call":
        verdicts = item.stash.get(_VERDICTS, None)
        report.sections += verdicts or []
        report.sections += [
            (f"dmaproof {log.name}", printable(log.read_text(errors="replace")[-_LOG_SHOWN:]))
            for environment in item.stash.get(_ENVIRONMENTS, [])
            for log in environment.logs()
            if log.stat().st_size
        ]
    return report


_LOG_SHOWN: Final = 4000
_ENVIRONMENTS: Final = pytest.StashKey[list["Environment"]]()
_VERDICTS: Final = pytest.StashKey[list[tuple[str, str]]]()
_VERSIONS: Final = pytest.StashKey[dict[str | None, str]]()


@pytest.fixture
def qemu(request: pytest.FixtureRequest) -> Iterator[Callable[..., RunningQemu]]:
    """Return a function that starts a QEMU: ``qemu("-machine", "q35", …)``.

    The QEMUs are ended and reaped after the test.
    """
    number = 0

    with _environment(request) as environment:

        def start(*arguments: str) -> RunningQemu:
            nonlocal number
            number += 1
            running = _started(
                lambda: environment.qemu(arguments, name=f"test{number}", **_arguments(request))
            )
            _note_version(request, running.version)
            return running

        yield start


@pytest.fixture
def migration_pair(request: pytest.FixtureRequest) -> Iterator[Callable[..., Pair]]:
    """Return a function that starts a pair of QEMUs: ``migration_pair("-machine", "q35", …)``.

    The pair's `migrate` leaves both guests paused, so that `ram_check` can compare them.
    """
    number = 0

    with _environment(request) as environment:

        def start(*arguments: str) -> Pair:
            nonlocal number
            number += 1
            destination = _option(request.config, "qemu-destination")
            pair = _started(
                lambda: environment.pair(
                    arguments,
                    destination_binary=destination,
                    name=f"pair{number}-",
                    **_arguments(request),
                )
            )
            _note_version(request, pair.source.version)
            return pair

        yield start


class VhostUserBlk:
    """A guest on two QEMUs, with a vhost-user disk of dmaproof's."""

    def __init__(self, proof: StepwiseProof, request: pytest.FixtureRequest) -> None:
        self._request = request
        self.proof = proof

    def migrate(self) -> None:
        """Migrate while the device writes guest RAM.

        Raises:
            UntestableError: the guest did not boot, or the migration failed.
        """
        self.proof.migrate()

    def verdict(self) -> Proof:
        """Compare all RAM, attribute lost pages, and let the guest continue.

        It migrates first if `migrate` was not called.

        Raises:
            UntestableError: the proof came to no verdict.
        """
        from ..reports import report

        proof = self.proof.verdict()
        _note_version(self._request, proof.qemu_version)
        _note_verdict(self._request, report.to_json(proof), report.to_text(proof))
        return proof

    def assert_dma_survived(self) -> None:
        """Fail unless the verdict is a pass; the report of the failure has the whole verdict."""
        __tracebackhide__ = True
        verdict = self.verdict().verdict
        if verdict.exit_code:
            raise AssertionError(verdict.sentence)


@pytest.fixture
def vhost_user_blk(request: pytest.FixtureRequest) -> Iterator[Callable[..., VhostUserBlk]]:
    """Return a function that starts a guest with a disk: ``vhost_user_blk(scenario="tcp")``.

    The disk is dmaproof's. The function's arguments are the fields of `ProofOptions`.
    """
    from ..proof.options import ProofOptions

    with contextlib.ExitStack() as environments:

        def start(**options: object) -> VhostUserBlk:
            config = request.config
            chosen: dict[str, object] = {
                "guest": _option(config, "guest") or "bare",
                "qemu": _option(config, "qemu"),
                "qemu_destination": _option(config, "qemu-destination"),
                "seed": _option(config, "seed"),
                "accel": _accelerator(request),
                **options,
            }
            wanted = ProofOptions.of(chosen)
            environment = environments.enter_context(_environment(request))
            if _marked_accelerator(request.node) == "kvm":
                _started(lambda: _require_kvm(environment, wanted))
            return VhostUserBlk(_started(lambda: environment.start_proof(wanted)), request)

        yield start


@pytest.fixture
def ram_check(request: pytest.FixtureRequest) -> Iterator[Callable[..., Check]]:
    """Return a function that fails unless all RAM of two paused QEMUs is equal.

    Call ``ram_check(pair.source, pair.destination)`` after a migration, with QEMUs of the
    fixtures, paths of QMP sockets, or objects such as a QEMUMachine. With
    ``expect_migration=False``, any two paused QEMUs are compared.
    """
    from ..reports import check_report

    with _environment(request) as environment:

        def compare(
            source: RunningQemu | AnyQemu,
            destination: RunningQemu | AnyQemu,
            *,
            expect_migration: bool = True,
        ) -> Check:
            __tracebackhide__ = True
            outcome = environment.check(source, destination, expect_migration=expect_migration)
            _note_version(request, outcome.source.version)
            _note_verdict(request, check_report.to_json(outcome), check_report.to_text(outcome))
            outcome.require_equal()
            return outcome

        yield compare


@contextlib.contextmanager
def _environment(request: pytest.FixtureRequest) -> Iterator[Environment]:
    from ..blocking import Environment

    with Environment() as environment:
        request.node.stash.setdefault(_ENVIRONMENTS, []).append(environment)
        yield environment


def _started(start: Callable[[], T]) -> T:
    """Return what `start` returns; skip the test if a prerequisite is missing.

    A wrong option fails the test.
    """
    try:
        return start()
    except UntestableError as error:
        _unavailable(str(error))


def _unavailable(reason: str) -> NoReturn:
    if os.environ.get("DMAPROOF_NO_SKIP") == "1":
        pytest.fail(
            f"{reason} (an error and not a skip, because DMAPROOF_NO_SKIP=1 is set)", pytrace=False
        )
    pytest.skip(reason)


def _require_kvm(environment: Environment, options: ProofOptions) -> None:
    """Raise if KVM does not run the guest of these options."""
    from ..proof.resolve import resolve

    found = environment.run(resolve(replace(options, accel="auto")))
    if found.machine.accelerator != "kvm":
        raise UntestableError(
            f"KVM does not run the guest {options.guest} on this machine: use hardware, or a "
            "hypervisor with nested virtualization"
        )


def _option(config: pytest.Config, name: str) -> str | None:
    value: str | None = config.getoption(f"--dmaproof-{name}")
    return value


def _arguments(request: pytest.FixtureRequest) -> dict[str, str | None]:
    return {"binary": _option(request.config, "qemu"), "accelerator": _accelerator(request)}


def _accelerator(request: pytest.FixtureRequest) -> str | None:
    return _marked_accelerator(request.node) or _option(request.config, "accel")


def _marked_accelerator(item: pytest.Item) -> str | None:
    marked = [name for name in ("kvm", "tcg") if item.get_closest_marker(name)]
    if len(marked) > 1:
        raise pytest.UsageError(f"{item.nodeid}: marked kvm and tcg; remove one of the markers")
    return marked[0] if marked else None


def _wanted_versions(item: pytest.Item) -> Sequence[SpecifierSet]:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    wanted = []
    for marker in item.iter_markers("qemu_version"):
        if len(marker.args) != 1 or marker.kwargs or not isinstance(marker.args[0], str):
            raise pytest.UsageError(
                f'{item.nodeid}: qemu_version takes one string, such as qemu_version(">=9")'
            )
        try:
            wanted.append(SpecifierSet(marker.args[0]))
        except InvalidSpecifier as error:
            raise pytest.UsageError(
                f'{item.nodeid}: qemu_version("{marker.args[0]}"): {error}; '
                'expected a specifier such as ">=9" or ">=8.2,<10"'
            ) from None
    return wanted


def _qemu_version(config: pytest.Config) -> str:
    """Return the version of the options' QEMU, which is asked once over QMP."""
    from ..blocking import Environment

    wanted = _option(config, "qemu")
    versions = config.stash.setdefault(_VERSIONS, {})
    if wanted not in versions:
        with Environment() as environment:
            running = _started(lambda: environment.qemu(["-machine", "none"], binary=wanted))
            versions[wanted] = running.version.split()[0]
    return versions[wanted]


def _note_version(request: pytest.FixtureRequest, version: str) -> None:
    noted = ("qemu_version", version)
    if noted not in request.node.user_properties:
        request.node.user_properties.append(noted)


def _note_verdict(request: pytest.FixtureRequest, answer: dict[str, Any], text: str) -> None:
    """Store a verdict for the report of a failure, for JUnit and for ``--dmaproof-reports``."""
    verdicts = request.node.stash.setdefault(_VERDICTS, [])
    if ("dmaproof verdict", text) in verdicts:
        return
    verdicts.append(("dmaproof verdict", text))
    request.node.user_properties.append(("dmaproof_verdict", answer["verdict"]))
    folder = _option(request.config, "reports")
    if folder is None:
        return
    from ..reports.html import to_html

    name = "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in request.node.nodeid)
    base = Path(folder) / f"{name}-{len(verdicts)}"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{base}.json").write_text(json.dumps(answer, indent=2) + "\n")
        Path(f"{base}.html").write_text(to_html(answer))
    except OSError as error:
        raise UsageError(f"--dmaproof-reports {folder}: {error.strerror}") from error
