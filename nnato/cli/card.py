"""`nnato mlsae card`."""

from __future__ import annotations

from pathlib import Path

import click

from nnato.cli import common


@common.command("card", keep=False)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--numbers", type=click.Path(path_type=Path), help="What nnato mlsae layers wrote with --out.  [default: if in FOLDER, that]")
@common.json_option
def card(folder: Path, numbers: Path | None, as_json: bool) -> None:
    """Write the model card README.md of the SAE in FOLDER, and list the files that belong on a hub. Nothing is sent.

    \b
    Example:
      nnato mlsae card mlsae/ --numbers layers/
    """
    from nnato.cards import write_card
    from nnato.dictionaries import load_dictionary

    found = write_card(folder, numbers)
    if as_json:
        common.print_json(dict(load_dictionary(folder).model), None, found.to_json())
        return
    for name, size in found.files.items():
        common.say(f"{size:>14,} bytes  {name}")
    if found.left:
        common.say(f"of no use to others: {', '.join(found.left)}")
    if found.local:
        common.say(f"cfg.json names paths of this machine: {', '.join(found.local)}")
    files = f"{len(found.files)} files of {found.path.parent} make a repository"
    common.say(f"{files}; nothing was sent. A licence is yours to add to the card.")
