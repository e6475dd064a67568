"""`nnato mlsae steer`."""

from __future__ import annotations

from typing import Any

import click

from nnato.cli import common
from nnato.cli.opening import Opened, sae_options
from nnato.cli.tables import new_table


@common.command("steer")
@sae_options
@click.argument("prompt", required=False)
@click.option("--latent", type=int, required=True, help="Which latent is added.")
@click.option("--layer", required=True, help="At which of its layers.")
@click.option("--factor", type=float, default=10.0, show_default=True, help="How much of it, as an activation; negative to take away.")
@click.option("--positions", type=click.Choice(["last", "all"]), default="last", show_default=True, help="Tokens; all: but the first.")
@click.option("--count", type=click.IntRange(min=1), default=10, show_default=True, help="Tokens shown.")
@common.json_option
def steer(as_json: bool, prompt: str | None, latent: int, layer: str, factor: float, positions: str, count: int, **options: Any) -> None:
    """What comes next behind PROMPT: as it is, with a layer replaced by its reconstruction by SAE, and with a latent added there.

    A latent adds its decoder row times --factor, and where the SAE standardises, times the token's standard deviation. Behind a lens, the
    way back to the residual stream is fitted to the text first.

    \b
    Examples:
      nnato mlsae steer mlsae/ "The Eiffel Tower is in" --latent 17 --layer 9
      nnato mlsae steer mlsae/ --latent 17 --layer 0 --factor -20 --positions all
    """
    from rich.text import Text

    from nnato.fidelity import backward_maps
    from nnato.prompts import EXAMPLE
    from nnato.steering import RUNS, steer

    with common.progress_bar() as progress:
        opened = Opened(options, progress)
        back = None
        if opened.sae.lens is not None:
            maps = backward_maps(opened.model, opened.sae, opened.blocks(), progress=progress)
            back = {site: one.map for site, one in maps.items()}
        text = EXAMPLE if prompt is None else prompt
        found = steer(opened.model, opened.sae, text, latent, layer, factor=factor, positions=positions, back=back)
    record = found.to_json(opened.model.tokenizer, count)
    if as_json:
        opened.print_json(None, record)
        return
    common.say(found.prompt)
    title = f"Next token; latent {latent}, layer {found.site}, factor {factor:g}"
    table = new_table(title, (*RUNS, "raised most, nats"))
    for column in table.columns:
        column.justify, column.no_wrap = "left", False  # a token may be as long as it likes
    columns = [[f"{one['probability']:.3f} {one['token']!r}" for one in record["top"][run]] for run in RUNS]
    columns.append([f"{one['log_probability']:+.2f} {one['token']!r}" for one in record["raised"]])
    for row in zip(*columns, strict=True):
        table.add_row(*map(Text, row))
    common.console().print(table)
    kl = record["kl"]
    common.say(f"KL(model ‖ …) of the next token: reconstruction {kl['reconstruction']:.3f}, steered {kl['steered']:.3f} nats")
