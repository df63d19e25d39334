"""What a migration does over QMP: the part of a scenario that needs no processes of dmaproof's.

`migration.Migration` carries a procedure out. Which of it a QEMU version has is found out by asking
for it: what a QEMU refuses before the migration begins it lacks (`UnsupportedScenarioError`), and
what goes wrong later is a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any, Final

from dmaproof.errors import UnsupportedError

from ..qemu.qmp import Qmp
from .transport import UNIX, Ends, Transport

# QEMU hands out its bandwidth in portions of a tenth of a second. With these, a portion is less
# than what the guest keeps dirtying (Workload.churn), so no pass can be over in no time: not the
# ones right behind the first (seen: nine passes in 50 ms), and not those while it is held.
FIRST_PASS_BYTES_PER_S: Final = 128 << 20
# Also for the first pass of a scenario whose stream is so small, or written so fast, that much of a
# larger portion would be left for the passes behind it (seen: 8 channels, over after 0.2 s).
HELD_BYTES_PER_S: Final = 32 << 20

NO_PARAMETERS: Final[Mapping[str, Any]] = MappingProxyType({})


class UnsupportedScenarioError(UnsupportedError):
    """A QEMU lacks the scenario or refuses it for this device, or dmaproof cannot carry it out."""


class Procedure:
    """The data and the QMP steps of a live precopy migration; subclasses change what differs.

    `capabilities` and `parameters` (named as in QMP) are set on `configured` QEMUs, `set_up` is
    carried out in between. `exercised_by` is the path of a member of query-migrate
    ('ram.multifd-bytes') that is more than 0 once the scenario has been used: only then may the
    migration end. `first_pass_bytes_per_s`, and from when the scenario has been exercised
    `held_bytes_per_s`, keep the migration from ending before it may.
    """

    transport: Transport = UNIX
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = NO_PARAMETERS
    exercised_by: str | None = None
    first_pass_bytes_per_s: int = FIRST_PASS_BYTES_PER_S
    held_bytes_per_s: int = HELD_BYTES_PER_S

    def configured(self, ends: Ends) -> Sequence[Qmp]:
        """The QEMUs that are given the capabilities and parameters."""
        return (ends.source, ends.destination)

    async def set_up(self, ends: Ends) -> None:
        """Provide what the parameters name, such as TLS credentials.

        Raises:
            QmpRefusal: a QEMU lacks it.
        """

    def explain_refusal(self, words: str) -> UnsupportedScenarioError:
        """What it means that a QEMU refused the capabilities, the set-up or the parameters."""
        return UnsupportedScenarioError(f"this QEMU lacks the scenario: {words}")

    def check_acceptance(self, *, device_lacks_pagefault: bool) -> None:
        """Judge that the QEMUs accepted the capabilities, the set-up and the parameters.

        `device_lacks_pagefault` is `AttachedDevice.lacks_pagefault`.

        Raises:
            UntestableError: the migration must not begin.
        """

    async def begin(self, ends: Ends) -> None:
        """Have the migration begin.

        Raises:
            QmpError: a QEMU refused it.
        """
        if not self.transport.saved_first:
            await self.read_stream(ends)
        await ends.source.execute("migrate", uri=await self.transport.written_to(ends))

    @property
    def is_over_when_begun(self) -> bool:
        """Whether the destination has taken the source's place once `begin` is done."""
        return False

    async def load(self, ends: Ends) -> None:
        """Have the destination load what the source has sent, unless it does so already.

        Raises:
            QmpError: the destination refused it.
        """
        if self.transport.saved_first:
            await self.read_stream(ends)

    async def read_stream(self, ends: Ends) -> None:
        """Tell the destination where to read the stream.

        Raises:
            QmpError: the destination refused it.
        """
        uri = self.transport.read_from(ends)
        await ends.destination.execute("migrate-incoming", uri=uri)

    def is_exercised_in(self, answer: Mapping[str, Any]) -> bool:
        """Whether an answer of query-migrate shows that the scenario has been used."""
        if self.exercised_by is None:
            return True
        path = self.exercised_by.split(".")
        value: Any = reduce(lambda part, name: part.get(name, {}), path, answer)
        return bool(value)
