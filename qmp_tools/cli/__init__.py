"""The subcommands of ``dmaproof``, one module each, under the subcommand's own name.

A module has `add(commands)`, which adds its parser to the tool's; the parser's default ``run`` is a
function from the parsed arguments to the exit code. `qmp_tools.cli.main` lists the modules.
"""
