"""`nnato accumulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnato.cli import cluster, common, remotely, tables


@common.command("accumulate")
@click.argument("model", required=False)
@click.option(
    "--sites",
    help="all, or a list such as 5,10,embed: moments of all their pairs.  [default: about seven, spread over the depth]",
)
@common.pair_options
@common.text_options
@click.option("--folds", type=int, help="Parts of the train and of the test documents, for cross-validation and intervals.  [default: 5]")
@common.batch_option
@click.option("--checkpoint-every", type=int, default=20, show_default=True, help="Forward passes between checkpoints.")
@common.model_options
@remotely.remote_options
@click.option("--per-job", type=click.IntRange(min=1), default=64, show_default=True, help="Forward passes in one job on a server.")
@click.option("--all-tokens", is_flag=True, help="Fetch sums of special, first and sink tokens from a server too: more bytes.")
@click.option(
    "--products",
    type=click.Choice(["float64", "float32"]),
    default="float64",
    show_default=True,
    help="Data type in which residuals are multiplied; float32 takes half the time, and sums stay in float64.",
)
@click.option("--no-null", is_flag=True, help="Leave shuffled pairs out: faster, but no effective sample size.")
@cluster.cluster_options
@click.option("--sums-on", help="Where to keep the float64 sums, for example cpu.  [default: where the model is]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("moments"), show_default=True, help="Folder for the result.")
@common.json_option
def command(
    model: str | None,
    sites: str | None,
    pairs: str | None,
    source: str | None,
    leap: str | None,
    batch_size: int,
    checkpoint_every: int,
    device: str | None,
    dtype: str,
    sums_on: str | None,
    products: str,
    no_null: bool,
    per_job: int,
    all_tokens: bool,
    out: Path,
    as_json: bool,
    **text: Any,
) -> None:
    """Stream text through MODEL once and keep moments of its residuals, no activations.

    Interrupted or killed, the same command resumes from the last checkpoint, to the same bits.

    \b
    Examples:
      nnato accumulate
      nnato accumulate smollm2 --source 5 --leap 1-8 --out moments-smollm2/
      nnato accumulate google/gemma-2-2b --text monology/pile-uncopyrighted
      nnato accumulate google/gemma-2-2b --pairs 10:12 --remote
      nnato accumulate --engine ray --workers 2
      nnato accumulate --shard 1/8 --out shards/1    # then 2/8 …, and nnato merge
    """
    import torch

    from nnato.accumulation import accumulate, default_corpus, default_pairs_of, tokenize
    from nnato.errors import RemoteError, SiteError
    from nnato.models import describe
    from nnato.sites import grid, parse_sites

    common.new_folder(out)
    sharing = cluster.take_cluster_options(text, text["remote"] or text["dry_run_remote"])
    remote = remotely.take_remote_options(text, dtype)
    if all_tokens and not remote.on:
        raise RemoteError("--all-tokens belongs to --remote: here these sums are always kept")
    server = remote.check()
    how = {"batch_size": batch_size, "products": getattr(torch, products), "null": not no_null}
    with common.progress_bar() as progress:
        loaded = common.load(model, device, dtype, progress, remote.on or sharing.cluster is not None)
        info = describe(loaded)
        chosen = common.parse_pair_options(pairs, source, leap, info.blocks)
        if sites is not None and chosen is not None:
            raise SiteError("give --sites (all pairs of them) or pairs, not both")
        if sites is not None:
            chosen = grid(parse_sites(sites, info.blocks))
            if not chosen:
                raise SiteError(f"--sites {sites}: a pair needs two sites")
        corpus, chosen = common.make_corpus(default_corpus(info), **text), chosen or default_pairs_of(info)
        if sharing.cluster is not None:
            from nnato.ray_engine import accumulate_on_ray

            name = loaded._module.config._name_or_path
            weights = getattr(torch, dtype)
            result = accumulate_on_ray(
                name, corpus, chosen, sharing.cluster, out=out, dtype=weights, progress=progress, say=common.note, **how
            )
            tables.finish_accumulation(result, out, as_json)
            return
        blocks = tokenize(loaded, corpus, progress)
        common.announce_moments(loaded, chosen, corpus.folds)
        with remote.open(server, loaded) as where:
            result = accumulate(
                loaded,
                blocks,
                chosen,
                out=out,
                device=sums_on,
                checkpoint_every=checkpoint_every,
                server=where,
                per_job=per_job,
                keep_excluded=all_tokens,
                shard=sharing.shard,
                progress=progress,
                **how,
            )
    tables.finish_accumulation(result, out, as_json, sharing.shard)
