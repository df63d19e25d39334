"""``dmaproof matrix``: a proof for each combination of options."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ..arguments import positive
from ..matrix.avocado_recipe import runnables
from ..matrix.axes import Matrix, make_matrix, read_matrix, split_values
from ..matrix.cells import Axis, extra_axes
from ..matrix.resources import Resources
from ..matrix.result_cache import ResultCache
from ..matrix.run import run_matrix
from ..proof.options import OPTIONS, Option
from ..reports.matrix_report import to_json, to_text
from .arguments import add_quiet, describe, reads
from .display import print_text
from .interruption import run_interruptibly
from .log import OfManyProofs
from .options import by_group, help_of
from .outputs import add_outputs, reporting_failure, write_json, write_outputs, writes_to_stdout

_logger = logging.getLogger(__name__)

_EXAMPLES: Final = """\
Here each option of a proof takes several values, separated by commas or given by repeating the
option. (A comma before 'name=' belongs to the value.) 'all' stands for every value; * and ? match
several: --scenario 'multifd-*'. The matrix has a cell for each combination. 'dmaproof list' prints
the values of an option.

A TOML file can name the same axes; an option on the command line replaces the axis of that name:

  [matrix]
  qemu = ["7.2", "11.1"]
  scenario = ["unix", "multifd-*"]
  tracker = "all"
  guest = "bare"

  [[exclude]]
  qemu = "7.2"
  scenario = "multifd-8"

Verdicts are cached in a folder. A cached cell is not run again until dmaproof, its QEMUs, its
guest, a back end's program or the host's kernel change, so an interrupted matrix continues where it
was.

examples:
  dmaproof matrix --guest bare --scenario unix,tls,multifd-4 --tracker all
  dmaproof matrix --qemu 7.2,11.1 --qemu-destination 7.2,11.1 --scenario all --report matrix.html
  dmaproof matrix matrix.toml --junit matrix.xml --json matrix.json
  dmaproof matrix --passthrough all --l1-kernel 7.3,stock --qemu 10.0,11.1
  dmaproof matrix matrix.toml --list
  dmaproof matrix matrix.toml --avocado recipe.json    # for: avocado run recipe.json

exit codes:
  0  pass: every cell passed, except cells that a QEMU does not support
  1  fail: a cell lost pages
  2  wrong usage
  3  not tested: a cell could not be tested, or no cell was
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    describe(
        parser,
        reporting_failure(_run, "matrix"),
        description="Carry out a proof for every combination of options, several at a time if the "
        "machine has\nthe resources, and report which passed, which lost pages, and why others "
        "could not be tested.",
        epilog=_EXAMPLES,
        usage="[OPTION]... [FILE.toml]",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE.toml", help="a file that names the axes"
    )
    for title, options in by_group(OPTIONS.values()).items():
        group = parser.add_argument_group(f"axes: {title}")
        for option in options:
            _add_axis(group, option)
    others = parser.add_argument_group("axes: other than options of a proof")
    for axis in extra_axes().values():
        _add_extra_axis(others, axis)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--folder",
        type=Path,
        default=Path("dmaproof-matrix"),
        metavar="FOLDER",
        help="folder of the result cache (default: %(default)s)",
    )
    run.add_argument("--again", action="store_true", help="run cached cells again")
    run.add_argument(
        "--jobs",
        type=reads(positive),
        metavar="N",
        help="greatest number of proofs at a time; free memory limits it further (default: by the "
        "number of processors)",
    )
    run.add_argument("--list", action="store_true", help="print the cells, and run none")
    run.add_argument(
        "--avocado",
        metavar="FILE.json",
        help="write the cells as a recipe for avocado, and run none ('-': standard output)",
    )
    add_quiet(run)
    add_outputs(parser)


def _add_extra_axis(group: argparse._ArgumentGroup, axis: Axis) -> None:
    group.add_argument(
        f"--{axis.name}", action="append", dest=_DEST + axis.name, metavar="NAME", help=axis.help
    )


def _add_axis(group: argparse._ArgumentGroup, option: Option) -> None:
    # Long lists are named by a metavar, and printed by 'dmaproof list'.
    choices = f"; {', '.join(option.values)}" if option.values and not option.metavar else ""
    group.add_argument(
        option.flag,
        action="append",
        dest=_DEST + option.key,
        metavar=option.metavar or "VALUE",
        help=f"{help_of(option, option.default)}{choices}",
    )


_DEST: Final = "axis "
"""Prefix of the axes in the parsed arguments, which other options are part of too."""


def _chosen(arguments: Mapping[str, object]) -> dict[str, list[str]]:
    return {
        name.removeprefix(_DEST): [value for text in given for value in split_values(text)]
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
    resources = Resources.of_this_machine(arguments.jobs)
    with ResultCache.open(arguments.folder) as cache:
        work = run_matrix(matrix, cache, resources, again=arguments.again)
        try:
            results = run_interruptibly(work)
        except KeyboardInterrupt:
            folder = arguments.folder
            _logger.info(
                "finished cells are cached in %s; run the same command again to continue", folder
            )
            raise
    answer = to_json(matrix, results)
    if not writes_to_stdout(arguments):
        print_text(to_text(answer))
    write_outputs(answer, arguments)
    code: int = answer["exit_code"]
    return code
