"""A page for every command from its own help, so that the documents cannot say anything else."""

import click
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from nnato.cli import all_commands


class CommandHelp(SphinxDirective):
    """`command-help`: a section for each command with what `nnato COMMAND --help` prints at 80 columns."""

    def run(self):
        """Make the sections."""
        found = []
        for name, command in all_commands().items():
            context = click.Context(command, info_name=f"nnato {name}", terminal_width=80)
            section = nodes.section(ids=[f"nnato-{name.replace(' ', '-')}"])
            section += nodes.title(text=f"nnato {name}")
            section += nodes.literal_block(text=command.get_help(context), language="text")
            found.append(section)
        return found


def setup(app):
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
