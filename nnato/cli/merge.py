"""`nnato merge`."""

from __future__ import annotations

from pathlib import Path

import click

from nnato.cli import common, tables


@common.command("merge")
@click.argument("shards", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("moments"), show_default=True, help="Folder for the result.")
@common.json_option
def command(shards: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Put SHARDS together: all folders that `nnato accumulate --shard i/n` wrote, in any order.

    The result is what one run over the whole text gives, to 15 digits. Nothing is left out and nothing is counted twice: missing, double,
    unfinished and foreign shards are refused.

    \b
    Examples:
      nnato merge shards/* --out moments/
    """
    from nnato.merging import merge_shards

    with common.progress_bar() as progress:
        result = merge_shards(shards, out, progress=progress)
    tables.finish_accumulation(result, out, as_json)
