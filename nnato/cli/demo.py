"""`nnato demo`."""

from __future__ import annotations

from pathlib import Path

import click

from nnato.cli import common, tables

SEQUENCES = 16
METRIC = "variance_weighted"


@common.command("demo")
@click.option("--model", help="Embedded name, folder, .gguf file or hub id.  [default: the embedded model]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("nnato-demo"),
    show_default=True,
    help="Folder for figures and results.",
)
@common.model_options
@common.json_option
def command(model: str | None, out: Path, device: str | None, dtype: str, as_json: bool) -> None:
    """The whole method on a real model, in a few minutes on two cores.

    One pass over text accumulates moments; operators are fitted for a grid of (source, target) pairs and judged on held-out documents; then
    residuals at five positions of each sequence are replaced by predictions, and the loss says whether they were good enough for the model.

    \b
    Examples:
      nnato demo
      nnato demo --model smollm2 --out demo-smollm2/
    """
    from nnato.accumulation import accumulate_cached, default_corpus, default_pairs_of, tokenize
    from nnato.fitting import fit
    from nnato.models import describe
    from nnato.perplexity import ablate, choose_sequences
    from nnato.plots import ablation_bars, r2_heat_maps
    from nnato.sites import default_pairs

    folder = common.output_folder(out)
    with common.progress_bar() as progress:
        loaded = common.load(model, device, dtype, progress)
        info = describe(loaded)
        blocks = tokenize(loaded, default_corpus(info), progress)
        choose_sequences(blocks, SEQUENCES)
        common.announce_moments(loaded, default_pairs_of(info), blocks.fingerprint["folds"])
        accumulated = accumulate_cached(loaded, blocks, progress=progress)
        fits = fit(accumulated, metric=METRIC, progress=progress)
        chosen = default_pairs(info.blocks)
        operators = [result.operator for result in fits if result.operator.pair in chosen]
        results = ablate(loaded, operators, blocks, positions=5, sequences=SEQUENCES, progress=progress)
        progress("drawing", 0, 1)
        about = common.about(accumulated.model, accumulated.text)
        figures = [
            r2_heat_maps(fits, folder / "r2.png", METRIC, about),
            ablation_bars(results, folder / "ablation.png", about),
        ]
        record = {"fit": [result.to_json() for result in fits], "ablate": [result.to_json() for result in results]}
        common.write_json(folder / "results.json", record)
        progress("drawing", 1, 1)
    if as_json:
        common.print_json(accumulated.model, accumulated.text, record)
        return
    tables.show_accumulated(accumulated)
    tables.show_fits(fits, METRIC)
    tables.show_ablations(results)
    common.say(f"Figures: {', '.join(map(str, figures))}; numbers: {folder / 'results.json'}. Next: nnato report {out}")
