"""The subcommands of ``dmaproof``: one module for each, named after it.

A module has `add_arguments(parser)`, which fills the subcommand's parser and sets its default
``run``: a function that takes the parsed arguments and returns the exit code. `qmp_tools.cli.main`
has the names and summaries of all subcommands, and imports a module only when it is chosen.
"""
