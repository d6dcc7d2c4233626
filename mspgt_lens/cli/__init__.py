"""The ``mspgt-lens`` command, one module per subcommand."""

from mspgt_lens.cli.command import main

__all__ = ["main"]
