"""`nnato ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato.cli import common, remotely, tables

if TYPE_CHECKING:
    from torch import Tensor

    from nnato.operators import TransportOperator


@common.command("ablate")
@click.option(
    "--positions",
    default="5",
    show_default=True,
    help="How many to draw (5), which (10,50,70), all, last, every:8, a class of tokens (number, word:3), active>1.5, or a preset of the "
    "paper (single_js, multiple_js, all_js).",
)
@click.option(
    "--operator",
    "operators",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An operator file of nnato fit; repeatable.",
)
@click.option("--model", help="Embedded name, folder, .gguf file or hub id.  [default: the embedded model]")
@common.pair_options
@click.option(
    "--interventions",
    default="transport,identity,mean,zero,null_input",
    show_default=True,
    help="What to put in; also: identity_shift, resample, random_orthogonal, rotated, moved_error, features, steer, lts, lts_complement, "
    "shuffled, shrunk_to_identity.",
)
@click.option("--rank", help="Also put in reduced-rank operators, for example 8,64; of an --operator file its truncations.")
@click.option("--chain", is_flag=True, help="Edit the targets of all pairs in the same pass.")
@click.option("--features", type=click.Path(path_type=Path), help="Safetensors file of directions, for features and active>….")
@click.option("--steer", type=click.Path(path_type=Path), help="Safetensors file of one vector, which the intervention steer adds.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Multiply that vector.")
@click.option("--sequences", type=int, help="Test sequences.  [default: 24, or as many as there are]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the positions and the bootstrap.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Draw positions so many times.")
@common.text_options
@common.batch_option
@common.model_options
@remotely.remote_options
@click.option("--per-job", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences in one job on a server.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for results (JSON) and the figure.")
@common.json_option
def command(
    positions: str,
    operators: tuple[Path, ...],
    model: str | None,
    pairs: str | None,
    source: str | None,
    leap: str | None,
    interventions: str,
    rank: str | None,
    chain: bool,
    features: Path | None,
    steer: Path | None,
    scale: float,
    sequences: int | None,
    seed: int,
    seeds: int,
    batch_size: int,
    device: str | None,
    dtype: str,
    per_job: int,
    out: Path | None,
    as_json: bool,
    **text: Any,
) -> None:
    """Replace target residuals by predictions at some positions and measure what the model loses.

    Without --operator it fits what it needs, from moments kept in the user's cache. With it, the text is the one the operator was
    fitted on, unless --text names another; the sequences are always of test documents.

    Interventions that need moments (shuffled, shrunk_to_identity, lts, reduced ranks) are to be had without --operator.

    \b
    Examples:
      nnato ablate --positions 5
      nnato ablate --pairs 9:12 --rank 8,64 --seeds 3
      nnato ablate --pairs 9:12 --interventions transport,shuffled,mean,resample
      nnato ablate --pairs 5:9,9:12 --chain --positions multiple_js
      nnato ablate --model google/gemma-2-2b --pairs 10:12 --remote
      nnato ablate --pairs 9:12 --positions 10,50,70,100,120
    """
    from nnato.accumulation import accumulate_cached, default_corpus, tokenize
    from nnato.controls import controls_of, subspaces_of
    from nnato.edits import FITTED_CONTROLS, SUBSPACE, is_rank, read_directions, truncate
    from nnato.errors import OperatorError
    from nnato.fitting import fit
    from nnato.models import describe
    from nnato.operators import TransportOperator
    from nnato.perplexity import SEQUENCES, ablate, check_interventions, check_operator, choose_sequences, corpus_of
    from nnato.positions import Draws
    from nnato.sites import default_pairs

    draws = Draws.parse(positions, seed, seeds)
    names = [name.strip() for name in interventions.split(",") if name.strip()]
    names = list(dict.fromkeys([*names, *(f"rank_{one}" for one in common.parse_ranks(rank) or ())]))
    check_interventions(names)
    if operators and (pairs or source or leap):
        raise OperatorError("give --operator or pairs, not both: an operator knows its pair")
    fitted = [name for name in names if name in FITTED_CONTROLS or is_rank(name)]
    if operators and (needy := [name for name in names if name in (*FITTED_CONTROLS, *SUBSPACE)]):
        raise OperatorError(f"{needy[0]} comes from moments, which an operator file has not: give pairs instead of --operator")
    for option, given in (("features", features), ("steer", steer)):
        if option in names and given is None:
            raise OperatorError(f"the intervention {option} needs a file of directions: give --{option}")
    if steer is not None and "steer" not in names:
        raise OperatorError("--steer belongs to the intervention steer: name it in --interventions")
    directions = None if features is None else read_directions(features)
    vector = None if steer is None else _one(read_directions(steer), steer) * scale
    folder = common.output_folder(out)
    chosen: list[TransportOperator] = [TransportOperator.load(path) for path in operators]
    remote = remotely.take_remote_options(text, dtype)
    server = remote.check()
    with common.progress_bar() as progress:
        name = model or (chosen[0].details.get("model", {}).get("name") if chosen else None)
        loaded = common.load(name, device, dtype, progress, remote.on)
        info = describe(loaded)
        for operator in chosen:
            check_operator(operator, info)
        wanted = common.parse_pair_options(pairs, source, leap, info.blocks) or default_pairs(info.blocks)
        corpus = common.make_corpus(corpus_of(chosen[0], info) if chosen else default_corpus(info), **text)
        draws.check(corpus.context)
        blocks = tokenize(loaded, corpus, progress)
        taken = len(choose_sequences(blocks, sequences))  # refuses too little text before the long part
        if sequences is None and taken < SEQUENCES:
            common.note(f"{taken} sequences instead of {SEQUENCES}: the test documents hold no more of {blocks.context} tokens")
        with remote.open(server, loaded) as where:
            if not chosen:
                common.announce_moments(loaded, wanted, blocks.fingerprint["folds"])
                accumulated = accumulate_cached(loaded, blocks, wanted, batch_size=batch_size, server=where, progress=progress)
                chosen = [result.operator for result in fit(accumulated, wanted, progress=progress)]
                controls = controls_of(accumulated, chosen, fitted)
                subspaces = subspaces_of(accumulated, wanted) if set(names) & set(SUBSPACE) else None
            else:
                controls = [truncate(operator, int(name.removeprefix("rank_"))) for operator in chosen for name in fitted]
                subspaces = None
            results = ablate(
                loaded,
                chosen,
                blocks,
                positions=positions,
                interventions=names,
                sequences=sequences,
                seed=seed,
                seeds=seeds,
                controls=controls,
                features=directions,
                steering=vector,
                subspaces=subspaces,
                chain=chain,
                server=where,
                per_job=per_job,
                progress=progress,
            )
    record = [result.to_json() for result in results]
    if folder is not None:
        from nnato.plots import ablation_bars

        common.write_json(folder / "ablation.json", record)
        ablation_bars(results, folder / "ablation.png", common.about(info.fingerprint(), blocks.fingerprint))
    if as_json:
        common.print_json(info.fingerprint(), blocks.fingerprint, record, seed)
        return
    tables.show_ablations(results)
    if out is not None:
        common.say(f"ablation.json and ablation.png in {out}")


def _one(vectors: Tensor, path: Path) -> Tensor:
    """The only vector of a file."""
    from nnato.errors import OperatorError

    if len(vectors) != 1:
        raise OperatorError(f"{path} holds {len(vectors)} vectors: --steer adds one")
    return vectors[0]
