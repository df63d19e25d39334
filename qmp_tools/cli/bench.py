"""``dmaproof bench``: the cost of dirty bitmaps, as tables and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from dmaproof.bench import core
from dmaproof.bench.iterator import (
    DENSITIES,
    GUEST_SIZES,
    STRATEGIES,
    Row,
    all_patterns,
    measure,
    size_name,
    table,
)
from dmaproof.bench.patterns import Locality
from dmaproof.errors import UsageError

from ..arch.x86_64 import X86_64
from ..arguments import positive, seconds
from ..passthrough.kernel_cost import tables
from ..passthrough.kernel_cost.bench import measure_kernel_cost
from ..passthrough.kernel_cost.measure import REPORT_SIZES
from ..passthrough.l1.kernel import DEFAULT_KERNEL, KERNELS
from ..passthrough.l1.machine import l1
from ..qemu.choice import find_qemu
from .arguments import add_parser, reads
from .interruption import run_interruptibly
from .outputs import add_json, write_json

_EXAMPLES: Final = """\
examples:
  dmaproof bench core                           # ratios to memcpy, memcmp, the kernel's algorithm
  dmaproof bench iterator --most 1T             # a table for guests up to 1 TiB
  dmaproof bench iterator --picture cost.png    # needs matplotlib: pip install 'dmaproof[bench]'
  dmaproof bench kernel --json cost.json        # the kernel's dirty bitmaps, in instructions

exit codes:
  0  the figures were printed
  2  wrong usage
  3  not measured: the message says why
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    parser.description = "Measure the cost of dirty bitmaps."
    parser.epilog = _EXAMPLES
    parts = parser.add_subparsers(metavar="WHAT", required=True)
    iterator = add_parser(
        parts,
        "iterator",
        _run_iterator,
        summary="the forms of a bitmap, by density, locality and guest size",
        description="Measure the forms of a bitmap, by density, locality and guest size.",
        epilog=_EXAMPLES,
    )
    iterator.add_argument(
        "--most",
        choices=[_short(size) for size in GUEST_SIZES],
        default=_short(GUEST_SIZES[-1]),
        help="the largest guest; 16T takes about 1.5 GiB of memory (default: %(default)s)",
    )
    core_parser = add_parser(
        parts,
        "core",
        _run_core,
        summary="loops over bits and pages, compared with memcpy, memchr and memcmp",
        description="Compare the loops over bits and pages with memcpy, memchr and memcmp.",
        epilog=_EXAMPLES,
    )
    kernel = add_parser(
        parts,
        "kernel",
        _run_kernel,
        summary="instructions of REPORT, GET_DIRTY_BITMAP and type1's log",
        description="Count the instructions of the kernel's dirty bitmaps in the machine of\n"
        "'dmaproof passthrough', and project them to guests of 1, 4 and 16 TiB.",
        epilog=_EXAMPLES,
    )
    kernel.add_argument(
        "--kernel",
        choices=KERNELS,
        default=DEFAULT_KERNEL,
        help="kernel of the machine (default: %(default)s)",
    )
    kernel.add_argument(
        "--most",
        choices=[_short(size) for size in REPORT_SIZES],
        default=_short(REPORT_SIZES[-1]),
        help="the largest guest to measure (default: %(default)s)",
    )
    kernel.add_argument(
        "--qemu", metavar="PATH", help="the QEMU that runs the machine (default: the system's)"
    )
    kernel.add_argument(
        "--timeout",
        type=reads(seconds),
        default=1200.0,
        metavar="SECONDS",
        help="longest time for all measurements (default: %(default)g)",
    )
    for part in (iterator, core_parser):
        part.add_argument(
            "--repeats",
            type=reads(positive),
            default=5,
            metavar="N",
            help="how often to measure each (default: %(default)s)",
        )
    for part in (iterator, kernel):
        part.add_argument(
            "--picture",
            type=Path,
            metavar="FILE.png",
            help="draw the figures with matplotlib (default: no picture)",
        )
    for part in (iterator, core_parser, kernel):
        add_json(part, "the figures")


def _short(size: int) -> str:
    return size_name(size).replace(" ", "").removesuffix("iB")


def _run_iterator(arguments: argparse.Namespace) -> int:
    if arguments.picture is not None:
        _matplotlib()  # fails now, and not after minutes
    most = next(size for size in GUEST_SIZES if _short(size) == arguments.most)
    patterns = all_patterns(most)
    rows: list[Row] = []
    for row in measure(patterns, repeats=arguments.repeats):
        rows.append(row)
        print(
            f"{len(rows)}/{len(patterns)}: {row.pattern.locality}, {row.pattern.density:g}, "
            f"{size_name(row.pattern.guest_bytes)}",
            file=sys.stderr,
        )
    if arguments.json != "-":
        print(table(rows))
    if arguments.picture is not None:
        draw(rows, arguments.picture)
    if arguments.json:
        write_json([asdict(row) for row in rows], arguments.json)
    return 0


def _run_core(arguments: argparse.Namespace) -> int:
    ratios = []
    for ratio in core.measure(arguments.repeats):
        ratios.append({**asdict(ratio), "speed": ratio.speed, "reached": ratio.reached})
        if arguments.json != "-":
            print(
                f"{ratio.what:<44} {ratio.ours_s * 1e3:8.2f} ms, {ratio.speed:6.2f} x the speed of "
                f"{ratio.yardstick} (wanted: {ratio.wanted:.2f})",
                flush=True,
            )
    if arguments.json:
        write_json(ratios, arguments.json)
    return 0


def _run_kernel(arguments: argparse.Namespace) -> int:
    if arguments.picture is not None:
        _matplotlib()
    machine = l1(arguments.kernel)
    qemu = find_qemu(arguments.qemu, X86_64)
    most = next(size for size in REPORT_SIZES if _short(size) == arguments.most)
    cost = run_interruptibly(measure_kernel_cost(machine, qemu, most, arguments.timeout))
    if arguments.json != "-":
        print(tables.to_text(cost.rows, cost.fits, cost.projections, cost.nanoseconds))
    if arguments.picture is not None:
        tables.draw(_matplotlib(), cost.rows, cost.projections, arguments.picture)
    if arguments.json:
        write_json(cost.to_json(), arguments.json)
    return 0


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--picture needs matplotlib: pip install 'dmaproof[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw time over guest size: a column for each locality, a row for each density."""
    pyplot = _matplotlib()
    densities = [
        density for density in DENSITIES if any(r.pattern.density == density for r in rows)
    ]
    figure, axes = pyplot.subplots(
        len(densities), len(Locality), figsize=(12, 3 * len(densities)), sharex=True, squeeze=False
    )
    for line, density in zip(axes, densities, strict=True):
        for graph, locality in zip(line, Locality, strict=True):
            shown = [
                row
                for row in rows
                if row.pattern.density == density and row.pattern.locality == locality
            ]
            sizes = [row.pattern.guest_bytes for row in shown]
            for name in STRATEGIES:
                times = [row.costs[name].seconds * 1e3 for row in shown]
                style = "-" if name.startswith("dmaproof") else "--"
                graph.plot(sizes, times, style, marker="o", markersize=3, label=name)
            graph.set_xscale("log", base=2)
            graph.set_yscale("log")
            graph.set_xticks(sizes, [size_name(size) for size in sizes], rotation=30, fontsize=7)
            graph.set_title(f"{locality}, {density:g} of the pages dirty", fontsize=9)
            graph.grid(alpha=0.3)
        line[0].set_ylabel("ms a harvest")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
