"""`nnato fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato.cli import common, tables

if TYPE_CHECKING:
    from nnato.fitting import Fit
    from nnato.selection import Method


@common.command("fit")
@click.argument("moments", required=False, type=click.Path(path_type=Path))
@common.pair_options
@click.option("--grid", "whole", is_flag=True, help="All pairs that the moments hold (the default).")
@common.metric_option
@click.option(
    "--select",
    type=click.Choice(["validation", "kfold", "gcv"]),
    help="What chooses the penalty: validation documents, folds of training documents, or GCV.  [default: validation]",
)
@click.option("--penalty", type=click.Choice(["ridge", "lasso", "elastic-net"]), help="[default: ridge]")
@click.option("--standardize", is_flag=True, help="Divide every coordinate by its standard deviation first.")
@click.option("--shrink-to", type=click.Choice(["zero", "identity"]), help="What a large penalty leaves of the operator.  [default: zero]")
@click.option("--rank", type=int, help="Rank of the operator (of its difference from the identity, if it is shrunk to that).")
@click.option("--preset", type=click.Choice(["paper"]), help="The choices of the paper, instead of the options above from --metric on.")
@click.option("--compose", is_flag=True, help="Compare each operator with two in a row that lead to the same target.")
@click.option(
    "--use-tokens",
    type=click.Choice(["ordinary", "all"]),
    default="ordinary",
    show_default=True,
    help="all: special tokens, first positions and sinks take part.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the operators, numbers (JSON, CSV) and a heat map.")
@common.json_option
def command(
    moments: Path | None,
    pairs: str | None,
    source: str | None,
    leap: str | None,
    whole: bool,
    metric: str | None,
    select: str | None,
    penalty: str | None,
    standardize: bool,
    shrink_to: str | None,
    rank: int | None,
    preset: str | None,
    compose: bool,
    use_tokens: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Fit operators from MOMENTS (a folder of nnato accumulate; by default the embedded model's, cached).

    The penalty is chosen on validation documents or by folds of training documents; every R² shown is of test documents.

    \b
    Examples:
      nnato fit moments/ --pairs 5:10 --out operators/
      nnato fit moments/ --source 5 --leap 1-8 --select kfold
    """
    from nnato.errors import SiteError
    from nnato.fitting import fit, operator_file
    from nnato.selection import PAPER_NOTE

    method = _method(preset, metric=metric, select=select, penalty=penalty, standardize=standardize, shrink_to=shrink_to, rank=rank)
    if whole and (pairs or source or leap):
        raise SiteError("--grid means all pairs: give it alone")
    folder = common.output_folder(out)
    if preset is not None:
        common.note(PAPER_NOTE)
    with common.progress_bar() as progress:
        accumulated = common.open_moments(moments, progress)
        chosen = common.accumulated_pairs(accumulated, pairs, source, leap)
        fits = fit(accumulated, chosen, method=method, tokens=use_tokens, compositions=compose, progress=progress)
    results: list[dict[str, Any]] = [result.to_json() for result in fits]
    written: list[str] = []
    if folder is not None:
        from nnato.plots import r2_heat_maps

        written = [str(result.operator.save(operator_file(folder, result.operator.pair))) for result in fits]
        r2_heat_maps(fits, folder / "r2.png", method.metric, common.about(accumulated.model, accumulated.text))
        common.write_json(folder / "fit.json", results)
        common.write_csv(folder / "fit.csv", [row for result in fits for row in _rows(result)])
    if as_json:
        common.print_json(accumulated.model, accumulated.text, results)
        return
    tables.show_accumulated(accumulated)
    tables.show_fits(fits, method.metric)
    if written:
        common.say(f"{len(fits)} operators, r2.png, fit.json and fit.csv in {out}. Next: nnato ablate --operator {written[0]}")


def _method(preset: str | None, **options: Any) -> Method:
    """The method that the options describe."""
    from nnato.errors import MomentsError
    from nnato.selection import Method

    given = {name: value for name, value in options.items() if value not in (None, False)}
    if preset is None:
        return Method(**given)
    if given:
        name = next(iter(given)).replace("_", "-")
        raise MomentsError(f"--preset {preset} fixes --{name}: give one of them")
    return Method.paper()


def _rows(result: Fit) -> list[dict[str, Any]]:
    """The rows of the CSV file: one for each map and metric."""
    pair = {"source": result.operator.source, "target": result.operator.target}
    rows = [
        {**pair, "map": "transport", "metric": metric, "r2": interval.value, "low": interval.low, "high": interval.high}
        for metric, interval in result.r2_intervals.items()
    ]
    for name, scores in result.baselines.items():
        rows += [{**pair, "map": name, "metric": metric, "r2": value, "low": None, "high": None} for metric, value in scores.items()]
    return rows
