"""`nnato generate`."""

from __future__ import annotations

from pathlib import Path

import click

from nnato.cli import common, tables


@common.command("generate")
@click.argument("prompt")
@click.option("--transport", "pairs", help="source:target[,…], all edited in every pass.  [default: the pairs of --operator]")
@click.option(
    "--operator",
    "operators",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An operator file of nnato fit; repeatable.  [default: fitted to the embedded text, and cached]",
)
@click.option("--model", help="Embedded name, folder, .gguf file or hub id.  [default: the embedded model]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=40, show_default=True, help="How long.")
@click.option(
    "--positions",
    default="new",
    show_default=True,
    help="new (the prompt's last token and every new one), all (all but the first), or tokens such as 3,5.",
)
@click.option(
    "--interventions",
    default="transport,identity",
    show_default=True,
    help="What to put in, each for a text of its own; also: identity_shift, mean, zero, null_input, random_orthogonal, rotated.",
)
@common.batch_option
@common.model_options
@common.json_option
def command(
    prompt: str,
    pairs: str | None,
    operators: tuple[Path, ...],
    model: str | None,
    max_new_tokens: int,
    positions: str,
    interventions: str,
    batch_size: int,
    device: str | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Continue PROMPT with residuals replaced at every step, beside the unedited text.

    \b
    Examples:
      nnato generate "The Eiffel Tower is in" --transport 9:12
      nnato generate "def add(a, b):" --operator operators/12-17.safetensors
    """
    from nnato.accumulation import accumulate_cached
    from nnato.errors import OperatorError
    from nnato.fitting import fit
    from nnato.generation import generate_edited
    from nnato.models import describe
    from nnato.operators import TransportOperator
    from nnato.sites import parse_pairs

    names = [name.strip() for name in interventions.split(",") if name.strip()]
    if pairs is None and not operators:
        raise OperatorError("give --transport, for example 9:12, or --operator")
    if pairs is not None and operators:
        raise OperatorError("give --transport or --operator, not both: an operator's file says between which sites it is")
    chosen = [TransportOperator.load(path) for path in operators]
    with common.progress_bar() as progress:
        loaded = common.load(model or (chosen[0].details.get("model", {}).get("name") if chosen else None), device, dtype, progress)
        info = describe(loaded)
        if pairs is not None:
            wanted = parse_pairs(pairs, info.blocks)
            accumulated = accumulate_cached(loaded, None, wanted, batch_size=batch_size, progress=progress)
            chosen = [result.operator for result in fit(accumulated, wanted, progress=progress)]
        progress("writing", 0, 1)
        result = generate_edited(loaded, prompt, chosen, interventions=names, positions=positions, max_new_tokens=max_new_tokens)
        progress("writing", 1, 1)
    if as_json:
        common.print_json(info.fingerprint(), None, result.to_json())
        return
    tables.show_generation(result)
