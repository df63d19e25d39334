"""The error messages of dmaproof, read from its source: docs/messages.md lists all of them.

``python tests/support/messages.py`` writes the page again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "messages.md"
_TROUBLESHOOTING: Final = ROOT / "docs" / "troubleshooting.md"
_PACKAGES: Final = ("plugin", "qmp_tools")
_VALUE: Final = "…"
"""Stands for what differs from case to case."""

_INTRODUCTION: Final = """\
# Messages

On this page you can look up an error message of dmaproof and the exit code that goes with it. `…`
stands for what differs from case to case: a name, a number, a path, or the words of another
program. The headings are the exception classes of the library; the command line does not print
them. A linked message is explained in [troubleshooting](troubleshooting.md).

<!-- Written by tests/support/messages.py. -->
"""
_SECTIONS: Final = {
    "UsageError": (
        "Exit code 2: wrong usage",
        "A command line, a file or an argument of the library is wrong. Nothing was tested.",
    ),
    "UntestableError": (
        "Exit code 3: not tested",
        "The proof or the check could not be carried out. That is neither a pass nor a failure.",
    ),
    "DmaproofError": (
        "Errors of the library",
        "A caller of `dmaproof` or `qmp_tools` gets these errors as exceptions. If a device of "
        "dmaproof meets one, the device ends its session, and the proof reports the error under "
        "exit code 3.",
    ),
}


@dataclass(frozen=True, order=True)
class Message:
    """A message with `…` in place of its values, and the exception that carries it."""

    text: str
    error: str


def texts_of(node: ast.AST) -> Iterator[str]:
    """Yield the strings in `node`, with '…' for each value that the program inserts."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else _VALUE for part in node.values)
        yield "".join(map(str, parts))
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts_of(child)


def all_texts() -> list[str]:
    """Return every string of the program."""
    return [text for source in _sources() for text in texts_of(source)]


def _sources() -> list[ast.Module]:
    files = (file for name in _PACKAGES for file in sorted((ROOT / name).rglob("*.py")))
    return [ast.parse(file.read_text()) for file in files]


def _name(node: ast.expr) -> str:
    return str(getattr(node, "id", getattr(node, "attr", "")))


def _ancestors(sources: list[ast.Module]) -> dict[str, list[str]]:
    """Map the name of each class to its own and its base classes' names, the nearest first."""
    bases = {
        node.name: [_name(base) for base in node.bases]
        for source in sources
        for node in ast.walk(source)
        if isinstance(node, ast.ClassDef)
    }

    def above(name: str) -> list[str]:
        direct = [base for base in bases.get(name, ()) if base != name]
        return [name, *(found for base in direct for found in above(base))]

    return {name: above(name) for name in bases}


def error_messages() -> dict[str, list[Message]]:
    """Return the messages by section: 'UsageError', 'UntestableError', 'DmaproofError' (others)."""
    sources = _sources()
    ancestors = _ancestors(sources)
    found: dict[str, set[Message]] = {section: set() for section in _SECTIONS}
    for source in sources:
        for node in ast.walk(source):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            error = _name(node.func)
            section = next((name for name in ancestors.get(error, ()) if name in found), None)
            if section is not None:
                texts = _texts_behind(node.args[0], source)
                found[section] |= {Message(text, error) for text in texts}
    return {section: sorted(found[section]) for section in _SECTIONS}


def _texts_behind(argument: ast.expr, source: ast.Module) -> Iterator[str]:
    """Yield the texts of `argument`; if it has none, those of its variables and of its calls."""
    own = [text for text in texts_of(argument) if _has_words(text, 2)]
    if own:
        yield from own
        return
    names = {_name(node) for node in ast.walk(argument) if isinstance(node, ast.Name)}
    called = {_name(node.func) for node in ast.walk(argument) if isinstance(node, ast.Call)}
    found: list[ast.AST] = []
    for node in ast.walk(source):
        if isinstance(node, ast.Assign) and names & {_name(target) for target in node.targets}:
            found.append(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name in called:
            found += [child for child in ast.walk(node) if isinstance(child, ast.Return)]
    for node in found:
        yield from (text for text in texts_of(node) if _has_words(text, 4))


def _has_words(text: str, count: int) -> bool:
    return sum(bool(re.search(r"[a-z]{2}", word)) for word in text.split()) >= count


def headings() -> list[str]:
    """Return the messages that docs/troubleshooting.md explains; a shortened one ends in ' …'."""
    return re.findall(r"^### `(.+)`$", _TROUBLESHOOTING.read_text(), re.MULTILINE)


def _anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _line(message: Message, explained: list[str]) -> str:
    text = " ".join(message.text.split())
    quoted = f"`` {text} ``" if "`" in text else f"`{text}`"
    for heading in explained:
        if heading.removesuffix(" …") in message.text:
            return f"- [{quoted}](troubleshooting.md#{_anchor(heading)})"
    return f"- {quoted}"


def page() -> str:
    """Return the text of docs/messages.md."""
    explained = headings()
    parts = [_INTRODUCTION]
    for section, found in error_messages().items():
        title, meaning = _SECTIONS[section]
        parts.append(f"## {title}\n\n{meaning}\n")
        by_error: dict[str, list[Message]] = {}
        for message in found:
            by_error.setdefault(message.error, []).append(message)
        for error in sorted(by_error):
            lines = "\n".join(_line(message, explained) for message in by_error[error])
            parts.append(f"### {error}\n\n{lines}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
