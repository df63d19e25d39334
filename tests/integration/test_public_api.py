"""The package dmaproof in a new interpreter: the modules that an import loads, and the log."""

from __future__ import annotations

import subprocess
import sys


def run(program: str) -> tuple[str, str]:
    """Run a Python program that must succeed; return its standard output and error."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout, done.stderr


def test_the_package_and_its_errors_are_imported_without_numpy() -> None:
    output, _ = run(
        "import sys, dmaproof\n"
        "from dmaproof import UsageError\n"
        "print([name for name in ('numpy', 'importlib.metadata') if name in sys.modules])"
    )
    assert output == "[]\n"


def test_the_logger_is_silent_until_an_application_configures_it() -> None:
    warn = "import logging, dmaproof\nlogging.getLogger('dmaproof.part').warning('overflow')"
    assert run(warn) == ("", "")
    assert "overflow" in run(f"import logging\nlogging.basicConfig()\n{warn}")[1]
