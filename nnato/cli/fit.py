"""`nnato fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnato.cli import common


@common.command("fit")
@click.argument("moments", required=False, type=click.Path(path_type=Path))
@common.pair_options
@click.option("--grid", "whole", is_flag=True, help="All pairs that the moments hold (the default).")
@click.option(
    "--metric",
    type=click.Choice(["variance_weighted", "uniform", "whitened"]),
    default="variance_weighted",
    show_default=True,
    help="The R² that chooses the penalty, and is shown.",
)
@click.option(
    "--use-tokens",
    type=click.Choice(["ordinary", "all"]),
    default="ordinary",
    show_default=True,
    help="all: special tokens, first positions and sinks take part.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the operators, and a heat map.")
@common.json_option
def command(
    moments: Path | None,
    pairs: str | None,
    source: str | None,
    leap: str | None,
    whole: bool,
    metric: str,
    use_tokens: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Fit ridge operators from MOMENTS (a folder of nnato accumulate; by default the embedded model's, cached).

    The penalty is chosen on validation documents; every R² shown is of test documents.

    \b
    Examples:
      nnato fit moments/ --pairs 5:10 --out operators/
      nnato fit moments/ --source 5 --leap 1-8
    """
    from nnato.accumulation import accumulate_cached, load_moments
    from nnato.errors import SiteError
    from nnato.fitting import fit, operator_file
    from nnato.storage import prepare_folder

    if whole and (pairs or source or leap):
        raise SiteError("--grid means all pairs: give it alone")
    if out is not None:
        prepare_folder(out.expanduser())
    with common.progress_bar() as progress:
        if moments is not None:
            accumulated = load_moments(moments)
        else:
            accumulated = accumulate_cached(common.load(None, None, "float32", progress), progress=progress)
        chosen = common.parse_pair_options(pairs, source, leap, accumulated.model["blocks"])
        if source is not None and chosen is not None:  # of all leaps asked for, those that were accumulated
            chosen = tuple(pair for pair in chosen if pair in accumulated.moments.pairs) or chosen
        fits = fit(accumulated, chosen, metric=metric, tokens=use_tokens, progress=progress)
    written: list[str] = []
    if out is not None:
        folder = out.expanduser()
        written = [str(result.operator.save(operator_file(folder, result.operator.pair))) for result in fits]
        from nnato.plots import r2_heat_maps

        written.append(str(r2_heat_maps(fits, folder / "r2.png", metric, common.about(accumulated.model, accumulated.text))))
    if as_json:
        results: list[dict[str, Any]] = [result.to_json() for result in fits]
        common.print_json(accumulated.model, accumulated.text, results)
        return
    common.show_accumulated(accumulated)
    common.show_fits(fits, metric)
    if written:
        common.say(f"{len(fits)} operators and r2.png in {out}. Next: nnato ablate --operator {written[0]}")
