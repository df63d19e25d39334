"""Migrations that QEMU has to refuse with some devices: whether it does is all that is shown."""

from __future__ import annotations

from ..migration import MigrationError
from ..procedure import UnsupportedScenarioError
from .base import Scenario


class PostcopyRam(Scenario):
    """Postcopy, with a vhost-user device that cannot wait for a page.

    A page that the device wants to use may still be on the source, so a vhost-user device must have
    VHOST_USER_PROTOCOL_F_PAGEFAULT. dmaproof carries out no postcopy migration.
    """

    name = "postcopy-ram"
    summary = "pages fetched on demand: only whether QEMU refuses it for a device without PAGEFAULT"
    capabilities = ("postcopy-ram",)
    refusal = "not capable of postcopy"
    """What QEMU says to these capabilities with such a device (vhost_user_postcopy_notifier)."""

    suits_any_guest = False
    is_repeatable = False

    def explain_refusal(self, words: str) -> UnsupportedScenarioError:
        """Tell the refusal that is due from a QEMU or a host that lacks postcopy."""
        if self.refusal not in words:
            return super().explain_refusal(words)
        return UnsupportedScenarioError(f"refused, as it has to be with this device: {words}")

    def check_acceptance(self, *, device_lacks_pagefault: bool) -> None:
        """Refuse to migrate; it is a failure of QEMU's where the device lacks PAGEFAULT.

        Raises:
            MigrationError: QEMU accepted the device.
            UnsupportedScenarioError: it may accept it.
        """
        if device_lacks_pagefault:
            raise MigrationError(
                f"QEMU accepted {', '.join(self.capabilities)}, which it must refuse with a "
                f"device like this ({self.refusal!r} was expected)"
            )
        raise UnsupportedScenarioError(
            f"QEMU accepts {', '.join(self.capabilities)}, as it may with this device; "
            "dmaproof does not carry out such a migration"
        )
