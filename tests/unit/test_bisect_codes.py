"""The exit codes for 'git bisect run', which takes each of 1 to 127 but 125 for a bad commit."""

from __future__ import annotations

import argparse

import pytest

from dmaproof.errors import DmaproofError, UntestableError, UsageError
from qmp_tools.cli import passthrough
from qmp_tools.cli.main import main
from qmp_tools.exit_codes import EXIT_LOST, EXIT_PASS, EXIT_UNTESTED, EXIT_USAGE

SKIP = 125
ABORT = 128


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have `passthrough` end as the value of --seed says."""
    ends: dict[int, int | BaseException] = {
        0: EXIT_PASS,
        1: EXIT_LOST,
        3: EXIT_UNTESTED,
        4: UntestableError("the kernel does not build"),
        5: UsageError("no such tree"),
        6: KeyboardInterrupt(),
        7: TypeError("a defect"),
        8: DmaproofError("the guest is late"),
    }

    def run(arguments: argparse.Namespace) -> int:
        end = ends[arguments.seed]
        if isinstance(end, BaseException):
            raise end
        return end

    monkeypatch.setattr(passthrough, "_run", run)
    return monkeypatch


@pytest.mark.usefixtures("ending")
@pytest.mark.parametrize(
    ("seed", "plain", "bisecting"),
    [
        (0, EXIT_PASS, EXIT_PASS),
        (1, EXIT_LOST, EXIT_LOST),
        (3, EXIT_UNTESTED, SKIP),
        (4, EXIT_UNTESTED, SKIP),
        (5, EXIT_USAGE, ABORT),
        (6, EXIT_UNTESTED, ABORT),
        (7, EXIT_UNTESTED, ABORT),
        (8, EXIT_UNTESTED, SKIP),
    ],
)
def test_each_end_has_its_exit_code(seed: int, plain: int, bisecting: int) -> None:
    words = ["passthrough", "--seed", str(seed)]
    assert main(words) == plain
    assert main([*words, "--bisect"]) == bisecting
    assert main([*words, "--bis"]) == bisecting


def test_a_mistyped_option_ends_a_bisection() -> None:
    assert main(["passthrough", "--bisect", "--onyl", "rules"]) == ABORT
    with pytest.raises(SystemExit, match="2"):
        main(["passthrough", "--onyl", "rules"])
