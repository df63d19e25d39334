"""The commands of README and docs that are marked as run, typed as the pages show them."""

from __future__ import annotations

import shutil

import pytest

from support.doc_commands import ROOT, Block, all_blocks, missing, type_in

RUN = [block for block in all_blocks() if block.is_run]


@pytest.mark.parametrize("block", RUN, ids=str)
def test_commands_in_the_docs_print_what_the_docs_show(
    block: Block, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("d")  # short, for sockets
    (folder / "tests").symlink_to(ROOT / "tests")
    exit_code, printed = type_in(block, folder)
    assert exit_code == block.exit_code, f"{block}: {block.script}\n{printed}"
    assert not missing(block, printed), printed
    shutil.rmtree(folder)


def test_a_line_that_is_not_printed_is_noticed() -> None:
    block = next(block for block in RUN if len(block.printed) > 5)
    others = [line for shown in block.printed for line in ("something else", shown)]
    assert missing(block, "\n".join(others)) == []
    for line in block.printed:
        rest = [other for other in block.printed if other is not line]
        assert line in missing(block, "\n".join(rest)) or line.strip(" …") == ""
