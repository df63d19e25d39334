"""A proof as JSON for programs and as text for people; every other report is made from the JSON.

The members of the JSON keep their meaning as long as `SCHEMA_VERSION` does not change. New members
may be added. docs/report.schema.json describes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from dmaproof.trace import Link
from dmaproof.units import PAGE_BYTES

from ..memory.ram_blocks import RamBlock, known_tcg_loss
from ..migration.downtime import downtime_parts
from ..migration.judgement import Blame, EvidenceSource
from ..proof.attribution import LostPage
from ..proof.model import MigrationSummary, Proof
from ..proof.options import ProofOptions
from ..proof.ram_map import MapArea
from ..proof.sensitivity import Sensitivity
from ..qemu.machine import (
    DIMM_BYTES,
    Machine,
    format_memory,
    ram_granule_bytes,
)
from ..qemu.memory_backend import MEMFD
from ..words import bytes_differ, counted
from .precopy import harvest_list, passes

SCHEMA_VERSION: Final = 4
_LOST_SHOWN: Final = 10


def to_json(proof: Proof) -> dict[str, Any]:
    """Return all findings of a proof. Addresses and sizes in bytes, times in seconds."""
    setup, verdict = proof.setup, proof.verdict
    began_ns = proof.history[0].time_ns
    harvests = harvest_list(proof.harvests, began_ns)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "prove",
        "verdict": verdict.sentence,
        "exit_code": verdict.exit_code,
        "pages": verdict.pages,
        "lost": {blame.value: verdict.count(blame) for blame in Blame},
        "lost_pages": [{**asdict(page), "story": _story(page)} for page in verdict.lost],
        "sensitivity": verdict.sensitivity.to_json(),
        "settled_s": verdict.settled_s,
        "log": asdict(verdict.log) if verdict.log else None,
        "unseen": verdict.unseen,
        "given_back_pages": verdict.given_back,
        "guest": asdict(verdict.guest),
        "downtime": verdict.downtime.to_json(),
        "wrong_rings": [{**asdict(ring), "story": ring.story} for ring in verdict.wrong_rings],
        "refusal": verdict.refusal,
        "changes": asdict(verdict.changes) if verdict.changes else None,
        "setup": {
            "seed": setup.seed,
            "memory": format_memory(setup.machine.memory_bytes),
            "memory_backend": str(setup.machine.backend),
            "numa_nodes": setup.machine.numa_nodes,
            "arch": setup.machine.architecture.name,
            "machine": setup.machine.machine,
            "accelerator": setup.machine.accelerator,
            "iommu": setup.machine.iommu,
            "cpus": setup.machine.cpus,
            **asdict(setup.device.facts),
            "scenario": setup.scenario,
            "capabilities": list(setup.options.capabilities),
            "parameters": setup.options.parameters,
            "bandwidth_bytes_per_s": setup.limits.bandwidth_bytes_per_s,
            "downtime_limit_s": setup.limits.downtime_s,
            "guest": setup.guest,
            "guest_kernel": setup.guest_kernel,
            "workload": asdict(setup.workload),
            "qemu": str(setup.qemu),
            "qemu_version": proof.qemu_version,
            "qemu_destination": str(setup.qemu_destination),
            "qemu_destination_version": proof.qemu_destination_version,
        },
        "migrations": [
            asdict(migration) for migration in (*proof.earlier, proof.migration_summary)
        ],
        "migration": {
            "boot_s": proof.boot_s,
            "migration_s": proof.migration_s,
            "compare_s": proof.compare_s,
            "downtime_s": proof.downtime_s,
            "syncs": proof.history[-1].syncs,
            "transferred": proof.history[-1].transferred,
            "downtime_parts": downtime_parts(proof.moments, proof.harvests, proof.downtime_s),
            "moments_s": {
                name: (time_ns - began_ns) / 1e9 for name, time_ns in proof.moments.items()
            },
            "passes": passes(proof.history, harvests),
            "harvests": harvests,
            "history": [
                {**asdict(progress), "seconds": (progress.time_ns - began_ns) / 1e9}
                for progress in proof.history
            ],
        },
        "ram_map": proof.ram_map.to_json(),
        "commands": {
            "dmaproof": ["dmaproof", "prove", *proof.setup.options.words()],
            **{name: list(command) for name, command in proof.commands.items()},
        },
    }


def to_text(proof: Proof) -> str:
    """Return the verdict, the figures behind it, and a description of the lost pages."""
    verdict, sensitivity, guest = proof.verdict, proof.verdict.sensitivity, proof.verdict.guest
    last = proof.history[-1]
    lines = [
        f"{HEADINGS[verdict.exit_code]}: {verdict.sentence}",
        "",
        f"  QEMU         {proof.qemu_version} → {proof.qemu_destination_version}, "
        f"{proof.setup.machine.machine}, {proof.setup.machine.accelerator}, "
        f"{format_memory(proof.setup.machine.memory_bytes)}{_kind_of_memory(proof.setup.machine)}",
        f"  guest        {proof.setup.guest_text}, access pattern {proof.setup.workload.pattern}",
        f"  device       {_device(proof)}",
        f"  migration    scenario {proof.setup.scenario}, {proof.migration_s:.1f} s, "
        f"{last.syncs} bitmap syncs"
        + (f", downtime {proof.downtime_s * 1000:.0f} ms" if proof.downtime_s is not None else ""),
        *_settings(proof.setup.options),
        *_earlier(proof.earlier),
        *_sensitivity(sensitivity, direct=proof.setup.direct),
        f"  destination  the guest did {guest.requests} more requests and rechecked "
        f"{guest.rechecked} pages: {guest.errors} errors"
        if verdict.can_continue
        else "  destination  the guest was not continued",
        *_restart(proof),
    ]
    if verdict.changes:
        lines.append(
            f"  changed      the destination's devices wrote the bytes that differ in "
            f"{verdict.changes.by_devices} pages"
        )
    lines += [
        f"  {'not covered' if index == 0 else '':<12} {fault}"
        for index, fault in enumerate(verdict.unseen)
    ]
    if sensitivity.reported_unwritten:
        lines.append(
            f"  extra bits   {sensitivity.reported_unwritten} pages were reported dirty although "
            "the device had not written them"
        )
    if sensitivity.unreported:
        places = ", ".join(
            f"{pages} lost at {LINK_NAMES[Link(link)]}"
            for link, pages in sensitivity.missed_at.items()
        )
        lines += [
            f"  unreported   {sensitivity.never_reported} ({places});",
            f"               {sensitivity.unreported_guaranteed} of them are guaranteed detectable",
        ]
    if verdict.downtime.limit_s is not None:
        lines.append(f"  downtime     {verdict.downtime.sentence}")
    if proof.setup.device.facts.fault:
        lines.append(f"  fault        {proof.setup.device.facts.fault} was injected")
    lines.append(f"  seed         {proof.setup.seed}")
    if proof.folder is not None:
        lines.append(f"  run folder   {proof.folder}")
    for blame in Blame:
        pages = [page for page in verdict.lost if page.blame == blame]
        if pages:
            lines += ["", f"{_LOSSES[blame]} ({len(pages)}):"]
            lines += [f"  {_story(page)}" for page in pages[:_LOST_SHOWN]]
            if len(pages) > _LOST_SHOWN:
                lines.append(f"  … and {len(pages) - _LOST_SHOWN} more (--json lists all)")
    if len(verdict.wrong_rings) > 1:
        lines += ["", "wrong rings:", *(f"  {ring.story}" for ring in verdict.wrong_rings)]
    if verdict.refusal:
        lines += ["", "the destination refused the state of a device:"]
        lines += [f"  {line}" for line in verdict.refusal.splitlines()]
    lines += ["", "error messages of the guest:"] * bool(guest.error_messages)
    lines += [f"  {message}" for message in guest.error_messages]
    if verdict.count(Blame.ACCELERATOR):
        lines += ["", *_accelerator_advice(proof)]
    return "\n".join(lines)


_LOSSES: Final = {
    Blame.DEVICE: "pages lost by the device's dirty tracking",
    Blame.QEMU: "pages lost by QEMU, although the device reported them dirty in time",
    Blame.ACCELERATOR: "pages lost by the accelerator's own dirty tracking",
    Blame.SNAPSHOT: "pages that the device wrote while QEMU took the snapshot",
    Blame.UNKNOWN: "lost pages, cause unknown (the device keeps no journal)",
    Blame.LATE_DMA: "pages lost by DMA after the guest had been paused",
    Blame.EARLY_BIT: "pages whose dirty bit the device set before it wrote the data",
}

LINK_NAMES: Final = {
    Link.TRACKER: "the dirty tracker",
    Link.ITERATOR: "the bitmap iterator",
    Link.TRANSLATION: "the address translation",
    Link.LOG: "the dirty log",
    Link.QEMU: "QEMU",
}
"""The links of the device's chain, from the write to QEMU, in the order of a dirty page's path."""


def _kind_of_memory(machine: Machine) -> str:
    kind = "" if machine.backend == MEMFD else f" in {machine.backend}"
    return f"{kind}, {counted(machine.numa_nodes, 'NUMA node')}" if machine.numa_nodes else kind


def _settings(options: ProofOptions) -> list[str]:
    """Return a line about the capabilities and parameters that the user has added."""
    parameters = (f"{name} = {json.dumps(value)}" for name, value in options.parameters.items())
    settings = ", ".join((*options.capabilities, *parameters))
    return [f"  settings     {settings}"] * bool(settings)


def _device(proof: Proof) -> str:
    facts = proof.setup.device.facts
    killed = ", killed and restarted" if facts.killed else ""
    iommu = f", behind IOMMU {proof.setup.machine.iommu}" if proof.setup.machine.iommu else ""
    if facts.tracker is None:
        rings = f", {facts.ring} rings" if facts.ring else ""
        return f"{facts.device}{rings}{iommu}{killed}, without a journal"
    if facts.harvest is None:
        return f"{facts.device}, dirty tracker {facts.tracker}"
    every = f"every {facts.harvest} s" if facts.harvest[0].isdigit() else facts.harvest
    return (
        f"{facts.device}, {facts.ring} rings, dirty tracker {facts.tracker}, "
        f"{counted(len(proof.harvests), 'harvest')} ({every}){iommu}{killed}"
    )


def _restart(proof: Proof) -> list[str]:
    """Return a line about the restart of the destination's device, if it was asked for."""
    if not proof.setup.device.facts.destination_killed:
        return []
    awaiting = proof.verdict.guest.awaiting_restart
    if awaiting is None:
        return ["  restart      none: the destination's device was not killed after the failure"]
    return [
        "  restart      the destination's device was killed after the guest had continued; "
        f"{counted(awaiting, 'request')} awaited the restarted device"
    ]


def _sensitivity(sensitivity: Sensitivity, *, direct: bool) -> list[str]:
    if (
        sensitivity.evidence_source == EvidenceSource.GUEST
        and not sensitivity.guaranteed_detectable
    ):
        return [
            f"  sensitivity  after every page had been sent, the device wrote "
            f"{sensitivity.rewritten} pages for the guest, but in",
            f"               {'huge pages that arrive whole' if direct else 'reused buffers'}: "
            "a single lost dirty bit is not guaranteed detectable",
        ]
    guaranteed = sensitivity.guaranteed_detectable
    if sensitivity.evidence_source == EvidenceSource.GUEST:
        return [
            f"  sensitivity  after every page had been sent, the device wrote {guaranteed} pages "
            "exactly once for the guest;",
            "               a lost dirty bit on any of them would have been detected",
        ]
    if sensitivity.evidence_source == EvidenceSource.SNAPSHOT:
        return [
            f"  sensitivity  the device wrote {guaranteed} pages while QEMU took the snapshot, "
            "which must not contain these writes",
        ]
    if sensitivity.evidence_source == EvidenceSource.STILL:
        return [
            f"  sensitivity  the device wrote {guaranteed} pages exactly once, before the guest "
            "was paused and any page was moved;",
            "               a loss of any of these pages would have been detected",
        ]
    return [
        f"  sensitivity  the device wrote {sensitivity.written} pages while dirty logging was on, "
        f"{sensitivity.rewritten} of them after every page",
        f"               had been sent; a lost dirty bit on any of {guaranteed} pages would have "
        "been detected",
    ]


def _earlier(migrations: Sequence[MigrationSummary]) -> list[str]:
    if not migrations:
        return []
    pages = sum(migration.pages for migration in migrations)
    guaranteed = sum(migration.guaranteed_detectable for migration in migrations)
    number = len(migrations)
    return [
        f"  history      {number} earlier migration{'s' * (number > 1)} between source and "
        f"destination: {pages} pages compared, {guaranteed} guaranteed detectable"
    ]


HEADINGS: Final = {0: "PASS", 1: "FAIL", 3: "NOT TESTED"}


def _story(page: LostPage) -> str:
    if page.blame is Blame.LATE_DMA:
        place = f"GPA {page.gpa:#x}" if page.gpa is not None else f"RAM offset {page.ram_offset:#x}"
        return f"{place}: written after the guest had been paused"
    if page.gpa is None:
        return f"RAM offset {page.ram_offset:#x}: {bytes_differ(page.bytes_differing)}"
    place = f"GPA {page.gpa:#x}: {bytes_differ(page.bytes_differing)}"
    if page.blame in (Blame.UNKNOWN, Blame.SNAPSHOT, Blame.EARLY_BIT):
        return place
    if page.request is None:
        return f"{place}; no device wrote these bytes"
    write = (
        f"{place}; last device write: {page.kind} of request {page.request} on queue {page.queue} "
        f"of {page.device or 'the device'}, to IOVA {page.iova:#x}, {page.seconds:.3f} s after "
        "logging began"
    )
    if page.link is None:
        return f"{write}; a vCPU wrote to these bytes later"
    return f"{write}; expected in harvest {page.due_in_harvest}, lost at {LINK_NAMES[page.link]}"


def _accelerator_advice(proof: Proof) -> list[str]:
    """Return the known causes of losses in the RAM blocks in which the accelerator lost pages."""
    machine = proof.setup.machine
    lines = [
        "vCPUs wrote to the pages that the accelerator lost, and QEMU did not send them again."
    ]
    if machine.accelerator != "tcg":
        return lines
    backends = machine.ram_backends
    for area in proof.ram_map.areas:
        is_main = area.region in backends
        is_first = area.region == next(iter(backends))  # QEMU's first RAM block: it is given first
        block = RamBlock(
            area.region,
            0 if is_first else machine.memory_bytes,
            backends.get(area.region, DIMM_BYTES),
        )
        why = known_tcg_loss(block, proof.qemu_version)
        lost = (page for page in proof.verdict.lost if page.blame == Blame.ACCELERATOR)
        if why and any(_is_in(page, area) for page in lost):
            odd = format_memory(machine.memory_bytes + ram_granule_bytes())
            is_fixed = machine.backend.has_huge_pages or machine.numa_nodes
            size = "" if is_fixed else f"--memory {odd} or "
            lines += [
                f"Under TCG this QEMU is known to lose such pages of RAM block {block.name},",
                f"because {why} (qemu-findings.md in dmaproof's documentation).",
                f"Use {size}a newer QEMU (dmaproof qemu fetch) to avoid this."
                if is_main
                else "To avoid this, use KVM, or --guest bare, whose vCPUs write to no DIMM.",
            ]
    return list(dict.fromkeys(lines))


def _is_in(page: LostPage, area: MapArea) -> bool:
    if page.gpa is None or area.gpa is None:
        return page.gpa is area.gpa is None and _covers(area, area.offset, page.ram_offset)
    return _covers(area, area.gpa, page.gpa)


def _covers(area: MapArea, begin: int, place: int) -> bool:
    return begin <= place < begin + len(area.classes) * PAGE_BYTES
