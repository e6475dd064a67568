"""The command line: one file per command, imported only when it runs. No mathematics here."""

from __future__ import annotations

from importlib import import_module

import click

from nnato import __version__
from nnato.errors import did_you_mean

COMMANDS = {
    "demo": "The whole method on the embedded model: moments, operators, ablation, figures.",
    "accumulate": "Stream text through a model once and keep moments of its residuals.",
    "merge": "Put shards of an accumulation together.",
    "fit": "Fit transport operators from moments and judge them on test documents.",
    "efficiency": "Compare operators of each rank with what any linear map could carry.",
    "features": "Which features of a sparse autoencoder are transported, which synthesised?",
    "scaling": "R² against training tokens, without reading text again.",
    "ablate": "Replace residuals by predictions and measure the loss.",
    "generate": "Continue a prompt with residuals replaced at every step.",
    "lens": "The tuned lens in closed form: fit, load, evaluate, export.",
    "mlsae": "One sparse autoencoder for all layers: train, import, and what it shows.",
    "sae": "Train a sparse autoencoder of one site.",
    "report": "One HTML page of the results in a folder.",
    "info": "Say what a file, a folder or a model is.",
    "completion": "Print what makes a shell complete nnato's commands and options.",
}
BEGIN = """\
nnato: which part of a residual stream is carried forward linearly?

To begin, on the embedded model and text (pip install 'nnato[demo]'):
  nnato demo                 the whole method in minutes; results in nnato-demo/
  nnato report nnato-demo    the same as one HTML page
  nnato generate "The Eiffel Tower is in" --transport 9:12

On your own model (a folder, a .gguf file or a hub id) and text:
  nnato accumulate MODEL --text FILE --out moments/
  nnato fit moments/ --out operators/
  nnato ablate --operator operators/9-12.safetensors

All commands: nnato --help; one of them: nnato COMMAND --help"""


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

    def resolve_command(self, context: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is asked for; of a name that is none, the nearest one is named."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            context.fail(f"no command {args[0]!r}{did_you_mean(args[0], COMMANDS)}; nnato --help lists all")
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in --help, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def all_commands() -> dict[str, click.Command]:
    """Every command by what is typed behind `nnato`, those of groups included; imports them all."""
    found: dict[str, click.Command] = {}
    for name in COMMANDS:
        command: click.Command = import_module(f"nnato.cli.{name}").command
        found |= {f"{name} {sub}": one for sub, one in command.commands.items()} if isinstance(command, click.Group) else {name: command}
    return found


@click.command(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nnato")
@click.pass_context
def main(context: click.Context) -> None:
    """Which part of a transformer's residual stream is carried forward linearly, and which is computed anew?

    Commands take the embedded model and text where none is named. To begin: nnato demo
    """
    if context.invoked_subcommand is None:
        click.echo(BEGIN)
