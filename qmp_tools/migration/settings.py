"""Parse the migration capabilities and parameters that a user adds to a scenario's own.

dmaproof has no list of what QEMU knows: QEMU itself refuses an unknown name or a wrong value. It
refuses only what would defeat the proof, or what another option sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

from dmaproof.errors import UsageError

TAKEN_CAPABILITIES: Final = {
    "background-snapshot": "use --scenario background-snapshot",
    "postcopy-ram": "use --scenario postcopy",
    "x-colo": "a migration with COLO never completes",
    "x-ignore-shared": "the guest's RAM is shared memory, so QEMU would not migrate it; use "
    "--scenario ignore-shared",
}
"""Capabilities that a user cannot add to a scenario, and why."""

TAKEN_PARAMETERS: Final = {
    "cpr-exec-command": "use --scenario cpr-exec",
    "downtime-limit": "use --downtime-limit",
    "max-bandwidth": "use --bandwidth",
    "mode": "use a scenario such as --scenario cpr-reboot",
    "tls-creds": "use --scenario tls",
    "tls-hostname": "use --scenario tls",
}
"""The same for parameters."""

_NAME: Final = re.compile(r"[a-z][a-z0-9-]*")


def require_capabilities(names: Iterable[str]) -> None:
    """Check capabilities that a user adds.

    Raises:
        ValueError: a name cannot be the name of a capability; the error says what was expected.
        UsageError: a capability would defeat the proof.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError("names of capabilities, such as auto-converge")
        _refuse("--capability", name, TAKEN_CAPABILITIES)


def parse_parameters(texts: Iterable[str]) -> dict[str, Any]:
    """Parse parameters that a user adds.

    Args:
        texts: NAME=VALUE each. VALUE is JSON, or else a string.

    Returns:
        The values by name.

    Raises:
        ValueError: a text is not of this form; the error says what was expected.
        UsageError: another option sets the parameter.

    Example:
        >>> parse_parameters(["multifd-channels=4", "multifd-compression=zstd", "direct-io=true"])
        {'multifd-channels': 4, 'multifd-compression': 'zstd', 'direct-io': True}
    """
    parameters: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ValueError("NAME=VALUE, such as multifd-channels=4")
        _refuse("--parameter", name, TAKEN_PARAMETERS)
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters


def _refuse(flag: str, name: str, taken: dict[str, str]) -> None:
    if name in taken:
        raise UsageError(f"{flag} {name}: {taken[name]}")
