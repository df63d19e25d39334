"""The options of a proof on the command line, derived from `proof.options.OPTIONS`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from ..proof.options import OPTIONS, Option, ProofOptions

SETUP_GROUPS = ("QEMU", "guest", "migration")
"""The groups of the options that concern neither the device nor a single run."""


def options_of_groups(groups: Collection[str] = ()) -> list[Option]:
    """Return the options of these groups, or of all groups."""
    return [option for option in OPTIONS.values() if not groups or option.group in groups]


def by_group(options: Iterable[Option]) -> dict[str, list[Option]]:
    """Return the options by the titles of their groups, in the order of the help."""
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(option.group, []).append(option)
    return groups


def add_options(
    parser: argparse.ArgumentParser,
    options: Iterable[Option] = tuple(OPTIONS.values()),
    defaults: ProofOptions | None = None,
) -> None:
    """Add `options` to a parser; an option that is not given has its value in `defaults`."""
    for title, members in by_group(options).items():
        group = parser.add_argument_group(title)
        for option in members:
            default = getattr(defaults or ProofOptions(), option.name)
            group.add_argument(option.flag, **_keywords(option, default))


def help_of(option: Option, default: Any) -> str:
    """Return the help text of an option, with its `default` if its own text does not name it."""
    text = option.help
    if option.is_switch:
        text += f" (default: {'on' if default else 'off'})"
    elif default not in (None, "", ()):
        values = (word.partition("=")[2] for word in option.words(default))
        text += f" (default: {' '.join(value.removesuffix('.0') for value in values)})"
    return text.replace("%", "%%")


def _keywords(option: Option, default: Any) -> dict[str, Any]:
    if option.is_switch:
        return {"action": "store_const", "const": True, "help": option.help}
    keywords: dict[str, Any] = {"type": _reader(option), "help": help_of(option, default)}
    if option.choices is not None:
        keywords["choices"] = list(option.choices())
    if option.metavar is not None:
        keywords["metavar"] = option.metavar
    if option.is_repeatable:
        keywords["action"] = "append"
    return keywords


def _reader(option: Option) -> Callable[[str], str]:
    def read(text: str) -> str:
        # Its error message says more than argparse's.
        option.value_of([text] if option.is_repeatable else text)
        return text

    return read


def given_options(
    arguments: argparse.Namespace, defaults: ProofOptions | None = None
) -> ProofOptions:
    """Return the options that were given, and `defaults` for the others.

    Raises:
        UsageError: an option cannot have the value that was given.
    """
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in OPTIONS and value is not None
    }
    chosen = ProofOptions.of(given)
    return replace(defaults or chosen, **{name: getattr(chosen, name) for name in given})
