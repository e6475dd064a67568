"""`nnato scaling`."""

from __future__ import annotations

from pathlib import Path

import click

from nnato.cli import common, tables


@common.command("scaling")
@click.argument("moments", required=False, type=click.Path(path_type=Path))
@common.pair_options
@common.metric_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder for numbers (JSON, CSV) and the figure.")
@common.json_option
def command(
    moments: Path | None, pairs: str | None, source: str | None, leap: str | None, metric: str | None, out: Path | None, as_json: bool
) -> None:
    """R² against training tokens, from the folds of MOMENTS (by default the embedded model's, cached): no text is read again.

    \b
    Example:
      nnato scaling moments/ --pairs 5:10
    """
    from nnato.scaling import scaling_study
    from nnato.selection import Method

    method = Method() if metric is None else Method(metric=metric)
    folder = common.output_folder(out)
    with common.progress_bar() as progress:
        accumulated = common.open_moments(moments, progress)
        chosen = common.accumulated_pairs(accumulated, pairs, source, leap)
        results = scaling_study(accumulated, chosen, method=method, progress=progress)
    record = [result.to_json() for result in results]
    if folder is not None:
        from nnato.plots import scaling_curves

        common.write_json(folder / "scaling.json", record)
        rows = [
            {
                "source": result.pair[0],
                "target": result.pair[1],
                "tokens": point.tokens,
                "metric": name,
                "r2": interval.value,
                "low": interval.low,
                "high": interval.high,
            }
            for result in results
            for point in result.points
            for name, interval in point.r2.items()
        ]
        common.write_csv(folder / "scaling.csv", rows)
        scaling_curves(results, folder / "scaling.png", method.metric, common.about(accumulated.model, accumulated.text))
    if as_json:
        common.print_json(accumulated.model, accumulated.text, record)
        return
    tables.show_accumulated(accumulated)
    tables.show_scalings(results, method.metric)
    if out is not None:
        common.say(f"scaling.json, scaling.csv and scaling.png in {out}")
