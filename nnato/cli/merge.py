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
    """Put SHARDS together: all folders that `nnato accumulate --shard i/n`, or `nnato mlsae layers --shard i/n`, wrote, in any order.

    The result is what one run over the whole text gives, to 15 digits. Nothing is left out and nothing is counted twice: missing, double,
    unfinished and foreign shards are refused.

    \b
    Examples:
      nnato merge shards/* --out moments/
      nnato merge layer-shards/* --out layers/    # then nnato mlsae layers
    """
    from nnato.merging import merge_shards
    from nnato.multilayer import FILE

    if (shards[0].expanduser() / FILE).is_file():
        _merge_layers(shards, out, as_json)
        return
    with common.progress_bar() as progress:
        result = merge_shards(shards, out, progress=progress)
    tables.finish_accumulation(result, out, as_json)


def _merge_layers(shards: tuple[Path, ...], out: Path, as_json: bool) -> None:
    from nnato.layer_merging import merge_layer_shards
    from nnato.storage import read_metadata

    with common.progress_bar() as progress:
        file = merge_layer_shards(shards, out, progress)
    metadata = read_metadata(file)
    tokens = sum(metadata["tokens"].values())
    if as_json:
        common.print_json(metadata["model"], metadata["text"], {"path": str(file), "tokens": tokens, "shards": len(shards)})
        return
    common.say(f"layer statistics of {tokens:,} tokens from {len(shards)} shards in {file}. Next: nnato mlsae layers, with --out {out}")
