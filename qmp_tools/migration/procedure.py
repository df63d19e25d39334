"""Define the steps of a migration over QMP: the part of a scenario that works with any two QEMUs.

`migration.Migration` carries a procedure out. dmaproof learns what a QEMU version supports by
trying: if QEMU refuses a step before the migration begins, QEMU does not support the scenario
(`UnsupportedScenarioError`). An error after that is a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any, Final

from dmaproof.errors import UnsupportedError

from ..qemu.qmp import Qmp
from .transport import UNIX, Ends, Transport

# QEMU sends in portions of a tenth of a second. With these bandwidths, a portion is less than the
# guest keeps dirty (Workload.churn), so no pass ends at once: neither the passes right after the
# first (nine passes in 50 ms have been seen) nor those while dmaproof holds the migration.
FIRST_PASS_BYTES_PER_S: Final = 128 << 20
# A scenario with a small or fast stream uses this bandwidth for its first pass too. With a larger
# portion, the end of that pass would leave room for further passes at once (a migration with 8
# channels has ended after 0.2 s).
HELD_BYTES_PER_S: Final = 32 << 20

NO_PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType({})


class UnsupportedScenarioError(UnsupportedError):
    """QEMU lacks the scenario or refuses it for this device, or dmaproof cannot carry it out."""


class Procedure:
    """The data and the QMP steps of a live precopy migration; subclasses change what differs.

    `Migration` sets `capabilities` on the `configured` QEMUs, calls `set_up`, and then sets
    `parameters` (all named as in QMP). `exercised_by` is the path of a member of query-migrate,
    such as 'ram.multifd-bytes', that is more than 0 once QEMU has used the scenario; the migration
    may not end earlier. The bandwidth `first_pass_bytes_per_s`, and `held_bytes_per_s` once the
    scenario has been exercised, keep the migration from ending too early.
    """

    transport: Transport = UNIX
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = NO_PARAMETERS
    exercised_by: str | None = None
    first_pass_bytes_per_s: int = FIRST_PASS_BYTES_PER_S
    held_bytes_per_s: int = HELD_BYTES_PER_S
    breaks_connection: bool = False
    """Whether the scenario itself breaks and restores the connection of a postcopy."""
    user_options: tuple[str, ...] = ()
    """The options with which a user has added settings."""

    def extend(self, capabilities: Sequence[str], parameters: Mapping[str, Any]) -> None:
        """Add a user's settings to the scenario's own; a parameter replaces the scenario's."""
        if capabilities or parameters:
            self.capabilities = (*self.capabilities, *capabilities)
            self.parameters = {**self.parameters, **parameters}
            self.user_options = (
                *(f"--capability {name}" for name in capabilities),
                *(f"--parameter {name}" for name in parameters),
            )
            # With any of them, the stream may be small or fast.
            self.first_pass_bytes_per_s = HELD_BYTES_PER_S

    def configured(self, ends: Ends) -> Sequence[Qmp]:
        """Return the QEMUs on which the capabilities and parameters are set."""
        return (ends.source, ends.destination)

    async def set_up(self, ends: Ends) -> None:
        """Create the objects that the parameters name, such as TLS credentials.

        Raises:
            QmpRefusal: a QEMU does not support them.
        """

    def explain_refusal(self, words: str) -> UnsupportedScenarioError:
        """Explain that a QEMU refused the capabilities, the set-up or the parameters."""
        settings = f" with {' '.join(self.user_options)}" if self.user_options else ""
        return UnsupportedScenarioError(
            f"this QEMU does not support the migration scenario{settings}: {words}"
        )

    async def begin(self, ends: Ends) -> None:
        """Begin the migration.

        Raises:
            QmpError: a QEMU refused to.
        """
        if not self.transport.saved_first:
            await self.read_stream(ends)
        await ends.source.execute("migrate", uri=await self.transport.written_to(ends))

    @property
    def is_over_when_begun(self) -> bool:
        """Whether the destination has taken the source's place once `begin` is done."""
        return False

    async def load(self, ends: Ends) -> None:
        """Have the destination load what the source has sent, unless it is loading already.

        Raises:
            QmpError: the destination refused to.
        """
        if self.transport.saved_first:
            await self.read_stream(ends)

    async def read_stream(self, ends: Ends) -> None:
        """Have the destination read the stream.

        Raises:
            QmpError: the destination refused to.
        """
        uri = self.transport.read_from(ends)
        await ends.destination.execute("migrate-incoming", uri=uri)

    def is_exercised_in(self, answer: Mapping[str, Any]) -> bool:
        """Return whether an answer of query-migrate shows that QEMU has used the scenario."""
        if self.exercised_by is None:
            return True
        path = self.exercised_by.split(".")
        value: Any = reduce(lambda part, name: part.get(name, {}), path, answer)
        return bool(value)
