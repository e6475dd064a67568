"""`nnato completion`."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from nnato.cli import common

SHELLS = ("bash", "zsh", "fish")


@common.command("completion", keep=False)
@click.argument("shell", required=False, type=click.Choice(SHELLS))
@common.json_option
def command(shell: str | None, as_json: bool) -> None:
    """Print what makes SHELL (by default the one of $SHELL) complete commands, options, choices and files.

    \b
    Examples:
      nnato completion bash >> ~/.bashrc
      nnato completion zsh >> ~/.zshrc
      nnato completion fish > ~/.config/fish/completions/nnato.fish
    """
    from nnato.cli import main
    from nnato.errors import NnatoError

    chosen = shell or Path(os.environ.get("SHELL", "")).name
    found = get_completion_class(chosen) if chosen in SHELLS else None
    if found is None:
        raise NnatoError(f"which shell? give one of {', '.join(SHELLS)}")
    source = found(main, {}, "nnato", "_NNATO_COMPLETE").source()
    if as_json:
        common.print_json({}, None, {"shell": chosen, "source": source})
        return
    click.echo(source)
