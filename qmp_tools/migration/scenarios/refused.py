"""Migrations that QEMU must refuse with some devices; dmaproof only checks the refusal."""

from __future__ import annotations

from ..migration import MigrationError
from ..procedure import UnsupportedScenarioError
from .base import Scenario


class PostcopyRam(Scenario):
    """Postcopy with a vhost-user device that cannot wait for a page.

    During postcopy, a page that the device needs may still be on the source. A vhost-user device
    must therefore have VHOST_USER_PROTOCOL_F_PAGEFAULT. dmaproof carries out no postcopy migration.
    """

    name = "postcopy-ram"
    summary = "QEMU must refuse postcopy for a device without PAGEFAULT; dmaproof checks only that"
    capabilities = ("postcopy-ram",)
    refusal = "not capable of postcopy"
    """QEMU's answer to the capability with such a device (vhost_user_postcopy_notifier)."""

    suits_any_guest = False
    is_repeatable = False

    def explain_refusal(self, words: str) -> UnsupportedScenarioError:
        """Distinguish the expected refusal from a QEMU or a host without postcopy."""
        if self.refusal not in words:
            return super().explain_refusal(words)
        return UnsupportedScenarioError(
            f"QEMU refused postcopy, as it must with this device: {words}"
        )

    def check_acceptance(self, *, device_lacks_pagefault: bool) -> None:
        """Refuse to migrate; QEMU has failed if it accepted a device without PAGEFAULT.

        Raises:
            MigrationError: QEMU accepted a device without PAGEFAULT.
            UnsupportedScenarioError: QEMU accepted a device with PAGEFAULT.
        """
        if device_lacks_pagefault:
            raise MigrationError(
                f"QEMU accepted {', '.join(self.capabilities)}, but must refuse it with this "
                f"device (expected the error {self.refusal!r})"
            )
        raise UnsupportedScenarioError(
            f"QEMU accepted {', '.join(self.capabilities)}, which is correct with this device; "
            "dmaproof carries out no postcopy migration"
        )
