"""`nnato mlsae sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnato.cli import common, training
from nnato.cli.tables import new_table


@common.command("sweep")
@training.layers_options
@click.option("--expansions", default="8,16", show_default=True, help="Latents per dimension, of each SAE.")
@click.option("--ks", default="16,32", show_default=True, help="Active latents, of each SAE.")
@training.course_options
@training.text_options
@common.batch_option
@common.model_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("sweep"), show_default=True, help="Folder for all SAEs and sweep.csv.")
@common.json_option
def sweep(
    model: str | None,
    expansions: str,
    ks: str,
    layers: str,
    lens: Path | None,
    device: str | None,
    dtype: str,
    batch_size: int,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Train SAEs of several sizes on all layers of MODEL, and compare how far their latents spread over layers in test documents.

    Each SAE has a folder in --out, and a row in sweep.csv. Interrupted or killed, the same command goes on where it was.

    \b
    Examples:
      nnato mlsae sweep --expansions 2,4 --ks 16,32 --tokens 60000 --lr 1e-3
      nnato mlsae sweep smollm2 --expansions 1,2,4,8 --ks 32 --out sweep/
    """
    from nnato.accumulation import tokenize
    from nnato.lens import Lens
    from nnato.models import describe
    from nnato.sae_training import Recipe, default_corpus
    from nnato.sites import parse_sites
    from nnato.sweep import sweep

    text = {name: options.pop(name) for name in training.TEXT}
    sizes, active = common.parse_ranks(expansions, "--expansions") or (), common.parse_ranks(ks, "--ks") or ()
    recipe, folder = Recipe(**options), common.output_folder(out)
    carried = None if lens is None else Lens.load(lens)
    rows: list[dict[str, Any]] = []
    with common.progress_bar() as progress:
        loaded = common.load(model, device, dtype, progress)
        blocks = tokenize(loaded, common.make_corpus(default_corpus(recipe), **text), progress)
        how: dict[str, Any] = {"sites": parse_sites(layers, describe(loaded).blocks), "corpus": blocks, "lens": carried}
        for row in sweep(loaded, sizes, active, recipe, out=folder, batch_size=batch_size, progress=progress, **how):
            rows.append(row)
            common.write_csv(folder / "sweep.csv", rows)  # what is done can be read while the rest is trained
    if as_json:
        common.print_json(describe(loaded).fingerprint(), blocks.fingerprint, rows, recipe.seed)
        return
    _show(rows, out)


def _show(rows: list[dict[str, Any]], out: Path) -> None:
    columns = ("expansion", "k", "left out", "dead", "spread ± s.e.", "aggregated / single")
    table = new_table("Spread of a latent's layer, over the number of layers, by size", columns)
    for row in rows:
        table.add_row(
            str(row["expansion"]),
            str(row["k"]),
            f"{row['fvu']:.3f}",
            f"{row['dead']:.1%}",
            f"{row['rel_mean']:.3f} ± {row['rel_sem']:.3f}",
            f"{row['ratio']:.2f}",
        )
    common.console().print(table)
    common.say(f"sweep.csv and {len(rows)} SAEs in {out}")
