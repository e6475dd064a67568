"""The command line: one file per command, imported only when it runs. No mathematics here."""

from __future__ import annotations

from importlib import import_module

import click

from nnato import __version__

COMMANDS = {
    "demo": "The whole method on the embedded model: moments, operators, ablation, figures.",
    "accumulate": "Stream text through a model once and keep moments of its residuals.",
    "fit": "Fit transport operators from moments and judge them on test documents.",
    "efficiency": "Compare operators of each rank with what any linear map could carry.",
    "features": "Which features of a sparse autoencoder are transported, which synthesised?",
    "scaling": "R² against training tokens, without reading text again.",
    "ablate": "Replace residuals by predictions and measure the loss.",
    "generate": "Continue a prompt with residuals replaced at every step.",
    "info": "Say what a file, a folder or a model is.",
}


class LazyGroup(click.Group):
    """Knows its commands by name, and imports the file of one only when it is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names, in the order to try them in."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command's object."""
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"nnato.cli.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in --help, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nnato")
def main() -> None:
    """Which part of a transformer's residual stream is carried forward linearly, and which is computed anew?

    Every command works without arguments, on the embedded model and text. To begin: nnato demo
    """
