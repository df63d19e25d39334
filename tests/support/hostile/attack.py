"""One run of a hostile front end, and the checks after it."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final
from unittest import mock

import numpy as np

from dmaproof.vhost_user import vring
from qmp_tools.testbed.ring_driver import PAGE
from support.hostile import breaches, guest
from support.hostile.layout import DEPTHS
from support.hostile.peer import Peer
from support.hostile.source import Source

STEPS: Final = 40
"""The most steps of a run."""
WEIGHTS: Final[dict[Callable[[Peer], None], int]] = {
    guest.honest_request: 6,
    guest.hostile_request: 6,
    breaches.ring_state: 3,
    breaches.ring_address: 3,
    Peer.restart: 3,
    Peer.start_logging: 3,
    Peer.boot: 2,
    breaches.set_features: 2,
    breaches.memory_table: 2,
    breaches.memory_of_odd_files: 1,
    breaches.odd_log: 2,
    breaches.set_inflight: 3,
    breaches.spoil_inflight: 2,
    breaches.event_fds: 2,
    guest.jump: 1,
    guest.scribble: 2,
    guest.sync_log: 1,
    breaches.truncate_a_file: 2,
    breaches.seal: 1,
    breaches.any_mapping: 3,
    breaches.everything_unmapped: 1,
    breaches.odd_channel: 1,
    breaches.configuration: 1,
    breaches.any_message: 1,
    breaches.part_of_a_message: 1,
    guest.fill_the_call: 1,
    breaches.flood: 1,
    breaches.disconnect: 1,
}
STEPS_BY_WEIGHT: Final = tuple(step for step, weight in WEIGHTS.items() for _ in range(weight))


def attack(source: Source) -> list[str]:
    """Carry out one run, and return the reasons why sessions ended.

    Raises:
        AssertionError: the server broke a rule of this package.
    """
    gc.collect(0)
    fds_before, mappings_before = _open_files(), _shared_mappings()
    with (
        # Only the source decides what happens: not the speed of the machine, and not the bytes of
        # the entropy device, which may become a ring.
        mock.patch.object(vring, "TURN_S", math.inf),
        mock.patch.object(os, "urandom", bytes),
        Peer(source) as peer,
    ):
        _run(peer)
        reasons = peer.reasons
    del peer  # which closes the disk's file
    if (_open_files(), _shared_mappings()) != (fds_before, mappings_before):
        gc.collect()  # the server or a traceback may be part of a reference cycle
    assert _shared_mappings() == mappings_before, "a mapping leaked"
    assert _open_files() == fds_before, "a file descriptor leaked"
    return reasons


def _run(peer: Peer) -> None:
    """Do some of the steps of QEMU, then any steps, and check the result."""
    for step in (peer.boot, peer.start_rings, peer.start_logging)[: peer.source.pick(DEPTHS)]:
        step()
    for _ in range(peer.source.integer(0, STEPS)):
        peer.source.pick(STEPS_BY_WEIGHT)(peer)
        peer.settle()
    files = {"RAM": peer.ram, "log": peer.log, "in-flight region": peer.inflight}
    for name, shared in files.items():
        shared.check(name)
    _check_log_bits(peer)


def _check_log_bits(peer: Peer) -> None:
    """Check that the server set only bits of pages of slots."""
    set_by_server = peer.log.content() & ~peer.log.expected
    for bit in np.flatnonzero(np.unpackbits(set_by_server, bitorder="little")).tolist():
        gpas = [(bit - 8 * offset) * PAGE for offset in peer.log_offsets]
        assert any(_is_in_a_slot(peer, gpa) for gpa in gpas), (
            f"bit {bit} of the log's file is set, but is not the bit of a page in a slot for any "
            f"of the log's offsets {sorted(peer.log_offsets)}"
        )


def _is_in_a_slot(peer: Peer, gpa: int) -> bool:
    return any(start <= gpa < start + length for start, length in peer.logged_gpas)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _shared_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:hostile")
