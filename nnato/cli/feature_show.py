"""`nnato features show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nnato.cli import common
from nnato.cli.tables import new_table, with_error

if TYPE_CHECKING:
    from nnato.feature_page import Feature


@common.command("show")
@click.argument("feature")
@click.argument("moments", required=False, type=click.Path(path_type=Path))
@common.sae_option
@click.option("--leap", help="Leaps before the site, for example 1-8.  [default: all sources that the moments hold]")
@click.option("--examples", type=int, default=8, show_default=True, help="Contexts to show.")
@click.option("--force", is_flag=True, help="Go on with fewer than 5 effective tokens per dimension.")
@common.device_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder for a page (HTML) and its numbers (JSON).")
@common.json_option
def show(
    feature: str,
    moments: Path | None,
    sae: str,
    leap: str | None,
    examples: int,
    force: bool,
    device: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """All about one FEATURE, written as site:latent: R² by leap, ceiling, verdict, where it is active, its link.

    From MOMENTS (by default the embedded model's, cached) and one more pass over their test documents.

    \b
    Examples:
      nnato features show 9:1234 --sae sae-9/ --out feature/
    """
    from nnato.cli.features import opened
    from nnato.dictionaries import load_dictionary
    from nnato.errors import DictionaryError
    from nnato.feature_page import describe_feature, write_feature_page

    site, colon, number = feature.rpartition(":")
    if not colon or not site or not (number.isascii() and number.isdecimal() and len(number) < 10):
        raise DictionaryError(f"feature {feature!r}: write site:latent, for example 9:1234")
    folder = common.output_folder(out)
    dictionary = load_dictionary(sae)
    with common.progress_bar() as progress:
        accumulated = common.open_moments(moments, progress)
        pairs = common.pairs_to_target(accumulated, site, leap) or ()
        dictionary.check_fits(accumulated.model, pairs[0][1])
        seen = opened(accumulated, device, progress)
        found = describe_feature(*seen, accumulated, dictionary, int(number), pairs, examples=examples, force=force, progress=progress)
    name = f"feature-{found.site}-{found.latent}"
    if folder is not None:
        common.write_json(folder / f"{name}.json", found.to_json())
        write_feature_page(found, folder / f"{name}.html")
    if as_json:
        common.print_json(accumulated.model, accumulated.text, found.to_json())
        return
    show_feature(found)
    if out is not None:
        common.say(f"{name}.html and {name}.json in {out}")


def show_feature(found: Feature) -> None:
    """Table of a feature's scores by source, and the contexts in which it is most active."""
    from rich.text import Text

    from nnato.feature_page import shown
    from nnato.intervals import Interval

    title = f"Feature {found.latent} at {found.site}, active in {found.rate:.3%} of test tokens"
    table = new_table(title, ("from", "R²", "ceil.", "+shift", "act. R²", "F. R²", "AUC", "verdict"))
    for row in found.rows:
        active = row["active"]
        scores = (None,) * 3 if active is None else (active["r2"]["value"], active["latent_r2"], active["auc"])
        beside = (row["ceiling"]["value"], row["r2"]["identity_shift"]["value"], *scores)
        r2 = with_error(Interval(**row["r2"]["transport"]))
        table.add_row(str(row["source"]), r2, *(shown(value, 2) for value in beside), row["verdict"])
    common.console().print(table)
    if found.reason:
        common.say(f"No scores of active tokens: {found.reason}.")
    for one in found.examples:
        line = Text(f"{one.activation:8.2f}  ")
        for place, token in enumerate(one.tokens):
            line.append(token.replace("\n", "⏎"), style="bold reverse" if place == one.at else "")
        common.console().print(line, soft_wrap=True, highlight=False)
    if found.link is not None:
        common.say(found.link)
    notes = (
        "± is a 95 % interval over documents; act. R²: of active tokens; F. R²: of the feature's activation; "
        "the verdict is this feature's own."
    )
    common.console().print(notes, style="dim", highlight=False)
