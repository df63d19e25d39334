"""Postcopy migrations: the destination takes over first, and then gets the pages that it lacks.

During postcopy, a page that the device needs may still be on the source. A vhost-user device must
therefore have VHOST_USER_PROTOCOL_F_PAGEFAULT. QEMU then waits for the device's accesses to missing
pages with a userfaultfd, and requests these pages from the source.

If the destination's guest stays paused, nothing writes while the pages arrive, so all of them must
be equal. If the guest continues, its devices wait for pages and write to others. The device's
journal then distinguishes what has changed on the destination from what was lost (`proof.changes`).
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping
from typing import Any, Final

from dmaproof.errors import UntestableError, UsageError

from ...devices.device import ProofDevice
from ...guest.channel import DECLARE
from ...host.process import ProcessDiedError
from ...host.timeout import wait_until
from ...qemu.qmp import Qmp, QmpRefusal
from ...qemu.vhost_user_trace import page_faults
from ..attempt import Attempt
from ..hold import PrecopyHold
from ..migration import MigrationTimeoutError, Progress
from ..pair import QemuPair
from ..procedure import UnsupportedScenarioError
from ..state_refusal import is_refusal
from ..transport import TCP, Ends
from .base import Scenario
from .precopy import Tls, give_certificates

_logger = logging.getLogger(__name__)

_SLOW_BYTES_PER_S: Final = 512 << 10
"""The bandwidth for pages that were not requested. QEMU sends requested pages at once."""
_UNSENT_REQUESTS: Final = 256
"""Before the switchover, the device serves this number of requests whose pages are not sent."""
_LEAST_FAULTS: Final = 8
"""The least number of pages for which the device must have waited."""
_LEAST_HUGE_FAULTS: Final = 1
"""The same for huge pages. A guest has few of them, and its vCPUs access most of them first."""
_BREAKS: Final = 2
"""How often the connection is broken."""
_CANNOT_REGISTER: Final = "ram_block_enable_notify userfault register"
"""What QEMU 7.2 prints when userfaultfd does not support the file system of the guest's RAM. Newer
versions refuse such RAM before the migration begins (postcopy_ram_supported_by_host)."""
_MAX_BANDWIDTH: Final = "max-postcopy-bandwidth"


class Postcopy(Scenario):
    """Postcopy, in which the destination's guest stays paused until all pages have arrived."""

    name = "postcopy"
    summary = "The pages that are still dirty arrive after the switchover, at a paused destination"
    capabilities: tuple[str, ...] = ("postcopy-ram",)
    refusal = "not capable of postcopy"
    """QEMU's answer for a device that lacks PAGEFAULT (vhost_user_postcopy_notifier)."""

    suits_any_guest = False
    sends_whole_pages = True  # postcopy_chunk_hostpages_pass
    _has_switched = False
    """Whether the destination has taken over, so that the source cannot continue the guest."""

    async def prepare(self, attempt: Attempt) -> None:
        """Begin in precopy."""
        await super().prepare(attempt)
        self._has_switched = False

    def explain_refusal(self, words: str) -> UnsupportedScenarioError:
        """Distinguish a device without PAGEFAULT from a QEMU or a host without postcopy."""
        if self.refusal not in words:
            return super().explain_refusal(words)
        return UnsupportedScenarioError(
            "QEMU refused postcopy, as it must with a device that lacks the vhost-user protocol "
            f"feature PAGEFAULT: {words}"
        )

    async def end_precopy(self, attempt: Attempt, hold: PrecopyHold | None) -> None:
        """Switch to postcopy while pages are still dirty."""
        _logger.info("switching to postcopy")
        self._has_switched = True
        await attempt.migration.start_postcopy()

    def explain_failure(self, error: UntestableError) -> UntestableError:
        """Say that the memory is not supported, or that a kill has lost the guest."""
        if _CANNOT_REGISTER in str(error):
            return UnsupportedScenarioError(
                f"this QEMU does not support postcopy with this kind of memory: {error}"
            )
        was_killed = isinstance(error, ProcessDiedError) and error.killed
        if not (self._has_switched and was_killed) or is_refusal(str(error)):
            return error
        return ProcessDiedError(
            f"{error}\nThe guest is lost: the migration was in postcopy, in which each side has a "
            "part of the guest's RAM",
            killed=True,
        )

    def untested(self, attempt: Attempt) -> str | None:
        """Return a reason if QEMU completed the migration in precopy."""
        if "postcopy-active" in attempt.migration.moments:
            return None
        return "the migration completed before it switched to postcopy; use a lower --bandwidth"


class PostcopyTls(Postcopy):
    """Postcopy over TCP under TLS."""

    name = "postcopy-tls"
    summary = "The same as postcopy, over TCP under TLS"
    transport = TCP
    parameters: Mapping[str, Any] = Tls.parameters

    async def set_up(self, ends: Ends) -> None:
        """Give each QEMU its certificate."""
        await give_certificates(ends)


class PostcopyMultifd(Postcopy):
    """Postcopy after a precopy over several channels."""

    name = "postcopy-multifd"
    summary = "The same as postcopy; the precopy uses 4 channels beside the main one"
    capabilities = ("postcopy-ram", "multifd")
    parameters: Mapping[str, Any] = {"multifd-channels": 4}


class PostcopyRunning(Postcopy):
    """Postcopy, in which the destination's guest runs while the pages arrive."""

    name = "postcopy-running"
    summary = "The destination's guest and its devices run while the pages arrive"
    parameters: Mapping[str, Any] = {_MAX_BANDWIDTH: _SLOW_BYTES_PER_S}
    destination_runs = True
    _is_slow = True
    """Whether the source still sends few pages that were not requested."""
    _least_faults = _LEAST_FAULTS

    def require_device(self, device: ProofDevice) -> None:
        """Refuse a device whose writes on the destination would not be known."""
        if device.facts.tracker is None or not device.direct:
            raise UsageError(
                f"--scenario {self.name} with --device {device.facts.device}: expected a disk of "
                "dmaproof, whose journal says what the device changes on the destination; use "
                "--scenario postcopy"
            )

    async def prepare(self, attempt: Attempt) -> None:
        """Have the guest declare the pages that it may write itself."""
        await super().prepare(attempt)
        self._is_slow = True
        async with attempt.destination_ram() as files:
            if any(ram.page_bytes > mmap.PAGESIZE for ram in files):
                self._least_faults = _LEAST_HUGE_FAULTS
        await attempt.pair.source_guest.ask(
            DECLARE, "declared", "declared the pages that it may write itself"
        )

    async def end_precopy(self, attempt: Attempt, hold: PrecopyHold | None) -> None:
        """Switch to postcopy when many pages are dirty; the destination's guest continues.

        The churn must have ended, because the guest writes to its churn pages itself.
        """
        if hold:
            await hold.rest()
        guest = attempt.pair.source_guest
        wanted = guest.number("progress", "requests") + _UNSENT_REQUESTS
        await guest.wait_for(
            lambda: "quiet" in guest.latest and guest.number("progress", "requests") >= wanted,
            f"ended the churn and done {_UNSENT_REQUESTS} more requests",
        )
        await attempt.pair.destination.qmp.execute("cont")  # takes effect at the switchover
        await super().end_precopy(attempt, hold)

    async def follow_postcopy(self, attempt: Attempt, progress: Progress) -> None:
        """Let the other pages arrive once the device has waited for enough of them."""
        if self._is_slow and self._faults(attempt.pair) >= self._least_faults:
            self._is_slow = False
            await attempt.pair.source.qmp.execute("migrate-set-parameters", **{_MAX_BANDWIDTH: 0})

    async def load(self, ends: Ends) -> None:
        """Pause the destination's guest for the comparison."""
        await ends.destination.execute("stop")

    def untested(self, attempt: Attempt) -> str | None:
        """Return a reason if the device has waited for too few pages."""
        faults = self._faults(attempt.pair)
        if (reason := super().untested(attempt)) or faults >= self._least_faults:
            return reason
        remedy = "give the guest more requests at a time (--workload threads=16)"
        if self._least_faults == _LEAST_HUGE_FAULTS:
            remedy = "give the guest smaller pages (--memory-backend) or more RAM (--memory)"
        if self.parameters[_MAX_BANDWIDTH] != _SLOW_BYTES_PER_S:
            remedy = f"leave out --parameter {_MAX_BANDWIDTH}"
        return (
            f"the device waited for only {faults} pages that had not arrived, expected at least "
            f"{self._least_faults}; {remedy}"
        )

    def _faults(self, pair: QemuPair) -> int:
        return page_faults(pair.trace(pair.destination_side))


class PostcopyPreempt(PostcopyRunning):
    """Postcopy, in which requested pages arrive over a channel of their own."""

    name = "postcopy-preempt"
    summary = "The same as postcopy-running; requested pages arrive over a channel of their own"
    capabilities = ("postcopy-ram", "postcopy-preempt")

    def explain_failure(self, error: UntestableError) -> UntestableError:
        """Name the defect because of which QEMU never completes such a migration."""
        error = super().explain_failure(error)
        if not isinstance(error, MigrationTimeoutError):
            return error
        return MigrationTimeoutError(
            f"{error}\nQEMU 10.0 and 11.1 never complete this migration if a vhost-user device has "
            "waited for a page (docs/qemu-findings.md); QEMU 7.2 does"
        )


class PostcopyRecover(PostcopyRunning):
    """Postcopy, in which the connection breaks twice and is restored."""

    name = "postcopy-recover"
    summary = "The same as postcopy-running; the connection breaks twice and is restored"
    breaks_connection = True
    _breaks = 0
    _faults_before = 0
    """For how many pages the device had waited when the connection was broken last."""

    async def prepare(self, attempt: Attempt) -> None:
        """Begin with a connection that has not been broken."""
        await super().prepare(attempt)
        self._breaks = self._faults_before = 0

    async def follow_postcopy(self, attempt: Attempt, progress: Progress) -> None:
        """Break and restore the connection whenever the device has waited for a page."""
        if self._breaks == _BREAKS:
            await super().follow_postcopy(attempt, progress)
        elif progress.status == "postcopy-active":
            faults = self._faults(attempt.pair)
            if faults > self._faults_before:
                self._faults_before = faults
                self._breaks += 1
                await self._break(attempt)

    async def _break(self, attempt: Attempt) -> None:
        ends, timeout_s = attempt.pair.ends(), attempt.pair.timeout_s
        await ends.source.execute("migrate-pause")
        await _wait_until_paused(ends.source, timeout_s)
        uri = f"unix:{ends.folder / f'recovery-{self._breaks}.sock'}"
        await _recover(ends.destination, uri, timeout_s)
        await ends.source.execute("migrate", uri=uri, resume=True)

    def untested(self, attempt: Attempt) -> str | None:
        """Return a reason if the connection was not broken often enough."""
        if (reason := super().untested(attempt)) or self._breaks == _BREAKS:
            return reason
        return f"the connection was broken only {self._breaks} times, expected {_BREAKS}"


async def _wait_until_paused(source: Qmp, timeout_s: float) -> None:
    status = ""

    async def is_paused() -> bool:
        nonlocal status
        status = (await source.execute("query-migrate"))["status"]
        return bool(status == "postcopy-paused")

    def late() -> MigrationTimeoutError:
        return MigrationTimeoutError(
            f"the source has not noticed within {timeout_s:g} s that the connection is broken: its "
            f"migration status is {status!r}, expected 'postcopy-paused'"
        )

    await wait_until(is_paused, timeout_s, late)


async def _recover(destination: Qmp, uri: str, timeout_s: float) -> None:
    """Have the destination accept the source's new connection once it has noticed the break.

    Its main loop may be waiting for the device's answer to a message, and the device for a page
    that arrives only over the new connection.
    """
    refusal: QmpRefusal | None = None

    async def is_listening() -> bool:
        nonlocal refusal
        try:
            await destination.execute_out_of_band("migrate-recover", uri=uri)
        except QmpRefusal as error:
            refusal = error
            return False
        return True

    def late() -> MigrationTimeoutError:
        return MigrationTimeoutError(
            f"the destination has not noticed within {timeout_s:g} s that the connection is "
            f"broken: {refusal}"
        )

    await wait_until(is_listening, timeout_s, late)
