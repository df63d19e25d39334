"""All proofs of the passthrough route, by name; the names are known without L1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from dmaproof.errors import UsageError

from ..host.timeout import DEFAULT_TIMEOUT_S
from . import (
    differential,
    functions,
    hwpt,
    injected_faults,
    migrations,
    selftests,
    states,
    vhost,
)
from .fake_driver import DRIVERS
from .outcome import Proof
from .rules import rules
from .vhost_log.net_findings import net_findings
from .vhost_log.net_proofs import net_proofs
from .vhost_log.scsi import scsi_proofs
from .vhost_log.vsock import vsock_proofs


@dataclass(frozen=True)
class Request:
    """Which proofs to carry out in L1, and how."""

    seed: int
    only: tuple[str, ...]
    """The names of the proofs, as `select` returns them."""
    quick: bool = False
    controls: int = 1
    """The number of repetitions of each control of a migration."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """The bound of each wait in L1."""

    @property
    def has_selftests(self) -> bool:
        """Whether some of the proofs are the kernel's selftests."""
        return any(name.startswith(f"{SELFTESTS}: ") for name in self.only)

    def to_json(self) -> dict[str, Any]:
        """Return all fields; `of` reads them again."""
        return asdict(self)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Return the request with these `fields`."""
        return cls(**{**fields, "only": tuple(fields["only"])})


@dataclass(frozen=True)
class Guests:
    """The ELFs of the guests in L2."""

    bare: Path
    vfio: Path


def _rules(request: Request, guests: Guests) -> dict[str, Proof]:
    return rules()


def _states(request: Request, guests: Guests) -> dict[str, Proof]:
    return {"transfer": states.transfer, "refusals": states.refusals}


def _differential(request: Request, guests: Guests) -> dict[str, Proof]:
    seed = request.seed
    cases, rounds = (200, 5) if request.quick else (3000, 40)

    def with_driver(interface: str, kind: str) -> Proof:
        def carry_out() -> tuple[str, dict[str, object]]:
            with DRIVERS[interface]() as driver:
                if kind == "dma":
                    return differential.dma_cases(driver, rounds, seed)
                return differential.tracker_cases(driver, rounds // 2, seed)

        return carry_out

    proofs: dict[str, Proof] = {
        "the kernel's iterator and IovaBitmap": partial(differential.iterator_cases, cases, seed),
        "the page table's dirty bits and IovaBitmap": partial(hwpt.hwpt_cases, rounds * 7, seed),
        "the page table as a tracker": partial(hwpt.hwpt_tracker_cases, rounds, seed),
    }
    for interface in DRIVERS:
        proofs[f"random DMA, {interface}"] = with_driver(interface, "dma")
        proofs[f"the kernel's trackers, {interface}"] = with_driver(interface, "trackers")
    return proofs


def _faults(request: Request, guests: Guests) -> dict[str, Proof]:
    rounds = 2 if request.quick else 10
    proofs: dict[str, Proof] = {
        name: partial(injected_faults.caught, name, rounds, request.seed)
        for name in injected_faults.FAULTS
    }
    proofs["shift, in the comparison of iterators"] = partial(
        injected_faults.caught_by_the_iterator, rounds, request.seed
    )
    return proofs


def _migration(request: Request, guests: Guests) -> dict[str, Proof]:
    return migrations.proofs(
        guests.vfio, request.seed, request.timeout_s, request.controls, quick=request.quick
    )


def _vhost(request: Request, guests: Guests) -> dict[str, Proof]:
    return vhost.proofs(guests.bare, request.seed, request.timeout_s)


def _vhost_log(request: Request, guests: Guests) -> dict[str, Proof]:
    cases = 3 if request.quick else 12
    return {
        **net_proofs(request.seed, cases, request.timeout_s),
        **net_findings(request.timeout_s),
        **vsock_proofs(request.seed, request.timeout_s),
        **scsi_proofs(request.seed, request.timeout_s),
    }


def _functions(request: Request, guests: Guests) -> dict[str, Proof]:
    return functions.proofs(guests.vfio, request.seed, request.timeout_s)


def _selftests(request: Request, guests: Guests) -> dict[str, Proof]:
    return selftests.proofs(request.timeout_s)


SELFTESTS: Final = "selftests"
"""The group whose proofs the first machine alone carries out, because it has their hardware."""
GROUPS: Final[Mapping[str, Callable[[Request, Guests], dict[str, Proof]]]] = {
    "rules": _rules,
    "states": _states,
    "differential": _differential,
    "faults": _faults,
    "migration": _migration,
    "vhost": _vhost,
    "vhost-log": _vhost_log,
    "functions": _functions,
    SELFTESTS: _selftests,
}
"""The groups of proofs, in the order in which they run."""
OWN_GROUPS: Final = tuple(group for group in GROUPS if group != SELFTESTS)
"""All groups but the kernel's selftests, which say nothing about QEMU."""


@dataclass(frozen=True)
class NamedProof:
    """A proof with its group and its name in the group."""

    group: str
    name: str
    proof: Proof

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


def proofs(request: Request, guests: Guests) -> list[NamedProof]:
    """Return the requested proofs, in order."""
    return [proof for proof in _all_proofs(request, guests) if str(proof) in request.only]


def _all_proofs(request: Request, guests: Guests) -> list[NamedProof]:
    return [
        NamedProof(group, name, proof)
        for group, make in GROUPS.items()
        for name, proof in make(request, guests).items()
    ]


def names(*, quick: bool = False) -> list[str]:
    """Return the names of all proofs, such as 'rules: START: no range', in order."""
    nowhere = Guests(Path(), Path())
    return [str(proof) for proof in _all_proofs(Request(0, (), quick=quick), nowhere)]


def own_proofs() -> tuple[str, ...]:
    """Return the names of the proofs of `OWN_GROUPS`."""
    return select(OWN_GROUPS)


def select(patterns: Sequence[str], *, quick: bool = False) -> tuple[str, ...]:
    """Return the names of the proofs that `patterns` select: groups, names, or patterns of names.

    Raises:
        UsageError: a pattern selects no proof.
    """
    known = names(quick=quick)
    chosen: dict[str, None] = {}
    for pattern in patterns:
        wanted = f"{pattern}: *" if pattern in GROUPS else pattern
        found = [name for name in known if name == wanted or fnmatchcase(name, wanted)]
        if not found:
            raise UsageError(
                f"no passthrough proof is named {pattern!r}; expected a group "
                f"({', '.join(GROUPS)}), a name such as {known[0]!r}, or a pattern of names; "
                "'dmaproof list passthrough' prints all names"
            )
        chosen |= dict.fromkeys(found)
    return tuple(name for name in known if name in chosen)
