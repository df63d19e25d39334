"""Everything that the documentation names exists: tests, proofs, files, commands, messages."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_tools.cli.arguments import parsers_of
from qmp_tools.cli.main import make_parser
from support import messages
from support.doc_commands import PAGES, ROOT, Block, all_blocks, error_of, in_prose


def text_of(*folders: str) -> str:
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return "\n".join(file.read_text() for file in files)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_docs_name_only_tests_that_exist(page: Path) -> None:
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", page.read_text()))
    tests = text_of("tests")
    assert [name for name in named if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_docs_name_only_proofs_that_exist(page: Path) -> None:
    text = " ".join(page.read_text().split())
    named = set(re.findall(r"`((?:START|REPORT|HWPT|TYPE1|ITERATOR): [^`]+)`", text))
    proofs = text_of("qmp_tools/passthrough")
    assert [name for name in named if f'"{name}"' not in proofs] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_targets_of_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_missing_name_is_noticed() -> None:
    assert "def test_that_is_nowhere(" not in text_of("qmp_tools")
    named = re.findall(r"`(test_[a-z0-9_]+)`", (ROOT / "docs" / "iterator.md").read_text())
    assert len(named) > 30


BLOCKS = all_blocks()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_of_commands_is_marked_as_run_or_parsed(block: Block) -> None:
    assert block.mark, f"{block}: put <!-- run --> or <!-- parsed: WHY --> above (doc_commands.py)"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_parser_accepts_each_command_line(block: Block) -> None:
    for words in block.command_lines():
        if block.page.parent != ROOT or words[0] not in ("test", "develop"):  # ./dmaproof's own
            assert error_of(words) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_prose_exist(page: Path) -> None:
    helps = {
        tuple(parser.prog.split()[1:]): parser.format_help() for parser in parsers_of(make_parser())
    }
    for words in in_prose(page):
        assert (words[0],) in helps
        known = helps.get(tuple(words[:2])) or helps[words[0],]
        assert [word for word in words if word.startswith("--") and word not in known] == []


def test_a_wrong_command_line_is_noticed() -> None:
    assert error_of(["prove", "--guest", "bare"]) is None
    assert "--no-such" in str(error_of(["prove", "--no-such"]))
    assert "horse" in str(error_of(["prove", "--guest", "horse"]))


def test_explained_messages_exist() -> None:
    explained, known = messages.headings(), messages.all_texts()
    assert len(explained) > 20
    cut = [text.removesuffix(" …") for text in explained]
    assert [text for text in cut if not any(text in message for message in known)] == []


def test_a_missing_message_is_noticed() -> None:
    assert list(
        messages.texts_of(ast.parse('raise E(f"no {this} of " f"{that!r:>4}, " "so")'))
    ) == ["no … of …, so"]
    assert not any("there is no such message" in message for message in messages.all_texts())


def test_every_option_that_a_remedy_names_exists() -> None:
    remedy = re.compile(r"(?:\(|use |leave out |choose |give )(--(?!dmaproof-)[a-z-]+)", re.I)
    known = {
        option
        for parser in parsers_of(make_parser())
        for action in parser._actions
        for option in action.option_strings
    }
    assert {option for text in messages.all_texts() for option in remedy.findall(text)} <= known


def test_the_list_of_messages_is_complete() -> None:
    assert messages.PAGE.read_text() == messages.page(), "run: python tests/support/messages.py"
    assert all(len(found) > 50 for found in messages.error_messages().values())


def kinds_of(node: object) -> Iterator[str]:
    """Yield the values that a JSON schema allows for the member 'kind'."""
    if isinstance(node, dict):
        kind = node.get("kind")
        if isinstance(kind, dict) and ("const" in kind or "enum" in kind):
            yield from kind.get("enum", [kind.get("const")])
        for value in node.values():
            yield from kinds_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from kinds_of(value)


def test_the_docs_describe_every_kind_of_report() -> None:
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    kinds = set(kinds_of(schema))
    assert {"prove", "check-untested", "doctor"} <= kinds
    page = (ROOT / "docs" / "report.md").read_text()
    assert [kind for kind in kinds if f"`{kind}`" not in page] == []
