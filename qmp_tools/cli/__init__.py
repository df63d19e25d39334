"""The subcommands of ``dmaproof``, one module each, under the subcommand's own name.

A module has `add_arguments(parser)`, which fills the subcommand's parser; the parser's default
``run`` is a function from the parsed arguments to the exit code. `qmp_tools.cli.main` has the names
and summaries of the subcommands, and imports a module only when it is chosen.
"""
