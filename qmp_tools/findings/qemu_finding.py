"""What the findings in QEMU have in common: the QEMU under test."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from ..arch.x86_64 import X86_64
from ..qemu.choice import find_qemu, version_of
from .finding import Finding, Program, Reproduction, State, UnderTest


class QemuFinding(Finding):
    """A defect of QEMU."""

    program = Program.QEMU

    async def reproduce(self, under_test: UnderTest) -> Reproduction:
        """Try the finding on the QEMU under test; None is the system's."""
        qemu = find_qemu(under_test.qemu, X86_64)
        state, found = await self.try_on(qemu, under_test)
        return Reproduction(state, found, f"QEMU {version_of(qemu)} ({qemu})")

    @abstractmethod
    async def try_on(self, qemu: Path, under_test: UnderTest) -> tuple[State, str]:
        """Return whether `qemu` has the defect, and what was seen.

        Raises:
            UntestableError: it cannot be tried; the message says why.
        """
