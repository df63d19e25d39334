"""The pytest plugin in small projects, on a machine where no QEMU can be found."""

from __future__ import annotations

from pathlib import Path

import pytest

import qmp_tools.blocking  # noqa: F401  # pytester unloads what a run imports, and numpy cannot be imported twice

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


SMALL_TESTS = {
    "qemu": 'def test_it(qemu):\n    qemu("-machine", "none")',
    "migration_pair": "def test_it(migration_pair):\n    migration_pair()",
    "vhost_user_blk": "def test_it(vhost_user_blk):\n    vhost_user_blk()",
    "qemu_version": 'import pytest\n@pytest.mark.qemu_version(">=1")\ndef test_it():\n    pass',
}


@pytest.mark.parametrize("text", SMALL_TESTS.values(), ids=SMALL_TESTS)
def test_a_skip_says_how_to_fix_it(project: pytest.Pytester, text: str) -> None:
    result = run(project, text)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*SKIPPED*is not installed: install with the package manager*"])


@pytest.mark.parametrize("text", SMALL_TESTS.values(), ids=SMALL_TESTS)
def test_a_test_fails_where_skipping_is_forbidden(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("DMAPROOF_NO_SKIP", "1")
    result = run(project, text)
    outcomes = result.parseoutcomes()
    assert "skipped" not in outcomes
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == 1
    result.stdout.fnmatch_lines(
        ["*qemu-system-* is not installed*because DMAPROOF_NO_SKIP=1 is set*"]
    )


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('qemu_version("9 or so")', '*qemu_version("9 or so")*expected a specifier such as ">=9"*'),
        ("qemu_version(9)", "*qemu_version takes one string*"),
        ("qemu_version", "*qemu_version takes one string*"),
        ('qemu_version(">=9", "<10")', "*qemu_version takes one string*"),
        ('qemu_version(at_least="9")', "*qemu_version takes one string*"),
        ("kvm\n@pytest.mark.tcg", "*marked kvm and tcg; remove one of the markers*"),
    ],
)
def test_a_malformed_marker_is_a_usage_error(
    project: pytest.Pytester, marker: str, message: str
) -> None:
    result = run(project, f"import pytest\n@pytest.mark.{marker}\ndef test_it():\n    pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_an_unknown_accelerator_is_a_usage_error(project: pytest.Pytester) -> None:
    result = run(project, "def test_it():\n    pass", "--dmaproof-accel", "warp")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--dmaproof-accel: expected kvm or tcg, got 'warp'*"])


def test_a_test_for_kvm_is_skipped_with_accelerator_tcg(project: pytest.Pytester) -> None:
    text = "import pytest\n@pytest.mark.kvm\ndef test_it():\n    pass"
    result = run(project, text, "--dmaproof-accel", "tcg")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*SKIPPED*leave out --dmaproof-accel tcg*"])


def test_an_unknown_option_of_a_proof_fails_the_test(project: pytest.Pytester) -> None:
    result = run(project, "def test_it(vhost_user_blk):\n    vhost_user_blk(trakcer='iommu')")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*UsageError*trakcer is not an option of a proof*"])


@pytest.fixture
def impostor(project: pytest.Pytester) -> Path:
    """A program that prints an error and ends, as a QEMU with a wrong option does."""
    program = project.path / "impostor"
    program.write_text("#!/bin/sh\necho 'impostor: not today' >&2\nexit 1\n")
    program.chmod(0o755)
    return program


def test_the_last_output_of_a_qemu_that_does_not_start_is_reported(
    project: pytest.Pytester, impostor: Path
) -> None:
    result = run(project, SMALL_TESTS["qemu"], "--dmaproof-qemu", str(impostor))
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*impostor: not today*"])


def test_the_plugin_imports_no_heavy_module_without_need(project: pytest.Pytester) -> None:
    """Every pytest run of the environment loads the plugin."""
    project.makepyfile(
        "import sys\n"
        "def test_it():\n"
        "    assert 'qmp_tools.integrations.pytest_plugin' in sys.modules\n"
        "    assert 'numpy' not in sys.modules\n"
        "    assert 'qmp_tools.qemu.qmp' not in sys.modules\n"
    )
    project.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_the_report_of_a_failure_has_the_logged_steps(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import logging\n"
        "def test_it():\n"
        "    logging.getLogger('qmp_tools.proof.run').info('migrating')\n"
        "    assert False"
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["INFO *qmp_tools.proof.run:*migrating"])
