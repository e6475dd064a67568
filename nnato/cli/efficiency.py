"""`nnato efficiency`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnato.cli import common, tables


@common.command("efficiency")
@click.argument("moments", required=False, type=click.Path(path_type=Path))
@click.option("--pairs", help="source:target[,…], for example 9:12,12:17.")
@click.option("--target", help="A target site; all its sources, or those of --leap.")
@click.option("--leap", help="Leaps before --target, for example 1-8 or 1,3,7,10.")
@click.option("--ranks", help="Ranks of the curve, for example 1,10,100.  [default: some two dozen]")
@click.option("--preset", type=click.Choice(["paper"]), help="The protocol of the paper instead.")
@click.option("--force", is_flag=True, help="Go on with fewer than 5 effective tokens per dimension.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for numbers (JSON, CSV) and figures.")
@common.json_option
def command(
    moments: Path | None,
    pairs: str | None,
    target: str | None,
    leap: str | None,
    ranks: str | None,
    preset: str | None,
    force: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """How much of what any linear map could carry do operators of each rank carry? From MOMENTS (by default the embedded model's, cached).

    Ceilings from canonical correlations, corrected for noise; size of the Linear Transport Subspace; efficiency of each rank.

    \b
    Examples:
      nnato efficiency moments/ --target 10 --leap 1,3,7,10
      nnato efficiency moments/ --target 10 --leap 1,3,7,10 --preset paper
    """
    from nnato.efficiency import PAPER_NOTE, paper_efficiencies, transport_efficiency
    from nnato.errors import SiteError
    from nnato.sites import parse_pairs

    chosen_ranks = common.parse_ranks(ranks)
    if pairs is not None and (target is not None or leap is not None):
        raise SiteError("give --pairs, or --target with --leap, not both")
    folder = common.output_folder(out)
    if preset is not None:
        common.note(PAPER_NOTE)
    with common.progress_bar() as progress:
        accumulated = common.open_moments(moments, progress)
        if pairs is not None:
            chosen = parse_pairs(pairs, accumulated.model["blocks"])
        else:
            chosen = common.pairs_to_target(accumulated, target, leap) or accumulated.moments.pairs
        papers, ours = [], []
        if preset is not None:
            papers = paper_efficiencies(accumulated, chosen, ranks=chosen_ranks, progress=progress)
        else:
            ours = transport_efficiency(accumulated, chosen, ranks=chosen_ranks, force=force, progress=progress)
    record = [result.to_json() for result in ours or papers]
    if folder is not None:
        from nnato import plots

        about = common.about(accumulated.model, accumulated.text)
        common.write_json(folder / "efficiency.json", record)
        common.write_csv(folder / "efficiency.csv", [_row(entry, point) for entry in record for point in entry["efficiency"]])
        if papers:
            plots.paper_efficiency_curves(papers, folder / "efficiency.png", about)
        else:
            plots.efficiency_curves(ours, folder / "efficiency.png", about)
            plots.correlation_spectra(ours, folder / "spectra.png", about)
            plots.subspace_bars(ours, folder / "subspace.png", about)
    if as_json:
        common.print_json(accumulated.model, accumulated.text, record)
        return
    tables.show_accumulated(accumulated)
    if papers:
        tables.show_paper_efficiencies(papers)
    else:
        tables.show_efficiencies(ours)
    if out is not None:
        common.say(f"efficiency.json, efficiency.csv and figures in {out}")


def _row(entry: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV file: one rank of one pair."""
    r2 = point["r2"]
    return {
        "source": entry["source"],
        "target": entry["target"],
        "rank": point["rank"],
        "efficiency": point["value"],
        "low": point["low"],
        "high": point["high"],
        "r2": r2["value"] if isinstance(r2, dict) else r2,
        **{f"ceiling_{name}": value for name, value in point["ceiling"].items()},
    }
