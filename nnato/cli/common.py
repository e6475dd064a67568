"""What commands share: options, errors and exit codes, progress, JSON, tables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato import __version__
from nnato.errors import NnatoError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from nnato.accumulation import Accumulated
    from nnato.corpus import Corpus
    from nnato.fitting import Fit
    from nnato.nnsight_setup import TransformersModel
    from nnato.perplexity import AblationResult
    from nnato.remote import NdifServer, Server
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


model_options = options(
    click.option("--device", help="Where to run: cpu, cuda, cuda:1.  [default: a GPU if there is one]"),
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
remote_options = options(
    click.option("--remote", is_flag=True, help="Run the model on an NDIF server; only sums and losses come back."),
    click.option("--host", help="Its URL.  [default: NDIF_HOST, or nnsight's configuration, or the public one]"),
    click.option("--timeout", type=click.FloatRange(min=0), default=3600.0, show_default=True, help="Seconds a job may take."),
    click.option("--resume-job", help="Attach to the job with this id, sent earlier by the same command, instead of sending it again."),
    click.option("--dry-run-remote", is_flag=True, help="Run what --remote would send in a fresh process here, without nnato."),
)
batch_option = click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences per forward pass.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there.")
pair_options = options(
    click.option("--pairs", help="source:target[,…], for example 9:12,12:17."),
    click.option("--source", help="A source site; with --leap."),
    click.option("--leap", help="Leaps behind --source, for example 1-8 or 1,3,7."),
)


def command(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A click command whose errors become messages and exit codes: 2 bad input, 1 failed while running, 130 interrupted."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            from nnato.errors import ActivationError, OutputError

            try:
                function(*args, **kwargs)
            except NnatoError as error:
                click.echo(f"Error: {error}", err=True)
                sys.exit(1 if isinstance(error, ActivationError | OutputError) else 2)
            except KeyboardInterrupt:
                click.echo("interrupted: what was checkpointed is kept, and the same command goes on from there", err=True)
                sys.exit(130)

        return click.command(name)(wrapped)

    return decorate


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callback that draws a bar on stderr, one per stage; silent off a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            ended = total is not None and done >= total
            bar.update(tasks[stage], completed=total if ended else done, total=total)

        yield update


def load(name: str | None, device: str | None, dtype: str, progress: Progress, remote: bool = False) -> TransformersModel:
    """Load a model with the options of the command line."""
    import torch

    from nnato.models import load_model

    progress("loading the model", 0, 1)
    model = load_model(name, device=device, dtype=getattr(torch, dtype), remote=remote)
    progress("loading the model", 1, 1)
    return model


@dataclasses.dataclass(frozen=True)
class RemoteOptions:
    """What --remote and its companions say."""

    remote: bool
    dry_run_remote: bool
    host: str | None
    timeout: float
    resume_job: str | None
    dtype: str

    @property
    def on(self) -> bool:
        """Whether the model runs elsewhere."""
        return self.remote or self.dry_run_remote

    def check(self) -> NdifServer | None:
        """Refuse what does not go together; with --remote, the server, which has said that it is there.

        Raises:
            RemoteError: Options that do not go together, no key, or no server.
        """
        from nnato.errors import RemoteError

        if self.remote and self.dry_run_remote:
            raise RemoteError("give --remote or --dry-run-remote, not both")
        if not self.remote and (self.host is not None or self.resume_job is not None):
            raise RemoteError("--host and --resume-job belong to --remote")
        if not self.remote:
            return None
        from nnato.remote import NdifServer

        server = NdifServer(self.host, timeout=self.timeout, resume=self.resume_job, say=note)
        server.check()
        return server

    @contextlib.contextmanager
    def open(self, server: NdifServer | None, model: TransformersModel) -> Iterator[Server | None]:
        """Where jobs of a model go: the server, a dry run that ends with the block, or None for this process."""
        if not self.dry_run_remote:
            yield server
            return
        import torch

        from nnato.dry_run import DryRunServer

        note("dry run: a fresh process without nnato loads the weights and executes what a server would be sent")
        with DryRunServer(model.repo_id, getattr(torch, self.dtype), say=note) as dry:
            yield dry


def take_remote_options(values: dict[str, Any], dtype: str) -> RemoteOptions:
    """Take the values of `remote_options` out of a command's keyword arguments."""
    names = ("remote", "dry_run_remote", "host", "timeout", "resume_job")
    return RemoteOptions(**{name: values.pop(name) for name in names}, dtype=dtype)


def note(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


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


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console()


def say(text: str) -> None:
    """A line of text as it is: paths and tokens may hold anything."""
    console().print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(model: dict[str, Any], text: dict[str, Any] | None, results: Any, seed: int = 0) -> None:
    """The one JSON object of a command; what is not a number becomes null."""
    import math

    from nnato.storage import SCHEMA, provenance

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    record = {
        "schema": SCHEMA,
        "nnato": __version__,
        "model": model,
        "text": text,
        "seed": seed,
        "command": provenance()["command"],
        "results": clean(results),
    }
    click.echo(json.dumps(record, allow_nan=False))


def _table(title: str, columns: Sequence[str]) -> Table:
    """A table narrow enough for 80 columns, numbers on the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def show_fits(fits: list[Fit], metric: str) -> None:
    """Table of held-out R²."""
    title = f"R² on test documents ({metric.replace('_', '-')}, ordinary tokens)"
    table = _table(title, ("pair", "operator", "ident.", "+shift", "mean", "shuffled", "skill", "all tok.", "κ"))
    for fit in fits:
        base = [fit.baselines.get(name, {}).get(metric, float("nan")) for name in ("identity", "identity_shift", "mean", "shuffled")]
        table.add_row(
            f"{fit.operator.source} → {fit.operator.target}",
            f"[bold]{fit.r2[metric]:.3f}[/]",
            *(f"{value:.2f}" for value in base),
            f"{fit.skill_over_identity[metric]:.2f}",
            f"{fit.r2_all_tokens[metric]:.2f}" if fit.r2_all_tokens else "-",
            f"{fit.kappa:.0e}{'*' if fit.at_edge else ''}",
        )
    console().print(table)
    notes = "ident.: x itself; +shift: x moved by the difference of means; skill: 1 - error / error of +shift; "
    notes += "all tok.: fitted and scored with special, first and sink tokens too; κ: penalty."
    if any(fit.at_edge for fit in fits):
        notes += " *: an end of the grid."
    console().print(notes, style="dim", highlight=False)


def show_accumulated(accumulated: Accumulated) -> None:
    """Token counts and exclusions, in a few lines."""
    tokens = ", ".join(f"{count:,} {split}" for split, count in accumulated.tokens.items())
    excluded = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in accumulated.excluded.items())
    sinks = ", ".join(f"{text!r} {count}" for text, count in list(accumulated.sink_tokens.items())[:5])
    text = f"text: {accumulated.text['source']}, {accumulated.text['documents']} documents; tokens: {tokens}"
    say(text)
    say(f"left out: {excluded}" + (f" (sinks: {sinks})" if sinks else ""))


def show_ablations(results: list[AblationResult]) -> None:
    """Table of losses under interventions, one per pair."""
    for result in results:
        title = f"{result.pair[0]} → {result.pair[1]}: {result.positions.describe()}, {result.sequences} sequences"
        table = _table(title, ("put in", "log-ppl", "Δloss at edits", "Δ after", "over transport", "recov."))
        table.add_row("(unedited)", f"{result.log_perplexity:.3f}")
        for name, effect in result.effects.items():
            at, over, recovered = effect.delta_loss_at_edit, effect.minus_transport, effect.loss_recovered_mean
            table.add_row(
                name,
                f"{effect.log_perplexity:.3f}",
                f"{at.value:+.2f} [{at.low:.2f}, {at.high:.2f}]",
                f"{effect.delta_loss.value:+.3f}",
                f"{over.value:+.3f} [{over.low:.3f}, {over.high:.3f}]" if over else "",
                f"{recovered:.2f}" if recovered == recovered else "-",
                style="bold" if name == "transport" else None,
            )
        console().print(table)
    notes = (
        f"nats; 95 % intervals, paired bootstrap over {results[0].documents} documents. Δloss at the edited positions; Δ after: over all "
        "positions from the first edit on; over transport: how much more of the latter; recov.: loss recovered, 0 as bad as the mean, "
        "1 unharmed."
    )
    console().print(notes, style="dim", highlight=False)


def about(model: dict[str, Any], text: dict[str, Any]) -> str:
    """Model and text in a few words, for titles."""
    return f"{model['name']}, {text['source']}, {sum(text['split_tokens'].values()):,} tokens"


def write_json(path: Path, record: Any) -> Path:
    """Write JSON atomically."""
    from nnato.storage import atomic

    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path
