"""What commands share: options, errors and exit codes, progress, JSON, tables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import click

from nnato import __version__
from nnato.cli.running import Command, chosen_options, interrupted, quiet, write_config
from nnato.errors import NnatoError

if TYPE_CHECKING:
    from rich.console import Console

    from nnato.accumulation import Accumulated
    from nnato.corpus import Corpus
    from nnato.nnsight_setup import TransformersModel
    from nnato.sites import Pair
    from nnato.statistics import Progress

Function = Callable[..., Any]


def options(*decorators: Function) -> Function:
    """Several click options as one decorator, in the order given."""

    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


device_option = click.option(
    "--device", help="Where to run: cpu, cuda, cuda:1, auto (spread over all GPUs).  [default: a GPU if there is one]"
)
model_options = options(
    device_option,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="Data type of the weights.",
    ),
)
text_options = options(
    click.option(
        "--text",
        "text",
        help="A .txt or .jsonl file, a folder of .txt files, or a datasets id.  [default: python-docs, embedded]",
    ),
    click.option("--tokens", type=int, help="Read so many tokens.  [default: 80 per dimension of the residual stream]"),
    click.option("--context", type=int, help="Tokens of a sequence, special tokens included.  [default: 256]"),
    click.option("--per-document", type=int, help="At most so many sequences of one document; 0: all.  [default: 2]"),
    click.option("--column", help="Text field of .jsonl files and data sets.  [default: text]"),
)
batch_option = click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences per forward pass.")
sae_option = click.option("--sae", required=True, help="A folder of sae_lens, a params.npz of Gemma Scope, RELEASE/ID, or mlsae:PATH.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there.")
metric_option = click.option(
    "--metric",
    type=click.Choice(["variance_weighted", "uniform", "whitened"]),
    help="The R² that chooses the penalty, and is shown.  [default: variance_weighted]",
)
pair_options = options(
    click.option("--pairs", help="source:target[,…], for example 9:12,12:17."),
    click.option("--source", help="A source site; with --leap."),
    click.option("--leap", help="Leaps behind --source, for example 1-8 or 1,3,7."),
)


def command(name: str, keep: bool = True) -> Callable[[Callable[..., None]], click.Command]:
    """A click command with `--config` and `--quiet` whose errors become messages and exit codes.

    Codes: 2 bad input, 1 failed while running, 130 interrupted.

    Args:
        name: The command's name.
        keep: Whether a run leaves the file that redoes it.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            from nnato.errors import ActivationError, OutputError, UnwritableError

            try:
                if kwargs.get("text") is not None:  # before a model is loaded
                    _check_text(kwargs["text"])
                function(*args, **kwargs)
                if keep:
                    write_config()
            except NnatoError as error:
                click.echo(f"Error: {error}", err=True)
                failed = isinstance(error, ActivationError | OutputError) and not isinstance(error, UnwritableError)
                sys.exit(1 if failed else 2)
            except KeyboardInterrupt:
                click.echo(interrupted(), err=True)
                sys.exit(130)

        return click.command(name, cls=Command)(wrapped)

    return decorate


def _check_text(source: str) -> None:
    from nnato.corpus import Corpus

    Corpus(source).open()


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar for each stage on stderr, and a line that says how long a long stage will take; neither with `--quiet`."""
    from nnato.progress import progress_bar as bars

    if quiet():
        yield lambda stage, done, total: None
        return
    with bars(say=note) as update:
        yield update


def load(name: str | None, device: str | None, dtype: str, progress: Progress, remote: bool = False) -> TransformersModel:
    """Load a model with the options of the command line."""
    import torch

    from nnato.models import load_model

    progress("loading the model", 0, 1)
    model = load_model(name, device=device, dtype=getattr(torch, dtype), remote=remote)
    progress("loading the model", 1, 1)
    return model


def note(text: str) -> None:
    """A line on stderr, unless the command is to be quiet."""
    if not quiet():
        click.echo(text, err=True)


def announce_moments(model: TransformersModel, pairs: Sequence[Pair], folds: int) -> None:
    """Say how much memory and disk moments will take, before the passes that fill them."""
    from nnato.models import describe
    from nnato.transport_moments import TransportMoments

    in_all, at_once = TransportMoments.bytes_for(pairs, describe(model).d_model, folds)
    weights = sum(parameter.nbytes for parameter in model._module.parameters() if parameter.device.type != "meta")
    note(f"memory: {weights / 1e9:.1f} GB of weights, {at_once / 1e9:.2f} GB of sums; at most {in_all / 1e9:.2f} GB on disk")


def make_corpus(base: Corpus, text: str | None, **settings: Any) -> Corpus:
    """A corpus with the options given on the command line; with `--per-document 0` all sequences of a document."""
    given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    if text is not None:
        given["source"] = text
    if given.get("per_document") == 0:
        given["per_document"] = None
    return dataclasses.replace(base, **given)


def parse_pair_options(pairs: str | None, source: str | None, leap: str | None, blocks: int) -> tuple[Pair, ...] | None:
    """The pairs that --pairs or --source with --leap name; None without these options."""
    from nnato.errors import SiteError
    from nnato.sites import ResidualSite, pairs_from_leaps, parse_leaps, parse_pairs

    if pairs is not None and (source is not None or leap is not None):
        raise SiteError("give --pairs, or --source with --leap, not both")
    if (source is None) != (leap is None):
        raise SiteError("--source and --leap belong together, for example --source 5 --leap 1-8")
    if pairs is not None:
        return parse_pairs(pairs, blocks)
    if source is not None and leap is not None:
        return pairs_from_leaps(ResidualSite.parse(source, blocks), parse_leaps(leap), blocks)
    return None


def new_folder(out: Path) -> Path:
    """Make and check the folder of `--out`, before work starts; gone again when the command ends, if it was not there and nothing is in it.

    Raises:
        OutputError: It cannot be written to.
    """
    from nnato.storage import prepare_folder

    folder = out.expanduser()
    if not folder.exists():

        def remove() -> None:
            with contextlib.suppress(OSError):
                folder.rmdir()

        click.get_current_context().call_on_close(remove)
    return prepare_folder(folder)


@overload
def output_folder(out: Path) -> Path: ...
@overload
def output_folder(out: None) -> None: ...
def output_folder(out: Path | None) -> Path | None:
    """Make and check the folder of `--out`, before work starts, and keep it to this command until it ends.

    Raises:
        OutputError: It cannot be written to, or another process works on it.
    """
    from nnato.storage import exclusive

    if out is None:
        return None
    folder = new_folder(out)
    click.get_current_context().with_resource(exclusive(folder))
    return folder


def open_moments(path: Path | None, progress: Progress) -> Accumulated:
    """The moments in a folder; without one those of the embedded model and text, cached."""
    from nnato.accumulation import accumulate_cached, load_moments

    if path is not None:
        progress("reading moments", 0, 1)
        accumulated = load_moments(path)
        progress("reading moments", 1, 1)
        return accumulated
    return accumulate_cached(load(None, None, "float32", progress), progress=progress)


def accumulated_pairs(accumulated: Accumulated, pairs: str | None, source: str | None, leap: str | None) -> tuple[Pair, ...] | None:
    """The pairs that the options name; of all leaps asked for, those that were accumulated. None without these options."""
    chosen = parse_pair_options(pairs, source, leap, accumulated.model["blocks"])
    if source is not None and chosen is not None:
        return tuple(pair for pair in chosen if pair in accumulated.moments.pairs) or chosen
    return chosen


def pairs_to_target(accumulated: Accumulated, target: str | None, leap: str | None) -> tuple[Pair, ...] | None:
    """The accumulated pairs that --target names, with --leap those at these leaps; None without these options."""
    from nnato.errors import SiteError
    from nnato.sites import ResidualSite, parse_leaps

    if target is None:
        if leap is not None:
            raise SiteError("--leap belongs to --target here, for example --target 10 --leap 1,3,7,10")
        return None
    end = ResidualSite.parse(target, accumulated.model["blocks"])
    leaps = None if leap is None else parse_leaps(leap)
    found = tuple(pair for pair in accumulated.moments.pairs if pair[1] == end and (leaps is None or pair[1] - pair[0] in leaps))
    if not found:
        raise SiteError(f"the moments hold no pair with target {end}" + ("" if leap is None else " at these leaps"))
    return found


def parse_ranks(text: str | None, what: str = "ranks") -> tuple[int, ...] | None:
    """Read a comma-separated list of ranks, or of other whole numbers."""
    from nnato.errors import MomentsError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise MomentsError(f"{what} {text!r}: write for example 1,10,100")
    return tuple(sorted({int(part) for part in parts}))


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console()


def say(text: str) -> None:
    """A line of text as it is: paths and tokens may hold anything."""
    console().print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(model: dict[str, Any], text: dict[str, Any] | None, results: Any, seed: int = 0) -> None:
    """The one JSON object of a command; what is not a number becomes null."""
    from nnato.storage import SCHEMA, provenance

    record = {
        "schema": SCHEMA,
        "nnato": __version__,
        "model": model,
        "text": text,
        "seed": seed,
        "command": provenance()["command"],
        "config": chosen_options(),
        "results": finite(results),
    }
    click.echo(json.dumps(record, allow_nan=False))


def about(model: dict[str, Any], text: dict[str, Any]) -> str:
    """Model and text in a few words, for titles."""
    return f"{model['name']}, {text['source']}, {sum(text['split_tokens'].values()):,} tokens"


def write_json(path: Path, record: Any) -> Path:
    """Write JSON atomically."""
    from nnato.storage import atomic

    with atomic(path) as temporary:
        temporary.write_text(json.dumps(finite(record), indent=1, allow_nan=False) + "\n")
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a table atomically; the columns are the keys of the first row."""
    import csv
    import io

    from nnato.storage import atomic

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic(path) as temporary:
        temporary.write_text(text.getvalue())
    return path


def finite(value: Any) -> Any:
    """JSON values with null for what is not a number."""
    import math

    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
