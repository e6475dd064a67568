"""`nnato mlsae`."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import click

from nnato.cli import card, common, remotely, serving, steering, sweeping, training
from nnato.cli.opening import Opened, out_option, reading_options, sae_options
from nnato.cli.running import Group
from nnato.cli.tables import new_table


@click.group("mlsae", cls=Group)
def command() -> None:
    """Multi-layer sparse autoencoders: one dictionary for all layers (arXiv 2409.04185)."""


@common.command("train")
@training.layers_options
@training.recipe_options
@training.text_options
@common.batch_option
@common.model_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("mlsae"), show_default=True, help="Folder for the result.")
@common.json_option
def _train(
    model: str | None,
    layers: str,
    lens: Path | None,
    device: str | None,
    dtype: str,
    batch_size: int,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Train one SAE on the residuals of all layers of MODEL, through sae_lens and in its format.

    Each residual is standardised by itself, so that all layers count alike. Interrupted or killed, the same command goes on from the last
    checkpoint, to the same bits.

    \b
    Examples:
      nnato mlsae train --expansion 8 --tokens 60000 --rows 1024 --lr 1e-3
      nnato mlsae train google/gemma-2-2b --tokens 100000000 --out mlsae-2b/
    """
    from nnato.sae_training import Recipe

    text = {name: options.pop(name) for name in training.TEXT}
    recipe = Recipe(**options)
    trained = training.run(model, layers, recipe, out, lens=lens, device=device, dtype=dtype, batch_size=batch_size, text=text)
    training.show(trained, recipe, f"nnato mlsae layers {out}", as_json)


@common.command("import")
@click.argument("reference")
@click.option("--model", "name", help="The model it was trained on, to be kept with it.")
@click.option("--layers", help="The layers it was trained at, such as 0,1,2,3,4,5, to be kept with it.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("mlsae"), show_default=True, help="Folder for the result.")
@common.json_option
def _import(reference: str, name: str | None, layers: str | None, out: Path, as_json: bool) -> None:
    """Convert a published multi-layer SAE to sae_lens' format. REFERENCE is a folder, or a hub id such as tim-lawson/mlsae-….

    \b
    Example:
      nnato mlsae import tim-lawson/mlsae-pythia-70m-deduped-x64-k32
    """
    from nnato.published import import_mlsae

    kept = None if layers is None else [layer.strip() for layer in layers.split(",")]
    path = import_mlsae(reference, out, model=name, sites=kept)
    if as_json:
        common.print_json({"name": name}, None, {"path": str(path)})
        return
    common.say(f"{reference} is in {path}, in sae_lens' format. Next: nnato mlsae layers {path}")


@common.command("layers")
@sae_options
@common.batch_option
@click.option("--as-published", is_flag=True, help="Show the authors' numbers, which are no variances, beside the exact ones.")
@click.option("--shard", metavar="I/N", help="Read only part I of N equal parts of the text, into --out; nnato merge puts them together.")
@remotely.remote_options
@click.option("--per-job", type=click.IntRange(min=1), default=64, show_default=True, help="Forward passes in one job on a server.")
@click.option("--costs", type=int, default=0, help="Replace each layer by its reconstruction in so many sequences.  [default: none]")
@out_option
@common.json_option
def _layers(
    as_json: bool,
    batch_size: int,
    as_published: bool,
    shard: str | None,
    costs: int,
    per_job: int,
    out: Path | None,
    **options: Any,
) -> None:
    """At which layers the latents of SAE are active, how well each layer is reconstructed, and the variance of the layer.

    SAE is a folder of nnato mlsae train or import, or any other SAE. Memory does not grow with the text. With --out, a killed run resumes.

    \b
    Examples:
      nnato mlsae layers mlsae/ --out layers/
      nnato mlsae layers mlsae/ --as-published --costs 8
      nnato mlsae layers mlsae/ --remote --per-job 256 --out layers/
      nnato mlsae layers mlsae/ --shard 1/8 --out shards/1  # then nnato merge
    """
    from nnato.errors import MomentsError, RemoteError
    from nnato.fidelity import backward_maps, fidelity
    from nnato.layer_stats import layer_distributions, layer_variance_intervals
    from nnato.multilayer import layer_activity

    folder = common.output_folder(out)
    remote = remotely.take_remote_options(options, options["dtype"])
    if remote.on and (costs or shard is not None):
        raise RemoteError("--costs and --shard belong to runs here: leave them out, or --remote and --dry-run-remote")
    server = remote.check()
    if shard is not None:
        if costs:
            raise MomentsError("--costs belongs to the whole text: give it once the shards are merged")
        _layers_of_a_shard(shard, folder, batch_size, as_json, options)
        return
    with common.progress_bar() as progress:
        opened = Opened(options, progress, remote.on)
        blocks = opened.blocks()
        how: dict[str, Any] = {"out": folder, "batch_size": batch_size, "per_job": per_job, "progress": progress}
        with remote.open(server, opened.model) as where:
            activity = layer_activity(opened.model, opened.sae, blocks, server=where, **how)
        back = None
        if costs and opened.sae.lens is not None:
            back = {site: one.map for site, one in backward_maps(opened.model, opened.sae, blocks, progress=progress).items()}
        found = fidelity(opened.model, opened.sae, blocks, back=back, sequences=costs, progress=progress) if costs else []
    weights = ("activation", "uniform", *(["published"] if as_published else []))
    variance = {name: layer_variance_intervals(activity.folds, name) for name in weights}
    distributions = layer_distributions(activity.stats)
    metrics = activity.metrics()
    record = {
        "tokens": activity.stats.tokens,
        "metrics": [{**row, "fvu": row["fvu"].to_json()} for row in metrics],
        "costs": [one.to_json() for one in found],
        "variance": {name: {key: interval.to_json() for key, interval in parts.items()} for name, parts in variance.items()},
        "dead": float((distributions["tokens"] == 0).double().mean()),
        "means": {name: float(values.nanmean()) for name, values in distributions.items()},
    }
    if folder is not None:
        from nnato.layer_plots import layer_figure, reconstruction_figure

        title = f"{opened.info.name}, {blocks.fingerprint['source']}, {activity.stats.tokens:,} tokens"
        layer_figure(activity, folder / "layers.png", title)
        reconstruction_figure(activity, found, folder / "reconstruction.png", title)
        common.write_json(folder / "layers.json", record)
        rows = {name: values.tolist() for name, values in distributions.items()}
        shares = activity.stats.total.tolist()
        table = [
            {"latent": latent, **{name: rows[name][latent] for name in rows}}
            | {f"total_{site}": value for site, value in zip(activity.sites, shares[latent], strict=True)}
            for latent in range(opened.sae.latents)
        ]
        common.write_csv(folder / "layers.csv", table)
    if as_json:
        opened.print_json(blocks, record)
        return
    _show_layers(record, metrics, list(found), variance)
    if folder is not None:
        common.say(f"layers.csv, layers.json, layers.png and reconstruction.png in {out}")


def _layers_of_a_shard(label: str, folder: Path | None, batch_size: int, as_json: bool, options: dict[str, Any]) -> None:
    """Add up one part of the text; what follows from the sums is for all parts together."""
    from nnato.multilayer import FILE, layer_activity
    from nnato.shards import Shard

    shard = Shard.parse(label)
    with common.progress_bar() as progress:
        opened = Opened(options, progress)
        blocks = opened.blocks()
        activity = layer_activity(opened.model, opened.sae, blocks, out=folder, batch_size=batch_size, shard=shard, progress=progress)
    if as_json:
        opened.print_json(blocks, {"path": str((folder or Path()) / FILE), "tokens": activity.stats.tokens, "shard": str(shard)})
        return
    common.say(f"shard {shard}: {activity.stats.tokens:,} tokens in {folder}. Next: nnato merge, with all shards")


def _show_layers(record: dict[str, Any], metrics: list[dict[str, Any]], costs: list[Any], variance: dict[str, Any]) -> None:
    headings = ["layer", "left out", "joint", "active", *(["Δ cross-entropy", "KL"] if costs else [])]
    table = new_table(f"Reconstruction by layer, {record['tokens']:,} test tokens", headings)
    by_site = {cost.site.key: cost for cost in costs}
    for row in metrics:
        cells = [str(row["site"]), f"{row['fvu'].value:.3f}", f"{row['fvu_mlsae']:.3f}", f"{row['l0']:.1f}"]
        if costs:
            cost = by_site[row["site"]]
            cells += [f"{cost.delta_loss.value:+.3f}", f"{cost.kl.value:.3f}"]
        table.add_row(*cells)
    common.console().print(table)
    columns = ("weights", "Var(L)", "aggr.", "single", "aggr. / single", "aggr. / Var(L)")
    table = new_table("Variance of the layer L: of all, of a latent F, of F at a token T", columns)
    for name, parts in variance.items():
        ratio, share = parts["ratio"], parts["share"]
        table.add_row(
            name,
            *(f"{parts[key].value:.4g}" for key in ("total", "aggregated", "single")),
            f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
            f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]",
        )
    common.console().print(table)
    means = record["means"]
    notes = (
        "left out: share of the variance by coordinate, above 1 where the mean would do better; joint: the same about one mean of all "
        "coordinates, as the authors of multi-layer SAEs take it; active: latents per token; aggr.: E[Var(L|F)]; single: E[Var(L|F,T)]; "
        "95 % intervals over documents."
    )
    common.console().print(notes, style="dim", highlight=False, markup=False)
    common.say(
        f"{record['dead']:.1%} of latents are never active here; one that is active at a token is so at {means['breadth']:.1f} layers, and "
        f"at the next layer again with probability {means['persistence']:.2f}"
    )


@common.command("similarity")
@sae_options
@click.option("--latents", help="Latents whose nearest tokens are shown, such as 5,17.  [default: none]")
@out_option
@common.json_option
def _similarity(as_json: bool, latents: str | None, out: Path | None, **options: Any) -> None:
    """How alike adjacent layers are, how alike the latents of SAE, and which tokens latents are like.

    \b
    Example:
      nnato mlsae similarity mlsae/ --latents 5,17
    """
    from nnato.similarity import cosine_histogram, layer_cosines, max_cosines, token_matches

    folder = common.output_folder(out)
    with common.progress_bar() as progress:
        opened = Opened(options, progress)
        blocks = opened.blocks()
        layers = layer_cosines(opened.model, opened.sae.sites, blocks, lens=opened.sae.lens, progress=progress)
    best = max_cosines(opened.sae.dictionary.W_dec)
    chosen = _numbers(latents)
    matches = token_matches(opened.model, opened.sae.dictionary, chosen) if chosen else {}
    record: dict[str, Any] = {
        "layers": [{"source": one.pair[0].key, "target": one.pair[1].key, "cosine": one.mean.to_json(), "std": one.std} for one in layers],
        "mmcs": float(best.nanmean()),
        "cosine_histogram": cosine_histogram(opened.sae.dictionary.W_dec).tolist(),
        "tokens": {
            kind: {str(latent): found.to_json(opened.model.tokenizer, at) for at, latent in enumerate(chosen)}
            for kind, found in matches.items()
        },
    }
    if folder is not None:
        common.write_json(folder / "similarity.json", record)
    if as_json:
        opened.print_json(blocks, record)
        return
    columns = ("layers", "mean", "95 % interval", "deviation")
    table = new_table("Cosine of a token's residuals at adjacent layers, about their means", columns)
    for one in layers:
        interval = f"[{one.mean.low:.3f}, {one.mean.high:.3f}]"
        table.add_row(f"{one.pair[0]} → {one.pair[1]}", f"{one.mean.value:.3f}", interval, f"{one.std:.3f}")
    common.console().print(table)
    common.say(f"mean largest cosine of a latent with another one (MMCS): {record['mmcs']:.3f}")
    for kind, by_latent in record["tokens"].items():
        for latent, entries in by_latent.items():
            common.say(f"latent {latent}, {kind}: " + "  ".join(f"{entry['token']!r} {entry['cosine']:.2f}" for entry in entries))


def _numbers(text: str | None) -> list[int]:
    """Read a comma-separated list of latents."""
    from nnato.errors import DictionaryError

    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise DictionaryError(f"latents {text!r}: write for example 5,17")
    return [int(part) for part in parts]


@common.command("examples")
@sae_options
@common.batch_option
@click.option("--latents", help="Which latents, such as 5,17.  [default: the ten that reach the largest activation]")
@click.option("--layer", help="Only at this layer.  [default: the best of all]")
@click.option("--count", type=int, default=5, show_default=True, help="Contexts for each latent.")
@out_option
@common.json_option
def _examples(as_json: bool, batch_size: int, latents: str | None, layer: str | None, count: int, out: Path | None, **options: Any) -> None:
    """The contexts in which latents of SAE are most active.

    \b
    Examples:
      nnato mlsae examples mlsae/
      nnato mlsae examples mlsae/ --latents 5,17 --layer 9
    """
    from nnato.top_examples import FILE, busiest, top_examples

    folder = common.output_folder(out)
    chosen = _numbers(latents)
    with common.progress_bar() as progress:
        opened = Opened(options, progress)
        blocks = opened.blocks()
        found = top_examples(opened.model, opened.sae, blocks, count=count, batch_size=batch_size, progress=progress)
    tokenizer = opened.model.tokenizer
    examples = {latent: found.of(tokenizer, latent, layer, count) for latent in chosen or busiest(found, 10)}
    record = {str(latent): [one.to_json() for one in ones] for latent, ones in examples.items()}
    if folder is not None:
        common.write_json(folder / FILE, record)
    if as_json:
        opened.print_json(blocks, record)
        return
    for latent, ones in examples.items():
        common.say(f"latent {latent}" + ("" if ones else ": never active in this text"))
        for one in ones:
            before, token, behind = (
                "".join(part) for part in (one.tokens[: one.at], one.tokens[one.at : one.at + 1], one.tokens[one.at + 1 :])
            )
            text = f"{before}«{token}»{behind}".replace("\n", "⏎")
            common.say(f"  layer {one.site!s:>5}  {one.activation:8.2f}  {text}")


@common.command("prompt")
@reading_options
@click.argument("prompt", required=False)
@click.option("--most", type=int, default=24, show_default=True, help="Latents shown here; the page shows 400.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page: one file, no network.")
@common.json_option
def _prompt(as_json: bool, prompt: str | None, most: int, html: Path | None, **options: Any) -> None:
    """Which latents of SAE are active at which layers for one PROMPT: a heat map here, and with --html a page.

    \b
    Example:
      nnato mlsae prompt mlsae/ "The Eiffel Tower is in" --html prompt.html
    """
    from rich.style import Style
    from rich.text import Text

    from nnato.prompts import EXAMPLE, prompt_activity, write_page
    from nnato.storage import prepare_folder

    if html is not None:
        prepare_folder(html.expanduser().parent, "choose another --html")
    with common.progress_bar() as progress:
        opened = Opened(options, progress)
        found = prompt_activity(opened.model, opened.sae, EXAMPLE if prompt is None else prompt)
    if html is not None:
        write_page(found, html)
    if as_json:
        opened.print_json(None, found.to_json())
        return
    latents, shares = found.heat_map()
    shown = set(found.strongest(most))
    common.say(found.prompt)
    common.say(f"{'latent':>8}  " + "".join(f"{site!s:>3}" for site in found.sites))
    for latent, share in zip(latents, shares.tolist(), strict=True):
        if latent in shown:
            line = Text(f"{latent:>8}  ")
            for value in share:
                shade = round(255 * value**0.5)
                line.append(
                    "▁▂▃▄▅▆▇█"[min(int(value * 8), 7)].rjust(3) if value else "  ·", Style(color=f"rgb({shade},{shade // 2 + 60},120)")
                )
            common.console().print(line)
    page = "" if html is None else f", all in {html}"
    common.say(f"{len(shown)} of {len(latents)} latents, latest mean layer first; of each the share of its activation by layer{page}")


@common.command("transport")
@sae_options
@common.batch_option
@click.option("--moments", type=click.Path(path_type=Path), help="Moments of pairs of its layers.  [default: adjacent ones, cached]")
@out_option
@common.json_option
def _transport(as_json: bool, batch_size: int, moments: Path | None, out: Path | None, **options: Any) -> None:
    """Are the latents of SAE that stay on from layer to layer those that are transported?

    \b
    Example:
      nnato mlsae transport mlsae/ --out transport/
    """
    from nnato.accumulation import accumulate_cached, load_moments
    from nnato.fitting import fit
    from nnato.latent_transport import latent_transport

    folder = common.output_folder(out)
    with common.progress_bar() as progress:
        opened = Opened(options, progress)
        sites = opened.sae.sites
        adjacent = tuple(itertools.pairwise(sites))
        if moments is None:
            accumulated, pairs = accumulate_cached(opened.model, None, adjacent, progress=progress), adjacent
        else:
            accumulated = load_moments(moments)
            pairs = tuple(pair for pair in accumulated.moments.pairs if set(pair) <= set(sites))
        operators = [one.operator for one in fit(accumulated, pairs, progress=progress)]
        blocks = opened.blocks()
        found = latent_transport(opened.model, opened.sae, operators, blocks, batch_size=batch_size, progress=progress)
    results = [found.coincidence(pair) for pair in pairs]
    record = [one.to_json() for one in results]
    if folder is not None:
        common.write_json(folder / "transport.json", record)
        common.write_csv(folder / "transport.csv", [_flat(dataclasses.asdict(one)) for one in results])
    if as_json:
        opened.print_json(blocks, record)
        return
    columns = ("layers", "latents", "stay on", "R²", "correlation", "given frequency")
    table = new_table("Latents that stay on, and latents that are transported", columns)
    for one in results:
        table.add_row(
            f"{one.pair[0]} → {one.pair[1]}",
            str(one.latents),
            f"{one.persistence:.2f}",
            f"{one.r2:.2f}",
            f"{one.correlation.value:.2f} [{one.correlation.low:.2f}, {one.correlation.high:.2f}]",
            f"{one.partial.value:.2f} [{one.partial.low:.2f}, {one.partial.high:.2f}]",
        )
    common.console().print(table)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """A row of a table from nested data."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{key}": item for key, item in value.items()}
        elif isinstance(value, tuple):
            flat |= {f"{name}_{number}": item for number, item in enumerate(value)}
        else:
            flat[name] = value
    return flat


_here = (_train, _import, _layers, _similarity, _examples, _prompt, _transport)
for one in (*_here, sweeping.sweep, steering.steer, serving.serve, card.card):
    command.add_command(one)
