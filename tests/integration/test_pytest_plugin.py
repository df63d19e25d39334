"""The pytest plugin in projects of its own, on a machine where no QEMU can be found."""

from __future__ import annotations

from pathlib import Path

import pytest

import qmp_tools.blocking  # noqa: F401  # pytester forgets what is imported in a run; numpy objects

pytest_plugins = ["pytester"]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty project; no QEMU is in the path, and none was fetched."""
    monkeypatch.setenv("PATH", str(pytester.path))
    monkeypatch.setenv("XDG_DATA_HOME", str(pytester.path))
    monkeypatch.delenv("DMAPROOF_NO_SKIP", raising=False)
    return pytester


def run(project: pytest.Pytester, text: str, *options: str) -> pytest.RunResult:
    project.makepyfile(text)
    return project.runpytest_inprocess(
        "-ra", "--strict-markers", "-p", "no:cacheprovider", *options
    )


TEN_LINES = {
    "qemu": 'def test_it(qemu):\n    qemu("-machine", "none")',
    "migration_pair": "def test_it(migration_pair):\n    migration_pair()",
    "vhost_user_blk": "def test_it(vhost_user_blk):\n    vhost_user_blk()",
    "qemu_version": 'import pytest\n@pytest.mark.qemu_version(">=1")\ndef test_it():\n    pass',
}


@pytest.mark.parametrize("text", TEN_LINES.values(), ids=TEN_LINES)
def test_a_skip_names_its_remedy(project: pytest.Pytester, text: str) -> None:
    result = run(project, text)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*SKIPPED*there is no QEMU: 'apt-get install qemu-system-x86'*"])


@pytest.mark.parametrize("text", TEN_LINES.values(), ids=TEN_LINES)
def test_no_skip_where_skipping_is_forbidden(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("DMAPROOF_NO_SKIP", "1")
    result = run(project, text)
    outcomes = result.parseoutcomes()
    assert "skipped" not in outcomes
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == 1
    result.stdout.fnmatch_lines(["*there is no QEMU*DMAPROOF_NO_SKIP=1 forbids to skip*"])


@pytest.mark.parametrize(
    ("marker", "complaint"),
    [
        ('qemu_version("9 or so")', '*qemu_version("9 or so")*">=9" or *is due*'),
        ("qemu_version(9)", "*qemu_version takes one string*"),
        ("qemu_version", "*qemu_version takes one string*"),
        ('qemu_version(">=9", "<10")', "*qemu_version takes one string*"),
        ('qemu_version(at_least="9")', "*qemu_version takes one string*"),
        ("kvm\n@pytest.mark.tcg", "*marked kvm and tcg; one of them is due*"),
    ],
)
def test_a_malformed_marker_is_a_usage_error(
    project: pytest.Pytester, marker: str, complaint: str
) -> None:
    result = run(project, f"import pytest\n@pytest.mark.{marker}\ndef test_it():\n    pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([complaint])


def test_an_unknown_accelerator_is_a_usage_error(project: pytest.Pytester) -> None:
    result = run(project, "def test_it():\n    pass", "--dmaproof-accel", "warp")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--dmaproof-accel warp: kvm or tcg is due*"])


def test_a_kvm_test_is_skipped_where_tcg_is_asked_for(project: pytest.Pytester) -> None:
    text = "import pytest\n@pytest.mark.kvm\ndef test_it():\n    pass"
    result = run(project, text, "--dmaproof-accel", "tcg")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*SKIPPED*leave out --dmaproof-accel tcg*"])


def test_an_option_that_a_proof_does_not_have_fails(project: pytest.Pytester) -> None:
    result = run(project, "def test_it(vhost_user_blk):\n    vhost_user_blk(trakcer='iommu')")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*UsageError*trakcer is not an option of a proof*"])


@pytest.fixture
def impostor(project: pytest.Pytester) -> Path:
    """A program that ends at once, complaining, as a QEMU with a wrong option does."""
    program = project.path / "impostor"
    program.write_text("#!/bin/sh\necho 'impostor: not today' >&2\nexit 1\n")
    program.chmod(0o755)
    return program


def test_the_last_output_of_a_qemu_that_does_not_start_is_reported(
    project: pytest.Pytester, impostor: Path
) -> None:
    result = run(project, TEN_LINES["qemu"], "--dmaproof-qemu", str(impostor))
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*impostor: not today*"])


def test_nothing_is_imported_that_no_test_needs(project: pytest.Pytester) -> None:
    """The plugin is loaded in every pytest run of its environment."""
    project.makepyfile(
        "import sys\n"
        "def test_it():\n"
        "    assert 'qmp_tools.integrations.pytest_plugin' in sys.modules\n"
        "    assert 'numpy' not in sys.modules\n"
        "    assert 'qmp_tools.qemu.qmp' not in sys.modules\n"
    )
    project.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_a_failures_report_has_the_steps_that_were_logged(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import logging\n"
        "def test_it():\n"
        "    logging.getLogger('qmp_tools.proof.run').info('migrating')\n"
        "    assert False"
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["INFO *qmp_tools.proof.run:*migrating"])
