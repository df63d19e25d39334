"""The findings in QEMU, each shown by a proof, or by what QEMU answers without a guest.

docs/qemu-findings.md explains the defects.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from dmaproof.errors import RefusedError, UntestableError

from ..arch.x86_64 import X86_64
from ..exit_codes import EXIT_PASS
from ..migration.migration import MigrationTimeoutError
from ..passthrough import virtio_mem
from ..passthrough.catalog import Request
from ..passthrough.l1.machine import l1
from ..passthrough.migrations import UNTRACKED
from ..passthrough.prove import prove_passthrough
from ..proof.model import Proof, Setup
from ..proof.options import ProofOptions
from ..proof.probes import vcpu_pages_lost
from ..proof.resolve import resolve
from ..proof.run import prove
from ..qemu.builds import is_whole
from ..qemu.choice import find_qemu
from ..qemu.machine import KIB, Machine
from ..qemu.qmp import QmpTimeoutError
from .finding import State, UnderTest
from .qemu_finding import QemuFinding
from .qemu_questions import MigratesWithoutState, OffersFeature, RingSize, StatusAborts


@dataclass(frozen=True)
class ProofFinding(QemuFinding):
    """A defect with which a proof loses pages, or ends with an error.

    Attributes:
        options: the options of the proof, besides the QEMU.
        tries: how many proofs must pass before the defect counts as absent; more than one for a
            race.
        fails_with: the errors that also show the defect.
    """

    options: ProofOptions
    tries: int = 1
    fails_with: tuple[type[UntestableError], ...] = ()

    async def try_on(self, qemu: Path, under_test: UnderTest) -> tuple[State, str]:
        """Carry out proofs until one shows the defect."""
        given = self.options_for(qemu)
        options = replace(given, qemu=str(qemu), timeout=under_test.timeout_s)
        for attempt in range(1, self.tries + 1):
            try:
                proof = await prove(self.adapt(await resolve(options)), keep=under_test.keep)
            except self.fails_with as error:
                return State.REPRODUCED, f"proof {attempt}: {error}"
            if proof.verdict.lost:
                return State.REPRODUCED, f"proof {attempt}: {_lost(proof)}"
            if proof.verdict.exit_code != EXIT_PASS:
                raise UntestableError(
                    f"proof {attempt} neither passed nor lost a page; repeat it: dmaproof prove "
                    f"{' '.join(options.words())}"
                )
        proofs = f"{self.tries} proofs" if self.tries > 1 else "the proof"
        return State.NOT_REPRODUCED, f"{proofs} passed: all pages are equal"

    def options_for(self, qemu: Path) -> ProofOptions:
        """Return the options of the proof of `qemu`."""
        return self.options

    def adapt(self, setup: Setup) -> Setup:
        """Return the set-up with what no option expresses."""
        return setup


def _lost(proof: Proof) -> str:
    pages = [page.gpa for page in proof.verdict.lost if page.gpa is not None]
    where = f", from {min(pages):#x} to {max(pages):#x}" if pages else ""
    return f"{len(proof.verdict.lost)} of {proof.verdict.pages} pages lost{where}"


NODE_BYTES: Final = 65544 * KIB
"""A multiple of 8 KiB, but not of the 256 KiB that a word of the vhost log stands for."""


class EqualNodes(Machine):
    """A machine whose NUMA nodes all have the same size, whatever that size is."""

    @property
    def ram_backends(self) -> dict[str, int]:
        """The backends with their sizes."""
        names = super().ram_backends
        return dict.fromkeys(names, self.memory_bytes // len(names))


class SharedWord(ProofFinding):
    """Two RAM blocks with a border inside a word of the log, which no option can make."""

    def adapt(self, setup: Setup) -> Setup:
        """Replace the machine."""
        members = {each.name: getattr(setup.machine, each.name) for each in fields(Machine)}
        return replace(setup, machine=EqualNodes(**members))


class KilledBackEnd(ProofFinding):
    """QEMU's own vhost-user-blk back end, which is killed; it is the one beside the QEMU."""

    def options_for(self, qemu: Path) -> ProofOptions:
        """Add the command that starts the back end.

        Raises:
            UntestableError: there is no qemu-storage-daemon.
        """
        name = "qemu-storage-daemon"
        beside = qemu.with_name(name)
        program = str(beside) if beside.exists() else shutil.which(name)
        if program is None:
            raise UntestableError(
                f"{name} is neither beside {qemu} nor in PATH; install it (on Debian: the package "
                "qemu-utils)"
            )
        export = (
            "--export vhost-user-blk,id=d,node-name=disk,writable=on,num-queues={queues},"
            "addr.type=unix,addr.path={socket}"
        )
        blockdev = "--blockdev driver=file,node-name=disk,filename={image},locking=off"
        return replace(self.options, device_command=f"{program} {blockdev} {export}")


@dataclass(frozen=True)
class LostVcpuWrites(QemuFinding):
    """vCPU writes to a RAM block behind the first one are lost under TCG; no device is involved."""

    async def try_on(self, qemu: Path, under_test: UnderTest) -> tuple[State, str]:
        """Migrate the probe's guest."""
        lost = await vcpu_pages_lost(X86_64, qemu, "tcg", under_test.timeout_s, in_dimms=True)
        found = f"{lost} of the 64 pages lost that a vCPU writes for ever"
        return (State.REPRODUCED if lost else State.NOT_REPRODUCED), found


@dataclass(frozen=True)
class VfioMigration(QemuFinding):
    """A migration of vfio-pci in the nested machine L1: the `proof` of the group migration.

    The proof has the number of differing pages, or says that QEMU has crashed or is correct.
    """

    proof: str

    async def try_on(self, qemu: Path, under_test: UnderTest) -> tuple[State, str]:
        """Carry out the migration of vfio-pci on the fake device.

        Raises:
            UntestableError: `qemu` is the system's, or cannot carry out this migration.
        """
        if not is_whole(qemu):
            raise UntestableError(
                f"{qemu} does not run in L1, which has other libraries; name one (--qemu) that "
                "'dmaproof qemu fetch' or 'dmaproof qemu build' has made"
            )
        request = Request(
            seed=1,  # the migration makes no random choice
            only=(f"migration: {self.proof}",),
            timeout_s=under_test.timeout_s,
        )
        machine, binary = replace(l1(), qemu=qemu.parent), find_qemu(None, X86_64)
        report = await prove_passthrough(machine, binary, request, keep=under_test.keep)
        (outcome,) = report["outcomes"]
        if outcome["corrected"]:
            return State.NOT_REPRODUCED, outcome["found"]
        if outcome["figures"].get("crashed"):
            return State.REPRODUCED, outcome["found"]
        if "differing" not in outcome["figures"]:
            raise UntestableError(outcome["found"])
        lost = outcome["figures"]["differing"]
        return (State.REPRODUCED if lost else State.NOT_REPRODUCED), outcome["found"]


QEMU_FINDINGS: Final = (
    SharedWord(
        "vhost-log-shared-word",
        "bits of the vhost log are lost where two RAM blocks share a word of it",
        "QEMU 7.2, 10.0 and 11.1",
        # The bare guest uses the pages at the border only if it writes this much.
        ProofOptions(guest="bare", numa=2, memory=2 * NODE_BYTES, workload="write_once=20480"),
    ),
    KilledBackEnd(
        "vhost-log-discarded",
        "the vhost log is discarded if a vhost-user-blk back end dies",
        "QEMU 7.2, 10.0 and 11.1",
        ProofOptions(guest="bare", kill_device=True),
    ),
    VfioMigration(
        "vfio-untracked",
        "every page that a VFIO device writes is lost if nothing tracks dirty pages",
        "QEMU 10.0 and 11.1",
        UNTRACKED,
    ),
    VfioMigration(
        "vfio-virtio-mem",
        "pages of virtio-mem that a VFIO device writes are lost, or QEMU crashes",
        "QEMU 10.0 and 11.1",
        virtio_mem.DEFECTS["iommufd"],
    ),
    LostVcpuWrites(
        "tcg-later-blocks",
        "under TCG, vCPU writes to RAM blocks behind the first one are lost",
        "QEMU 7.2, 10.0 and 11.1",
    ),
    ProofFinding(
        "postcopy-preempt-vhost-user",
        "postcopy with preempt and a vhost-user device never completes",
        "QEMU 10.0 and 11.1",
        ProofOptions(guest="bare", scenario="postcopy-preempt"),
        fails_with=(MigrationTimeoutError, QmpTimeoutError),
    ),
    ProofFinding(
        "postcopy-iommu-vhost-user",
        "postcopy with a vhost-user device behind an IOMMU mixes up answers",
        "QEMU 7.2 and 10.0",
        ProofOptions(guest="bare", scenario="postcopy-running", iommu="intel"),
        tries=5,
        fails_with=(RefusedError, QmpTimeoutError),
    ),
    OffersFeature(
        "vhost-user-scsi-change",
        "vhost-user-scsi offers a feature that the back end does not have",
        "QEMU 7.2, 10.0 and 11.1",
        "vhost-user-scsi-pci",
    ),
    MigratesWithoutState(
        "vhost-user-gpu-state",
        "vhost-user-gpu is migrated without its state",
        "QEMU 7.2, 10.0 and 11.1",
        "vhost-user-gpu-pci",
    ),
    RingSize(
        "virtio-ring-1024",
        "each virtio ring has 1024 entries",
        "QEMU 10.0.13",
    ),
    StatusAborts(
        "virtio-status-abort",
        "x-query-virtio-status aborts QEMU",
        "QEMU 11.1",
    ),
)
