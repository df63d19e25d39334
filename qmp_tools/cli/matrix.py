"""``dmaproof matrix``: many proofs, over whatever options a proof has."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ..arguments import positive
from ..matrix.avocado_recipe import runnables
from ..matrix.axes import Matrix, make_matrix, read_matrix, split_values
from ..matrix.resources import Room
from ..matrix.result_cache import Kept
from ..matrix.run import run_matrix
from ..proof.options import OPTIONS, Option
from ..reports.matrix_report import to_json, to_text
from .arguments import describe, reads
from .display import print_text
from .interruption import run_interruptibly
from .log import OfManyProofs
from .options import by_group, describe_scenarios
from .outputs import add_outputs, reporting_failure, write_json, write_outputs, writes_to_stdout

_logger = logging.getLogger(__name__)

_EXAMPLES: Final = """\
Each option of a proof takes several values here, behind commas or by being repeated (a comma in
front of 'name=' belongs to the value). 'all' is every value there is, and * and ? match some:
--scenario 'multifd-*'. The cells are all combinations.

A file has the same as TOML; an option in front of or behind it takes the place of its axis:

  [matrix]
  qemu = ["7.2", "11.1"]
  scenario = ["unix", "multifd-*"]
  tracker = "all"
  guest = "bare"

  [[exclude]]
  qemu = "7.2"
  scenario = "multifd-8"

What came to a verdict is kept in a folder, and not run again until dmaproof, its QEMUs, its guest,
a back end's program or the host's kernel change: an interrupted matrix goes on where it was.

examples:
  dmaproof matrix --guest bare --scenario unix,tls,multifd-4 --tracker all
  dmaproof matrix --qemu 7.2,11.1 --qemu-destination 7.2,11.1 --scenario all --report matrix.html
  dmaproof matrix matrix.toml --junit matrix.xml --json matrix.json
  dmaproof matrix matrix.toml --list
  dmaproof matrix matrix.toml --avocado recipe.json    # for: avocado run recipe.json

exit codes:
  0  every cell is clean, but for those that a QEMU cannot have
  1  a cell lost pages
  2  wrong usage
  3  a cell could not be tested, or none was
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        reporting_failure(_run, "matrix"),
        description="Carry out a proof for every combination of options, side by side as far as "
        "the machine has room, and tell which were clean, which lost pages, and why others could "
        "not be tested.",
        epilog=f"{_EXAMPLES}\n{describe_scenarios()}",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.toml", help="the axes")
    for title, options in by_group(OPTIONS.values()).items():
        group = parser.add_argument_group(f"axes: {title}")
        for option in options:
            _add_axis(group, option)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--folder",
        type=Path,
        default=Path("dmaproof-matrix"),
        metavar="FOLDER",
        help="where results are kept (default: %(default)s)",
    )
    run.add_argument("--again", action="store_true", help="run what is kept, too")
    run.add_argument(
        "--jobs",
        type=reads(positive),
        metavar="N",
        help="proofs at a time (default: by processors); memory bounds them in any case",
    )
    run.add_argument("--list", action="store_true", help="show the cells, and run none")
    run.add_argument(
        "--avocado", metavar="FILE.json", help="write the cells as avocado's recipe, and run none"
    )
    run.add_argument("--quiet", action="store_true", help="show no progress")
    add_outputs(parser)


def _add_axis(group: argparse._ArgumentGroup, option: Option) -> None:
    choices = f"; {', '.join(option.values)}" if option.values else ""
    group.add_argument(
        option.flag,
        action="append",
        dest=_DEST + option.key,
        metavar=option.metavar or "VALUE",
        help=f"{option.help}{choices}".replace("%", "%%"),
    )


_DEST: Final = "axis "
"""In front of an axis' name in the parsed arguments, where other options have names too."""


def _chosen(arguments: Mapping[str, object]) -> dict[str, list[str]]:
    return {
        name.removeprefix(_DEST): [it for text in given for it in split_values(text)]
        for name, given in arguments.items()
        if name.startswith(_DEST) and isinstance(given, Sequence)
    }


def _matrix(arguments: argparse.Namespace) -> Matrix:
    axes = _chosen(vars(arguments))
    return read_matrix(arguments.file, axes) if arguments.file else make_matrix(axes)


def _run(arguments: argparse.Namespace) -> int:
    matrix = _matrix(arguments)
    if arguments.list:
        for cell in matrix.cells():
            print(matrix.label(cell))
        return 0
    if arguments.avocado:
        write_json(runnables(matrix), arguments.avocado)
        return 0
    arguments.log.addFilter(OfManyProofs())
    room = Room.of_this_machine(arguments.jobs)
    with Kept.open(arguments.folder) as kept:
        work = run_matrix(matrix, kept, room, again=arguments.again)
        try:
            results = run_interruptibly(work)
        except KeyboardInterrupt:
            folder = arguments.folder
            _logger.info("finished cells are kept in %s; the same again goes on", folder)
            raise
    answer = to_json(matrix, results)
    if not writes_to_stdout(arguments):
        print_text(to_text(answer))
    write_outputs(answer, arguments)
    code: int = answer["exit_code"]
    return code
