"""The findings in Linux, each shown by proofs of ``dmaproof passthrough``.

The proofs are in `passthrough.vfio_rules`, `passthrough.iommufd_rules` and `passthrough.vhost_log`.
Here they run alone, in one boot of the nested machine L1. docs/kernel-findings.md explains the
defects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from dmaproof.errors import UnsupportedError, UntestableError

from ..arch.x86_64 import X86_64
from ..passthrough import outcome
from ..passthrough.catalog import Request
from ..passthrough.l1.kernel import DEFAULT_KERNEL
from ..passthrough.l1.machine import L1, l1, l1_of_patches, l1_of_source
from ..passthrough.prove import prove_passthrough
from ..qemu.choice import find_qemu
from .finding import Attempt, Finding, Program, Reproduction, State, UnderTest


@dataclass(frozen=True)
class LinuxFinding(Finding):
    """A defect of the kernel that one or more proofs show.

    The kernel has the defect if it shows in one of them. `proofs` are their names, as in
    `passthrough.catalog.names`.
    """

    program = Program.LINUX
    proofs: tuple[str, ...]

    async def reproduce(self, under_test: UnderTest) -> Reproduction:
        """Boot L1 with the kernel, and carry out the proofs of this finding only."""
        (attempt,) = await self.try_all([self], under_test)
        if isinstance(attempt.outcome, UntestableError):
            raise attempt.outcome
        return attempt.outcome

    @classmethod
    async def try_all(cls, findings: Sequence[Self], under_test: UnderTest) -> list[Attempt]:
        """Try all findings in one boot of L1.

        Raises:
            UntestableError: L1 does not boot.
        """
        machine = _machine(under_test)
        request = Request(
            seed=1,  # the defects show with any seed
            only=tuple(name for finding in findings for name in finding.proofs),
            timeout_s=under_test.timeout_s,
        )
        binary = find_qemu(None, X86_64)
        report = await prove_passthrough(machine, binary, request, keep=under_test.keep)
        return [finding._judge(report) for finding in findings]

    def _judge(self, report: Mapping[str, Any]) -> Attempt:
        outcomes = [
            each for each in report["outcomes"] if f"{each['group']}: {each['name']}" in self.proofs
        ]
        try:
            return Attempt(self, judged(outcomes, _tested(report)))
        except UntestableError as error:
            return Attempt(self, error)


def _machine(under_test: UnderTest) -> L1:
    """Return an L1 with the kernel to test, and never with another one."""
    if under_test.kernel_source is not None:
        return l1_of_source(under_test.kernel_source)
    if under_test.kernel_patches:
        return l1_of_patches(under_test.kernel_patches)
    return l1(under_test.kernel or DEFAULT_KERNEL, falls_back=False)


def _tested(report: Mapping[str, Any]) -> str:
    origin = report.get("kernel_source")
    return f"Linux {report['kernel']}" + (f" from {origin}" if origin else "")


def judged(outcomes: Sequence[Mapping[str, Any]], tested: str) -> Reproduction:
    """Return what the outcomes of a finding's proofs say about the kernel.

    Args:
        outcomes: the outcomes, as in the report of the passthrough proofs.
        tested: the kernel that was tested.

    Raises:
        UnsupportedError: the kernel supports none of the proofs.
        UntestableError: a proof had neither the known nor the correct result.
    """
    reproduced = [each for each in outcomes if each["state"] == outcome.State.HOLDS]
    if reproduced:
        return Reproduction(State.REPRODUCED, _found(reproduced), tested)
    corrected = [each for each in outcomes if each["corrected"]]
    unsupported = [each for each in outcomes if each["state"] == outcome.State.NOT_SUPPORTED]
    if unclear := [each for each in outcomes if each not in unsupported]:
        raise UntestableError(
            f"{tested} behaves neither as the finding says nor correctly:\n{_found(unclear)}"
        )
    if not corrected:
        raise UnsupportedError(f"{tested} supports none of the proofs:\n{_found(unsupported)}")
    return Reproduction(State.NOT_REPRODUCED, _found(corrected), tested)


def _found(outcomes: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{each['name']}: {each['found']}" for each in outcomes)


LINUX_FINDINGS: Final = (
    LinuxFinding(
        "iova-bitmap-early-range",
        "a dirty huge entry that begins before the requested range is lost",
        "iommufd in Linux 7.3.4, DMA logging in Linux 6.1 and 7.3.4",
        (
            "rules: HWPT: a huge entry that begins before the requested range is lost",
            "rules: ITERATOR: a range that begins before the bitmap is dropped entirely",
        ),
    ),
    LinuxFinding(
        "iova-bitmap-overrun",
        "a dirty huge entry that ends after the requested range overruns the bitmap",
        "iommufd in Linux 7.3.4, DMA logging in Linux 6.1 and 7.3.4",
        (
            "rules: HWPT: a huge entry that ends after the requested range overruns the bitmap",
            "rules: ITERATOR: a range that ends after the bitmap overruns it",
        ),
    ),
    LinuxFinding(
        "hwpt-hole",
        "a hole ends GET_DIRTY_BITMAP, and the request succeeds",
        "iommufd in Linux 7.3.4",
        ("rules: HWPT: a hole ends the walk, and the request succeeds",),
    ),
    LinuxFinding(
        "iova-bitmap-lost-fault",
        "dirty bits that cannot be written are lost, and the request succeeds",
        "DMA logging in Linux 7.3.4, but not in 6.1",
        ("rules: ITERATOR: if the bitmap cannot be written, bits are lost silently",),
    ),
    LinuxFinding(
        "hwpt-odd-page-size",
        "GET_DIRTY_BITMAP accepts a page size that is not a power of two",
        "iommufd in Linux 7.3.4",
        ("rules: HWPT: a page size that is not a power of two is accepted",),
    ),
    LinuxFinding(
        "vhost-iotlb-used-ring",
        "with an IOTLB, a write to the used ring is logged up to a page border only",
        "vhost in Linux 6.1 and 7.3.4",
        ("vhost-log: net: IOTLB, the used ring is logged up to a page border only",),
    ),
    LinuxFinding(
        "vhost-in-order-used-ring",
        "the wrong part of the used ring is logged if buffers are used in order",
        "vhost in Linux 7.3.4; 6.1 does not have the feature",
        (
            "vhost-log: net: in order, the last entries of a batch are not logged",
            "vhost-log: net: in order, entries after the wrap are not logged",
            "vhost-log: net: in order, pages after the used ring are logged",
        ),
    ),
    LinuxFinding(
        "vhost-vsock-buffers",
        "vhost-vsock logs no buffer of a received packet",
        "vhost-vsock in Linux 6.1 and 7.3.4",
        (
            "vhost-log: vsock: received buffers are not logged",
            "vhost-log: vsock: received buffers are not logged, IOTLB",
        ),
    ),
    LinuxFinding(
        "vhost-net-discarded-frame",
        "a byte of a frame that does not fit changes a buffer, and is not logged",
        "vhost-net in Linux 6.1 and 7.3.4",
        ("vhost-log: net: a frame that does not fit writes a byte that is not logged",),
    ),
    LinuxFinding(
        "vhost-scsi-in-flight",
        "vhost-scsi does not log commands that are in flight when the log begins",
        "vhost-scsi in Linux 7.3.4; 6.1 logs no command at all",
        ("vhost-log: scsi: reads in flight when the log begins are not logged",),
    ),
)
