"""L2 with two devices, which both write while L2 is migrated.

QEMU tracks devices of one address space in the same way (`tracking.joint`), so the two devices are
tracked in equal and in different ways. QEMU must also bring both devices into a P2P state before it
stops the first one, and no device may write after it was stopped.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from dmaproof.vfio.abi import MigrationState

from .blocked import refused, require_start
from .fake_device import EnteredStates
from .injected_faults import FAULTS
from .l2 import RAM_PAGES, Plan
from .l2_migration import migrate
from .l2_result import DeviceResult
from .outcome import Proof, ProofFailedError, repeated, require, retrying
from .tracking import TRACKINGS, Tracking, joint

_PAIRS: Final = {
    "iommufd, device logs": ("iommufd", "iommufd"),
    "container, device logs": ("container", "container"),
    "device logs, one on iommufd and one in a container": ("iommufd", "container"),
    "a device log on iommufd, and type1's log": ("iommufd", "container-type1"),
    "a device log and type1's log in one container": ("container", "container-type1"),
}
_MIXED_UNTRACKED: Final = ("iommufd", "iommufd-untracked")
_CONTROLLED: Final = {"iommufd, device logs": 0, "container, device logs": 1}
"""The pairs with a control, and the number of the device that has the fault."""
_WRITTEN_AFTER_STOP: Final = 16
_P2P: Final = (MigrationState.RUNNING_P2P, MigrationState.PRE_COPY_P2P)
_STOPPED: Final = (MigrationState.STOP, MigrationState.STOP_COPY)
_RUNS: Final = (MigrationState.RUNNING,)


def proofs(
    seed: int, timeout_s: float, controls: int = 1, *, quick: bool = False
) -> dict[str, Proof]:
    """Return the proofs by name, each followed by its control; see `migrations.proofs`."""
    found: dict[str, Proof] = {}
    for name, names in _PAIRS.items():
        trackings = (TRACKINGS[names[0]], TRACKINGS[names[1]])
        found[f"two devices: {name}"] = retrying(partial(_equal, trackings, timeout_s))
        if name in _CONTROLLED and not (quick and _CONTROLLED[name]):
            found[f"two devices: {name}, control: drop in one"] = repeated(
                partial(_drops_in_one, trackings, _CONTROLLED[name], timeout_s=timeout_s),
                *(seed, controls),
            )
    found["two devices: one writes after it was stopped, control"] = repeated(
        partial(_writes_after_stop, timeout_s=timeout_s), seed, controls
    )
    found["two devices: one without P2P"] = partial(_without_p2p, timeout_s)
    found["two devices: a device log on iommufd, and nothing tracks the other"] = retrying(
        partial(_one_untracked, timeout_s)
    )
    return found


def _equal(trackings: tuple[Tracking, Tracking], timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate, and check that all of RAM is equal, and the order of the states."""
    plan = Plan(trackings)
    if len({tracking.iommufd for tracking in trackings}) > 1:
        require_start(plan, timeout_s)  # QEMU 11.1 aborts: docs/qemu-findings.md
    result = migrate(plan, timeout_s)
    result.require_equal(joint(trackings))
    require_order(result.devices)
    return (
        f"0 of {RAM_PAGES} pages differ, both devices reach P2P before one stops, {result}",
        result.figures(),
    )


def _drops_in_one(
    trackings: tuple[Tracking, Tracking], victim: int, seed: int, timeout_s: float
) -> tuple[str, dict[str, Any]]:
    """Migrate with a fault in one device; only pages of this device may differ."""
    faults = {**FAULTS["drop"], "seed": seed}
    result = migrate(Plan(trackings, faults, victim), timeout_s)
    other = result.devices[1 - victim]
    require(not other.stats["dropped"], "the other device has the fault too")
    return result.require_noticed(result.devices[victim].dropped(faults["drop"], seed))


def _writes_after_stop(seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate while one device writes after it was stopped; each of these pages must differ."""
    faults = {"write_after_stop": _WRITTEN_AFTER_STOP}
    pair = (TRACKINGS["container"], TRACKINGS["container"])
    result = migrate(Plan(pair, faults, seed % 2), timeout_s)
    try:
        require_order(result.devices)
    except ProofFailedError as error:
        noticed = str(error)
    else:
        raise ProofFailedError("the check of the states has not noticed the writes after the stop")
    late = result.devices[seed % 2].written_after_stop()
    found, figures = result.require_noticed(late)
    require(
        len(result.differing) == len(late),
        f"{len(late) - len(result.differing)} pages that were written after the stop are equal",
    )
    return f"{found}; {noticed}", figures


def require_order(devices: Mapping[int, DeviceResult]) -> None:
    """Require that the devices change their states together, and that no stopped device writes.

    On the source, each device must enter a P2P state before any of them stops. On the destination,
    each must do so before any of them runs.
    """
    for number, device in devices.items():
        late = device.written_after_stop()
        require(not len(late), f"device {number} wrote {len(late)} pages after it was stopped")
    sides = {
        "source": ([d.states for d in devices.values()], _STOPPED),
        "destination": ([_resumed(d.destination_states) for d in devices.values()], _RUNS),
    }
    for side, (entered, ends) in sides.items():
        orders = [_orders(states, ends, side) for states in entered]
        require(
            max(p2p for p2p, _ in orders) < min(end for _, end in orders),
            f"on the {side}, a device leaves its P2P state before another one has entered it",
        )


def _resumed(states: EnteredStates) -> EnteredStates:
    """Return the states from the last RESUMING on."""
    resuming = np.flatnonzero(states["state"] == MigrationState.RESUMING)
    require(bool(len(resuming)), "on the destination, a device has not entered RESUMING")
    return states[resuming[-1] :]


def _orders(states: EnteredStates, ends: Container[MigrationState], side: str) -> tuple[int, int]:
    """Return the orders in which a device entered its last P2P state before `ends`, and `ends`."""
    p2p: int | None = None
    for order, state in states[["order", "state"]].tolist():
        if state in _P2P:
            p2p = order
        elif state in ends:
            require(p2p is not None, f"on the {side}, a device has entered no P2P state")
            assert p2p is not None
            return p2p, order
        elif side == "source":
            p2p = None
    raise ProofFailedError(f"on the {side}, a device has not left its P2P state")


def _without_p2p(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Check that QEMU refuses to migrate two devices if one has no P2P states."""
    pair = (TRACKINGS["container"], TRACKINGS["container"])
    return refused(Plan(pair, {"without_p2p": 1}), timeout_s), {"refused": True}


def _one_untracked(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate with a device that nothing tracks; require a warning of QEMU if pages are lost."""
    trackings = (TRACKINGS[_MIXED_UNTRACKED[0]], TRACKINGS[_MIXED_UNTRACKED[1]])
    result = migrate(Plan(trackings), timeout_s)
    result.require_test()
    require_order(result.devices)
    require(
        result.warned or not len(result.differing),
        f"{len(result.differing)} pages differ, and QEMU did not warn, {result}",
    )
    stale = [len(np.intersect1d(result.differing, d.written())) for d in result.devices.values()]
    reports = [d.stats["reports"] for d in result.devices.values()]
    return (
        f"QEMU {'warned' if result.warned else 'did not warn'}; {stale[0]} pages of the device "
        f"with a log differ ({reports[0]} reports), {stale[1]} of the other, {result}",
        {**result.figures(), "differing_with_log": stale[0], "differing_without": stale[1]},
    )
