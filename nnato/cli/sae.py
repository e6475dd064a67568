"""`nnato sae`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnato.cli import common, training
from nnato.cli.running import Group


@click.group("sae", cls=Group)
def command() -> None:
    """Sparse autoencoders of one site."""


@common.command("train")
@click.argument("model", required=False)
@click.option("--site", required=True, help="The block behind which it is trained, or embed.")
@click.option("--scale", type=click.Choice(["mean", "token", "none"]), default="mean", show_default=True, help="How inputs are scaled.")
@training.recipe_options
@training.text_options
@common.batch_option
@common.model_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("sae"), show_default=True, help="Folder for the result.")
@common.json_option
def _train(model: str | None, site: str, device: str | None, dtype: str, batch_size: int, out: Path, as_json: bool, **options: Any) -> None:
    """Train an SAE on the residual stream of MODEL at one site, through sae_lens and in its format.

    Interrupted or killed, the same command goes on from the last checkpoint, to the same bits.

    \b
    Examples:
      nnato sae train --site 9 --expansion 8 --tokens 200000 --out sae-9/
    """
    from nnato.sae_training import Recipe

    text = {name: options.pop(name) for name in training.TEXT}
    recipe = Recipe(**options)
    trained = training.run(model, site, recipe, out, lens=None, device=device, dtype=dtype, batch_size=batch_size, text=text)
    following = f"nnato features evaluate MOMENTS --target {site} --sae {out}, MOMENTS of this model with pairs to {site}"
    if model is None:
        following += "; without, those of the embedded model and text, cached"
    training.show(trained, recipe, following, as_json)


command.add_command(_train)
