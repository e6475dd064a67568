"""What `nnato sae train` and `nnato mlsae train` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato.cli import common
from nnato.cli.tables import new_table

if TYPE_CHECKING:
    from nnato.sae_training import Recipe, Trained

layers_options = common.options(
    click.argument("model", required=False),
    click.option("--layers", default="all", show_default=True, help="all, or a list such as 3,9,15."),
    click.option("--lens", type=click.Path(path_type=Path), help="A lens that carries residuals to the last layer first (nnato lens fit)."),
)
size_options = common.options(
    click.option("--expansion", type=int, default=16, show_default=True, help="Latents per dimension of the residual stream."),
    click.option("-k", "k", type=int, default=32, show_default=True, help="Active latents."),
)
course_options = common.options(
    click.option("--kind", type=click.Choice(["topk", "batchtopk"]), default="topk", show_default=True, help="Batchtopk: k on average."),
    click.option("--rows", type=int, default=4096, show_default=True, help="Rows (token, layer) of a step."),
    click.option("--buffer", type=int, default=65_536, show_default=True, help="Rows that are shuffled together."),
    click.option("--lr", type=float, help="Learning rate.  [default: 2e-4 / sqrt(latents / 16384)]"),
    click.option("--dead-tokens", type=int, help="Silent for so many tokens is dead.  [default: a tenth, at most 10 million]"),
    click.option("--seed", type=int, default=0, show_default=True),
)
recipe_options = common.options(size_options, course_options)
text_options = common.options(
    click.option("--text", help="A .txt or .jsonl file, a folder of .txt files, or a datasets id.  [default: python-docs, embedded]"),
    click.option("--tokens", type=int, default=1_000_000, show_default=True, help="Train on so many; short text is read again."),
    click.option("--context", type=int, help="Tokens of a sequence.  [default: 256]"),
    click.option("--per-document", type=int, help="At most so many sequences of one document; 0: all.  [default: 8]"),
    click.option("--column", help="Text field of .jsonl files and data sets.  [default: text]"),
)
TEXT = ("text", "context", "per_document", "column")
"""Those of them that describe the text."""


def run(
    model: str | None,
    sites: str | None,
    recipe: Recipe,
    out: Path,
    *,
    lens: Path | None,
    device: str | None,
    dtype: str,
    batch_size: int,
    text: dict[str, Any],
) -> Trained:
    """Load everything and train."""
    from nnato.lens import Lens
    from nnato.models import describe
    from nnato.sae_training import default_corpus, train_sae
    from nnato.sites import parse_sites

    common.new_folder(out)
    loaded_lens = None if lens is None else Lens.load(lens)
    with common.progress_bar() as progress:
        loaded = common.load(model, device, dtype, progress)
        return train_sae(
            loaded,
            None if sites is None else parse_sites(sites, describe(loaded).blocks),
            recipe,
            out=out,
            corpus=common.make_corpus(default_corpus(recipe), **text),
            lens=loaded_lens,
            batch_size=batch_size,
            progress=progress,
        )


def show(trained: Trained, recipe: Recipe, following: str, as_json: bool) -> None:
    """What came out, by layer."""
    record = {
        "path": str(trained.path),
        "sites": [site.key for site in trained.sites],
        "latents": recipe.expansion * trained.model["d_model"],
        "epochs": trained.epochs,
        "history": trained.history,
    }
    if as_json:
        common.print_json(trained.model, trained.text, record, recipe.seed)
        return
    first, last = trained.history[0], trained.history[-1]
    title = "Share of variance left out, of tokens just before the SAE is trained on them"
    table = new_table(title, ("site", "at the beginning", "at the end"))
    for site in trained.sites:
        table.add_row(str(site), f"{first['fvu'][str(site)]:.3f}", f"{last['fvu'][str(site)]:.3f}")
    common.console().print(table)
    again = f"; the text was begun {trained.epochs} times" if trained.epochs > 1 else ""
    common.say(f"{record['latents']:,} latents in {trained.path}, {last['dead']:.1%} dead{again}. Next: {following}")
