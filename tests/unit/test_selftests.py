"""The results of the kernel's selftests, from their output."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmp_tools.passthrough import catalog
from qmp_tools.passthrough.ktap_results import Result, read_ktap
from qmp_tools.passthrough.l1.selftests import PROGRAMS
from qmp_tools.passthrough.outcome import NotSupportedError, ProofFailedError, State, run
from qmp_tools.passthrough.selftests import judge, why_missing

TWO_PASS = """\
TAP version 13
1..2
# Starting 2 tests from 1 test cases.
#  RUN           group.variant.first ...
#            OK  group.variant.first
ok 1 group.variant.first
#  RUN           group.variant.second ...
#            OK  group.variant.second
ok 2 group.variant.second
# PASSED: 2 / 2 tests passed.
# Totals: pass:2 fail:0 xfail:0 xpass:0 skip:0 error:0
"""


def failure(output: str, code: int | None) -> str:
    with pytest.raises(ProofFailedError) as error:
        judge(read_ktap(output), code, output)
    return str(error.value)


def figures(output: str) -> tuple[int, int, int]:
    counts = judge(read_ktap(output), 0, output)[1]
    return counts["passed"], counts["skipped"], counts["failed"]


# Reading KTAP -------------------------------------------------------------------------------------


def test_a_program_without_a_failed_test_holds() -> None:
    found, counts = judge(read_ktap(TWO_PASS), 0, TWO_PASS)
    assert found == "2 tests passed"
    assert counts == {"passed": 2, "skipped": 0, "failed": 0}


def test_skipped_tests_are_counted_separately() -> None:
    output = TWO_PASS.replace("ok 2 group.variant.second", "ok 2 group.variant.second # SKIP none")
    found, _ = judge(read_ktap(output), 0, output)
    assert found == "1 tests passed, 1 skipped"
    assert figures(output) == (1, 1, 0)


def test_expected_failures_pass() -> None:
    output = "1..2\nok 1 a # XFAIL unknown\nok 2 b # XPASS unknown\n"
    assert figures(output) == (2, 0, 0)


def test_failed_tests_are_named() -> None:
    output = TWO_PASS.replace("\nok 2", "\nnot ok 2")
    assert failure(output, 1) == "1 of 2 tests failed: group.variant.second; exit code 1"


def test_many_failed_tests_are_counted() -> None:
    output = "1..11\n" + "".join(f"not ok {number} t{number}\n" for number in range(1, 12))
    assert failure(output, 1) == (
        "11 of 11 tests failed: t1, t2, t3, t4, t5, t6, t7, t8 and 3 more; exit code 1"
    )


@pytest.mark.parametrize(
    ("line", "name", "result"),
    [
        ("ok 1 - name", "name", Result.PASSED),
        ("ok 1 # SKIP name", "name", Result.SKIPPED),
        ("ok 1 name # skip no device", "name", Result.SKIPPED),
        ("ok 1 name # SKIPPED is another word", "name", Result.PASSED),
        ("not ok 1 name # SKIP is not valid", "name", Result.FAILED),
        ("not ok 1 # error name", "name", Result.FAILED),
        ("ok 1", "test 1", Result.PASSED),
        ("ok 1 name #  unknown", "name", Result.PASSED),
    ],
)
def test_a_result_line_has_a_name_and_a_directive(line: str, name: str, result: Result) -> None:
    assert read_ktap(f"1..1\n{line}\n").results == ((name, result),)


def test_subtests_count_with_their_parent_and_are_named_if_it_fails() -> None:
    output = """\
KTAP version 1
1..2
  KTAP version 1
  # Subtest: first
  1..3
  ok 1 good
  not ok 2 bad
    not ok 1 deep
  ok 3 other # SKIP
not ok 1 first
  KTAP version 1
  1..1
  ok 1 only
ok 2 second
"""
    results = read_ktap(output)
    assert results.is_complete
    assert results.names(Result.FAILED) == ["first (bad, deep)"]
    assert results.names(Result.PASSED) == ["second"]


def test_a_known_failure_is_reported_and_fails_only_with_another_one() -> None:
    output = TWO_PASS.replace("\nok 2", "\nnot ok 2")
    found, counts = judge(read_ktap(output), 1, output, frozenset({"second"}))
    assert found == "1 tests passed, 1 failed as known: second"
    assert counts == {"passed": 1, "skipped": 0, "failed": 1}
    both = output.replace("\nok 1", "\nnot ok 1")
    with pytest.raises(ProofFailedError, match=r"2 of 2 tests failed: \S+\.second, "):
        judge(read_ktap(both), 1, both, frozenset({"first"}))
    with pytest.raises(ProofFailedError, match="1 results of 2"):
        judge(read_ktap(output.replace("\nok 1", "\n# ok 1")), 1, output, frozenset({"second"}))


# Output that a test prints ------------------------------------------------------------------------


def test_a_test_that_prints_its_own_pass_does_not_hide_its_failure() -> None:
    output = TWO_PASS.replace("\nok 2", "\nok 2 group.variant.second\nnot ok 2")
    assert failure(output, 1) == "1 of 2 tests failed: group.variant.second; exit code 1"


def test_a_test_that_prints_a_failure_and_passes_is_no_failure() -> None:
    forged = "not ok 2 group.variant.second\n  not ok 7 subtest\nnot ok 3 beyond the plan\n"
    output = TWO_PASS.replace("ok 2", f"{forged}ok 2")
    assert figures(output) == (2, 0, 0)


def test_a_test_that_prints_another_plan_does_not_change_the_number() -> None:
    output = TWO_PASS.replace("ok 1", "1..1\nok 1")
    assert read_ktap(output).planned == 2


def test_results_that_a_test_prints_for_later_ones_do_not_make_up_for_a_crash() -> None:
    output = "1..3\n#  RUN           a ...\nok 1 a\nok 2 b\nok 3 c\n"
    message = failure(output, -11)
    assert message.startswith("3 results of 3 planned tests; the last test: c")
    assert "killed by SIGSEGV" in message


def test_the_exit_code_fails_a_program_whose_results_all_pass() -> None:
    assert "exit code 1" in failure(TWO_PASS, 1)


# Programs that do not end as planned --------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "last"),
    [
        ("ok 2 group", "group.variant.second"),
        ("#            OK  group.variant.second", "group.variant.second"),
        ("#  RUN           group.variant.second", "group.variant.first"),
    ],
)
def test_output_that_ends_early_is_a_failure_that_names_the_last_test(end: str, last: str) -> None:
    cut = TWO_PASS[: TWO_PASS.index(end) + len(end)]
    assert failure(cut, -9).startswith(f"1 results of 2 planned tests; the last test: {last};")


def test_a_crash_before_the_plan_is_a_failure() -> None:
    output = "Assertion failed\n"
    message = failure(output, -6)
    assert message.startswith("0 results of no plan; the last test: none; the program was killed")
    assert message.endswith("SIGABRT\nAssertion failed")


def test_a_program_without_output_is_a_failure() -> None:
    assert failure("", 0).startswith("0 results of no plan")


# Programs that test nothing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("1..0 # SKIP no device\n", 4),
        ("Unable to determine which device(s) to use, skipping test.\n", 4),
        ("1..2\nok 1 a # SKIP\nok 2 b # SKIP\n", 0),
    ],
)
def test_a_program_that_skips_all_its_tests_is_unsupported(output: str, code: int) -> None:
    with pytest.raises(NotSupportedError, match="skipped"):
        judge(read_ktap(output), code, output)


def test_a_program_that_is_not_built_is_unsupported_with_the_compilers_words(
    tmp_path: Path,
) -> None:
    (tmp_path / "log").write_text("iommufd.c:1: error: no such thing\nmake: Error 1\n")
    message = why_missing(tmp_path, "iommufd")
    assert message.startswith("iommufd was not built")
    assert "error: no such thing" in message
    (tmp_path / "log").write_text("")
    assert "no program iommufd" in why_missing(tmp_path, "iommufd")
    assert "without its source" in why_missing(tmp_path / "none", "iommufd")
    proof = catalog.GROUPS["selftests"](catalog.Request(0, ()), catalog.Guests(tmp_path, tmp_path))
    assert run("selftests", "iommufd", proof["iommufd"]).state is State.NOT_SUPPORTED


# The group ----------------------------------------------------------------------------------------


def test_the_names_of_the_proofs_are_known_without_l1() -> None:
    names = {name for names in PROGRAMS.values() for name in names}
    assert {f"selftests: {name}" for name in names} == set(catalog.select(["selftests"]))


@pytest.mark.parametrize(
    ("only", "has"),
    [((), False), (("selftests: iommufd",), True), (("rules: START: no range",), False)],
)
def test_only_the_selftests_need_hardware(only: tuple[str, ...], has: bool) -> None:
    assert catalog.Request(0, only=only).has_selftests is has
