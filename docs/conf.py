"""Configure Sphinx; ``sphinx-build -W docs build/docs`` builds the pages."""

from __future__ import annotations

from importlib import metadata

project = "dmaproof"
copyright = "the authors of dmaproof"
release = metadata.version("dmaproof")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_argparse_cli",
    "sphinx_copybutton",
]
default_role = "code"
html_theme = "furo"
html_title = "dmaproof"
html_extra_path = ["report.schema.json"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
highlight_language = "none"
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

suppress_warnings = ["ref.python"]  # `bytes` is a type, and also an attribute of two classes
toc_object_entries = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
