"""The options of a proof on the command line, derived from `proof.options.OPTIONS`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from ..migration.scenarios import known_scenarios
from ..proof.options import OPTIONS, Option, ProofOptions
from ..qemu.iommu import IOMMUS

SETUP_GROUPS = ("QEMU", "guest", "migration")
"""Those of the options that are not of the device, nor of one run."""


def options_of_groups(groups: Collection[str] = ()) -> list[Option]:
    """The options of these groups, or of all."""
    return [option for option in OPTIONS.values() if not groups or option.group in groups]


def by_group(options: Iterable[Option]) -> dict[str, list[Option]]:
    """The options under the titles of their groups, as a help shows them."""
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(option.group, []).append(option)
    return groups


def add_options(
    parser: argparse.ArgumentParser,
    options: Iterable[Option] = tuple(OPTIONS.values()),
    defaults: ProofOptions | None = None,
) -> None:
    """Add `options`; those that are not given are as in `defaults`."""
    for title, members in by_group(options).items():
        group = parser.add_argument_group(title)
        for option in members:
            default = getattr(defaults or ProofOptions(), option.name)
            group.add_argument(option.flag, **_how(option, default))


def _how(option: Option, default: Any) -> dict[str, Any]:
    text = option.help
    if option.is_switch:
        return {"action": "store_const", "const": True, "help": text}
    if default not in (None, "", ()):
        written = " ".join(word.partition("=")[2] for word in option.words(default))
        text += f" (default: {written})"
    how: dict[str, Any] = {"type": _reader(option), "help": text.replace("%", "%%")}
    if option.choices is not None:
        how["choices"] = list(option.choices())
    if option.metavar is not None:
        how["metavar"] = option.metavar
    if option.is_repeatable:
        how["action"] = "append"
    return how


def _reader(option: Option) -> Callable[[str], str]:
    def read(text: str) -> str:
        option.value_of(
            [text] if option.is_repeatable else text
        )  # its error is more than argparse's
        return text

    return read


def given_options(
    arguments: argparse.Namespace, defaults: ProofOptions | None = None
) -> ProofOptions:
    """The options that were given, and `defaults` for the others.

    Raises:
        UsageError: one of them cannot have its value.
    """
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in OPTIONS and value is not None
    }
    chosen = ProofOptions.of(given)
    return replace(defaults or chosen, **{name: getattr(chosen, name) for name in given})


def describe_iommus() -> str:
    """All virtual IOMMUs, a line each, for a subcommand's help."""
    lines = (f"  {name:<12}{iommu.summary}" for name, iommu in IOMMUS.items())
    return "\n".join(("IOMMUs (docs/iommu.md):", *lines))


def describe_scenarios() -> str:
    """All migration scenarios, a line each, for a subcommand's help."""
    scenarios = known_scenarios().usable()
    width = max(map(len, scenarios))
    lines = (f"  {name:<{width}}  {scenario().summary}" for name, scenario in scenarios.items())
    return "\n".join(("migration scenarios (docs/scenarios.md says what each needs):", *lines))
