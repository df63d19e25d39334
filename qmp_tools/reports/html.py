"""A report's JSON as one self-contained HTML page: no network, no script, no font.

Light and dark mode follow the reader's setting, and the page fits a phone. All numbers come from
the JSON, and the page shows nothing else. The templates in ``templates/`` contain the words and the
layout, with one template for each kind of outcome. jinja2 fills them in, and escapes the output of
guests and processes.
"""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..matrix.axes import NONE
from ..qemu.machine import MIB
from .html_charts import Json, ram_drawing, timeline
from .matrix_report import grid_of
from .report import HEADINGS, LINK_NAMES

if TYPE_CHECKING:
    from jinja2 import Environment

_STYLES: Final = {0: "pass", 1: "fail", 3: "untested"}
_VERDICT_ALONE: Final = "page.html.j2"


def to_html(answer: Json) -> str:
    """Render the page of an outcome.

    Args:
        answer: the JSON of a proof, a check or a matrix, or of one that could not be carried out.

    Returns:
        The page, an HTML document that refers to no other file.
    """
    code = answer["exit_code"]
    page = _environment().select_template([f"{answer['kind']}.html.j2", _VERDICT_ALONE])
    return page.render(answer=answer, heading=HEADINGS[code], style=_STYLES[code])


@cache
def _environment() -> Environment:
    """Return the environment of the templates, with the functions that they call."""
    # Imported late: most runs write no page, and L1, where proofs run too, has no jinja2.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "absent": NONE,
        "grid_of": grid_of,
        "links": LINK_NAMES,
        "ram_drawing": ram_drawing,
        "timeline": timeline,
    }
    environment.filters |= {
        "fixed": lambda value, digits: f"{value:.{digits}f}",
        "grouped": _grouped,
        "hex": hex,
        "mib": lambda size_bytes: size_bytes / MIB,
        "shell": shlex.join,
    }
    return environment


def _grouped(value: object) -> object:
    """Return whole numbers with thin spaces between thousands, and all other values unchanged."""
    return f"{value:,}".replace(",", "\u2009") if isinstance(value, int) else value
