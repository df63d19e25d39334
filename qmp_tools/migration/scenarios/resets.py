"""Migrations of a guest whose device or whole machine is reset: before, during and after them.

While QEMU logs, a reset stops the device's rings, and QEMU takes the device's log away after a last
sync (vhost_dev_stop). When the guest initialises the device again, QEMU starts the rings again at
index 0 and gives the device another log (vhost_dev_start). Pages that the device wrote before the
reset must still be sent, and pages that it writes afterwards must be logged again.
"""

from __future__ import annotations

import logging
from typing import ClassVar

from dmaproof.errors import UntestableError

from ...devices.device import ProofDevice
from ...guest.channel import LEAVE_OUT_HALF, RELOAD_DRIVER, RESET_DEVICE, RESET_MACHINE
from ..attempt import Attempt
from ..hold import PrecopyHold
from ..pair import QemuPair, ResetReason
from .base import Scenario, require_disk

_logger = logging.getLogger(__name__)


class _Resets(Scenario):
    """The guest resets something three times: before the migration, during it, and after it.

    `action` is a sentence about the reset. If the guest `reboots`, it forgets its pages.
    """

    action: ClassVar[str]
    reboots: ClassVar[bool] = False

    resets = True
    is_repeatable = False

    def require_device(self, device: ProofDevice) -> None:
        """Refuse a device that is not a disk."""
        require_disk(self, device)

    async def reset(self, pair: QemuPair, side: str) -> None:
        """Reset the device or the machine of `side`, and wait until the guest uses it again.

        Raises:
            UntestableError: the guest does not use the device again.
        """
        raise NotImplementedError

    async def prepare(self, attempt: Attempt) -> None:
        """Reset before QEMU logs."""
        await self._reset(attempt.pair, attempt.pair.source_side, "before the migration")
        await super().prepare(attempt)

    async def amid_precopy(self, attempt: Attempt, hold: PrecopyHold | None) -> bool:
        """Reset when the guest has used a quarter of its write-once pages.

        QEMU syncs seldom meanwhile, so bits of these pages are still in the log at the reset.
        """
        await super().amid_precopy(attempt, hold)
        pair = attempt.pair
        guest, side = pair.source_guest, pair.source_side
        if hold:
            await hold.rest()
        wanted = guest.number("ready", "write_once") // 4
        await guest.wait_for(
            lambda: attempt.used_write_once_pages() >= wanted, f"used {wanted} write-once pages"
        )
        installed = pair.logs_installed(side)
        attempt.end_log_watch()
        await self._reset(pair, side, "during precopy")
        if installed is not None and not installed < (pair.logs_installed(side) or 0):
            raise UntestableError(
                f"the device was not reset while {pair.source.name} logged: its trace shows "
                f"{installed} dirty logs (SET_LOG_BASE) before and after the reset; use a QEMU "
                "with the trace back end 'log'"
            )
        if hold:
            hold.pages = pair.hold_pages
        if self.reboots:
            await guest.send(LEAVE_OUT_HALF)
        else:
            await attempt.watch_log()
        attempt.migration.restart_timeout()
        return self.reboots

    async def disturb_destination(self, pair: QemuPair) -> bool:
        """Reset on the destination, which does not log."""
        await self._reset(pair, pair.destination_side, "on the destination")
        return True

    async def _reset(self, pair: QemuPair, side: str, when: str) -> None:
        _logger.info("%s, %s", self.action, when)
        await self.reset(pair, side)


class DeviceReset(_Resets):
    """The guest resets its device."""

    name = "device-reset"
    summary = "The guest resets its device, before, during and after the migration"
    action = "the guest resets its device"

    async def reset(self, pair: QemuPair, side: str) -> None:
        """Have the guest reset its device."""
        await pair.guests[side].ask(RESET_DEVICE, "device-reset", "reset its device")


class DriverReload(_Resets):
    """The guest removes the driver of its device, and loads it again."""

    name = "driver-reload"
    summary = "The guest loads its driver again, before, during and after the migration"
    action = "the guest loads its driver again"

    async def reset(self, pair: QemuPair, side: str) -> None:
        """Have the guest load its driver again."""
        await pair.guests[side].ask(RELOAD_DRIVER, "driver-reloaded", "loaded its driver again")


class GuestReboot(_Resets):
    """The guest resets its machine."""

    name = "guest-reboot"
    summary = "The guest reboots, before, during and after the migration"
    action = "the guest reboots"
    reboots = True

    async def reset(self, pair: QemuPair, side: str) -> None:
        """Have the guest reset its machine."""
        guest = pair.guests[side]
        await pair.reboot(side, lambda: guest.send(RESET_MACHINE), ResetReason.GUEST)


class MachineReset(_Resets):
    """QEMU resets the machine."""

    name = "machine-reset"
    summary = "QEMU resets the machine (system_reset), before, during and after the migration"
    action = "QEMU resets the machine"
    reboots = True

    async def reset(self, pair: QemuPair, side: str) -> None:
        """Have QEMU reset the machine."""
        qmp = pair.qemus[side].qmp
        await pair.reboot(side, lambda: qmp.execute("system_reset"), ResetReason.OPERATOR)
