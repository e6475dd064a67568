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
    from nnato.efficiency import Efficiency, PaperEfficiency
    from nnato.fitting import Fit
    from nnato.intervals import Interval
    from nnato.nnsight_setup import TransformersModel
    from nnato.perplexity import AblationResult
    from nnato.remote import NdifServer, Server
    from nnato.scaling import Scaling
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


def open_moments(path: Path | None, progress: Progress) -> Accumulated:
    """The moments in a folder; without one those of the embedded model and text, cached."""
    from nnato.accumulation import accumulate_cached, load_moments

    if path is not None:
        return load_moments(path)
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


def parse_ranks(text: str | None) -> tuple[int, ...] | None:
    """Read a comma-separated list of ranks."""
    from nnato.errors import MomentsError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise MomentsError(f"ranks {text!r}: write for example 1,10,100")
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
        "results": finite(results),
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
    columns = ("pair", "operator", "ident.", "+shift", "×s", "rand.", "shuf.", "skill", "all", "penal.")
    table = _table(title, columns)
    for fit in fits:
        names = ("identity", "identity_shift", "identity_scaled", "random_orthogonal", "shuffled")
        base = [fit.baselines.get(name, {}).get(metric, float("nan")) for name in names]
        table.add_row(
            f"{fit.operator.source} → {fit.operator.target}",
            f"[bold]{_with_error(fit.r2_intervals[metric])}[/]",
            *(f"{value:.2f}" for value in base),
            f"{fit.skill_over_identity[metric]:.2f}",
            f"{fit.r2_all_tokens[metric]:.2f}" if fit.r2_all_tokens else "-",
            f"{fit.kappa:.0e}".replace("e-0", "e-").replace("e+0", "e") + "*" * fit.at_edge + "!" * (not fit.converged),
        )
    console().print(table)
    notes = (
        "operator: ± is a 95 % interval over test documents; ident.: x itself; +shift: x moved by the difference of means; ×s: the best "
        "multiple of x; rand.: a random rotation; shuf.: fitted to unrelated documents; skill: 1 - error / error of +shift; all: fitted "
        "and scored with special, first and sink tokens too; penal.: κ."
    )
    if any(fit.at_edge for fit in fits):
        notes += " *: an end of the grid."
    if not all(fit.converged for fit in fits):
        notes += " !: did not converge."
    console().print(notes, style="dim", highlight=False)
    if any(fit.composed for fit in fits):
        _show_compositions(fits, metric)


def _with_error(interval: Interval) -> str:
    """A number with half the width of its interval."""
    half = (interval.high - interval.low) / 2
    return f"{interval.value:.3f}" + (f"±{half:.3f}".replace("±0.", "±.") if half == half else "")


def _show_compositions(fits: list[Fit], metric: str) -> None:
    """Table of operators against compositions of two that lead to the same target."""
    table = _table("R² of one operator and of two in a row", ("pair", "through", "direct", "composed"))
    for fit in fits:
        for site, scores in fit.composed.items():
            pair = f"{fit.operator.source} → {fit.operator.target}"
            table.add_row(pair, str(site), f"{fit.r2[metric]:.3f}", f"{scores[metric]:.3f}")
    console().print(table)


def show_efficiencies(results: list[Efficiency]) -> None:
    """Tables of ceilings, sizes of the subspace, and efficiencies."""
    from nnato.cca import participation_ratio

    columns = ("pair", "in sample", "cross-fit", "debiased", "noise", "n_eff", "LTS", "90 %", "PR", "PR shuf.")
    table = _table("Σρ² of source and target, and size of the transport subspace", columns)
    for result in results:
        found = result.correlations
        table.add_row(
            f"{result.pair[0]} → {result.pair[1]}",
            f"{float(found.rho.square().sum()):.1f}",
            f"{float(found.cross_fitted.sum()):.1f}" if len(found.cross_fitted) else "-",
            f"[bold]{result.sum_debiased.value:.1f}[/]" + _half(result.sum_debiased),
            f"{found.noise_floor:.1f}",
            f"{found.size.n:,.0f}",
            f"[bold]{found.dimensions}[/]",
            str(found.rank_for(0.9)),
            f"{participation_ratio(found.rho):.0f}",
            f"{participation_ratio(found.null):.0f}",
        )
    console().print(table)
    width = results[0].correlations.width
    notes = (
        f"of {width} dimensions. noise: what independent data would give in sample; n_eff: independent tokens that the training tokens are "
        "worth; LTS: canonical correlations above the noise edge, less those of position alone; 90 %: rank that reaches 90 % of debiased; "
        "PR: the paper's participation ratio, which is about as large for shuffled pairs."
    )
    console().print(notes, style="dim", highlight=False)
    for first in range(0, len(results), 5):
        some = results[first : first + 5]
        table = _table("η(r): whitened R² on test / debiased ceiling", ("rank", *(f"{one.pair[0]} → {one.pair[1]}" for one in some)))
        ranks = sorted({point.rank for one in some for point in one.points})
        for rank in [*ranks[:-1:3], ranks[-1]] if len(ranks) > 10 else ranks:
            found_points = [next((point for point in one.points if point.rank == rank), None) for one in some]
            table.add_row(str(rank), *(_with_error(point.efficiency) if point else "-" for point in found_points))
        console().print(table)
    notes = (
        "± is a 95 % interval over training and test documents. What is missing from 1 at full rank is estimation (too little text, "
        "shrinkage, another whitening of test documents), not a property of the model."
    )
    console().print(notes, style="dim", highlight=False)


def _half(interval: Interval) -> str:
    half = (interval.high - interval.low) / 2
    return f"±{half:.0f}" if half == half else ""


def show_paper_efficiencies(results: list[PaperEfficiency]) -> None:
    """Table of efficiencies by the paper's protocol."""
    for first in range(0, len(results), 5):
        some = results[first : first + 5]
        table = _table("η(r) as in the paper", ("rank", *(f"{one.pair[0]} → {one.pair[1]}" for one in some)))
        for number, rank in enumerate(some[0].ranks):
            table.add_row(str(rank), *(f"{one.efficiency[number]:.2f}" for one in some))
        table.add_row("mean", *(f"{one.mean_efficiency:.2f}" for one in some), style="bold")
        table.add_row("dim_lin", *(f"{one.dim_lin:.0f}" for one in some))
        table.add_row("α", *(f"{one.alpha:g}" for one in some))
        console().print(table)


def show_scalings(results: list[Scaling], metric: str) -> None:
    """Table of R² against training tokens."""
    for first in range(0, len(results), 5):
        some = results[first : first + 5]
        title = f"R² on test documents ({metric.replace('_', '-')}) against training tokens"
        table = _table(title, ("tokens", *(f"{one.pair[0]} → {one.pair[1]}" for one in some)))
        for number, point in enumerate(some[0].points):
            table.add_row(f"{point.tokens:,}", *(_with_error(one.points[number].r2[metric]) for one in some))
        table.add_row("per doubling", *(f"{one.per_doubling(metric):+.3f}" for one in some), style="bold")
        console().print(table)
    notes = "± is a 95 % interval over test documents; per doubling: what the last doubling of the tokens brought."
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
