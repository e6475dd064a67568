"""Tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nnato.cli.common import console, print_json, say

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from nnato.accumulation import Accumulated
    from nnato.effects import AblationResult
    from nnato.efficiency import Efficiency, PaperEfficiency
    from nnato.features import FeatureResult
    from nnato.fitting import Fit
    from nnato.generation import Generation
    from nnato.intervals import Interval
    from nnato.scaling import Scaling
    from nnato.shards import Shard

WIDTH = 80
"""Columns that every table has to fit into."""


def new_table(title: str, columns: Sequence[str]) -> Table:
    """A table narrow enough for 80 columns, numbers on the right.

    Its title stays in one line if it is narrower than that, however narrow the table is.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    short = len(title) <= WIDTH
    table = Table(
        title=Text(title, no_wrap=short, overflow="ignore" if short else "fold"),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def show_fits(fits: list[Fit], metric: str) -> None:
    """Table of held-out R²."""
    title = f"R² on test documents ({metric.replace('_', '-')}, ordinary tokens)"
    columns = ("pair", "operator", "ident.", "+shift", "×s", "rand.", "shuf.", "skill", "all", "penal.")
    table = new_table(title, columns)
    for fit in fits:
        names = ("identity", "identity_shift", "identity_scaled", "random_orthogonal", "shuffled")
        base = [fit.baselines.get(name, {}).get(metric, float("nan")) for name in names]
        table.add_row(
            f"{fit.operator.source} → {fit.operator.target}",
            f"[bold]{with_error(fit.r2_intervals[metric])}[/]",
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


def with_error(interval: Interval) -> str:
    """A number with half the width of its interval."""
    half = (interval.high - interval.low) / 2
    return f"{interval.value:.3f}" + (f"±{half:.3f}".replace("±0.", "±.") if half == half else "")


def _show_compositions(fits: list[Fit], metric: str) -> None:
    """Table of operators against compositions of two that lead to the same target."""
    table = new_table("R² of one operator and of two in a row", ("pair", "through", "direct", "composed"))
    for fit in fits:
        for site, scores in fit.composed.items():
            pair = f"{fit.operator.source} → {fit.operator.target}"
            table.add_row(pair, str(site), f"{fit.r2[metric]:.3f}", f"{scores[metric]:.3f}")
    console().print(table)


def show_efficiencies(results: list[Efficiency]) -> None:
    """Tables of ceilings, sizes of the subspace, and efficiencies."""
    from nnato.cca import participation_ratio

    columns = ("pair", "in sample", "cross-fit", "debiased", "noise", "n_eff", "LTS", "90 %", "PR", "PR shuf.")
    table = new_table("Σρ² of source and target, and size of the transport subspace", columns)
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
        table = new_table("η(r): whitened R² on test / debiased ceiling", ("rank", *(f"{one.pair[0]} → {one.pair[1]}" for one in some)))
        ranks = sorted({point.rank for one in some for point in one.points})
        for rank in [*ranks[:-1:3], ranks[-1]] if len(ranks) > 10 else ranks:
            found_points = [next((point for point in one.points if point.rank == rank), None) for one in some]
            table.add_row(str(rank), *(with_error(point.efficiency) if point else "-" for point in found_points))
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
        table = new_table("η(r) as in the paper", ("rank", *(f"{one.pair[0]} → {one.pair[1]}" for one in some)))
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
        table = new_table(title, ("tokens", *(f"{one.pair[0]} → {one.pair[1]}" for one in some)))
        for number, point in enumerate(some[0].points):
            table.add_row(f"{point.tokens:,}", *(with_error(one.points[number].r2[metric]) for one in some))
        table.add_row("per doubling", *(f"{one.per_doubling(metric):+.3f}" for one in some), style="bold")
        console().print(table)
    notes = "± is a 95 % interval over test documents; per doubling: what the last doubling of the tokens brought."
    console().print(notes, style="dim", highlight=False)


def show_accumulated(accumulated: Accumulated) -> None:
    """Token counts and exclusions, in a few lines."""
    tokens = ", ".join(f"{count:,} {split}" for split, count in accumulated.tokens.items())
    excluded = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in accumulated.excluded.items())
    sinks = ", ".join(f"{text!r} {count}" for text, count in list(accumulated.sink_tokens.items())[:5])
    say(f"text: {accumulated.text['source']}, {documents_of(accumulated.text)}; tokens: {tokens}")
    say(f"left out: {excluded}" + (f" (sinks: {sinks})" if sinks else ""))


def documents_of(text: Mapping[str, Any]) -> str:
    """How many documents of a text were read, and of how many, where that is known."""
    read, there = text["documents"], text.get("documents_there")
    return f"{read} documents used" if there is None else f"{read} documents" if read == there else f"{read} of {there} documents"


def show_features(results: list[FeatureResult], entries: list[dict[str, Any]]) -> None:
    """Table of R² over features and of verdicts, one row per source, and one of scores where features are active."""
    columns = ("pair", "R²", "5 %", "95 %", "+shift", "ceil.", "rand.", "transp.", "mixed", "synth.", "undet.")
    table = new_table("features: R² on test documents (all ordinary tokens)", columns)
    for result in results:
        one = result.summary()
        r2 = one["r2"]["transport"]
        table.add_row(
            f"{result.pair[0]} → {result.pair[1]}",
            f"[bold]{r2['0.5']:.3f}[/]",
            f"{r2['0.05']:.2f}",
            f"{r2['0.95']:.2f}",
            f"{one['r2']['identity_shift']['0.5']:.2f}",
            f"{one['ceiling']['0.5']:.2f}",
            f"{one['random_directions']['r2']['0.5']:.2f}",
            *(str(one["verdicts"][name]) for name in ("transported", "mixed", "synthesised", "undetermined")),
        )
    console().print(table)
    if "active" in entries[0]:
        table = new_table("where features are active", ("pair", "known", "R²", "Pearson", "latent R²", "prec.", "recall", "F1", "AUC"))
        for result, entry in zip(results, entries, strict=True):
            one = entry["active"]
            names = ("active_r2", "active_pearson", "latent_r2", "precision", "recall", "f1", "auc")
            known = f"{one['active_r2']['known']}/{len(result.features)}"
            table.add_row(f"{result.pair[0]} → {result.pair[1]}", known, *(f"{one[name]['0.5']:.3f}" for name in names))
        console().print(table)
        some = one["sampled"]
        say(f"latent R² to AUC: of {some['tokens']:,} of {one['tokens']:,} tokens, and {some['features']:,} features active in enough")
    if "paper" in entries[0]:
        table = new_table(
            "the paper's numbers of active tokens: mean (median)", ("", *(f"{one.pair[0]} → {one.pair[1]}" for one in results))
        )
        for name in entries[0]["paper"]:
            numbers = [entry["paper"][name] for entry in entries]
            table.add_row(name, *(f"{one['mean']:.3g} ({one['0.5']:.3g})" for one in numbers))
        console().print(table)
    notes = (
        "medians over features; +shift: of the identity moved by the difference of means; ceil.: of what any linear map could explain; "
        "rand.: of random directions; then how many features are transported, mixed, synthesised, undetermined. Active scores are of "
        "features active in at least 50 tokens of 10 documents; R² of active tokens alone conditions on the outcome, and says little "
        "without the others."
    )
    console().print(notes, style="dim", highlight=False)


def finish_accumulation(accumulated: Accumulated, out: Path, as_json: bool, shard: Shard | None = None) -> None:
    """Say what moments a folder holds now, or which shard of them."""
    from nnato.accumulation import FILE

    moments, file = accumulated.moments, out.expanduser() / FILE
    size = sum(path.stat().st_size for path in (file, *moments.files))
    if as_json:
        record = {
            "path": str(file),
            "sites": [site.key for site in moments.sites],
            "pairs": [[s.key, t.key] for s, t in moments.pairs],
            "tokens": accumulated.tokens,
            "excluded_tokens": sum(accumulated.excluded.values()),
            "excluded": accumulated.excluded,
            "sink_tokens": accumulated.sink_tokens,
            "bytes": size,
        }
        print_json(accumulated.model, accumulated.text, record)
        return
    show_accumulated(accumulated)
    what, then = (f"Shard {shard} of", "nnato merge, with all shards") if shard else ("", f"nnato fit {out}")
    pairs = f"{len(moments.pairs)} pair{'s' * (len(moments.pairs) != 1)}"
    say(f"{what} {pairs} in {out} ({size / 1e6:,.0f} MB). Next: {then}".lstrip())


def show_generation(result: Generation) -> None:
    """Texts under each other, the prompt in front."""
    where = ", ".join(f"{source} → {target}" for source, target in result.pairs)
    for name, one in [("unedited", result.unedited), *result.edited.items()]:
        same = "" if one is result.unedited else f" at {where}; as unedited for {result.same(name)} of {len(one.ids)} tokens"
        console().print(f"{name}{same}", style="bold", highlight=False)
        say(result.prompt + one.text)


def show_ablations(results: list[AblationResult]) -> None:
    """Tables of losses under interventions, three per pair: more columns than that do not fit beside the longest name."""
    for result in results:
        title = f"{result.name()}: {result.draws.describe()}, {result.size()}"
        distances = next(iter(result.effects.values())).by_distance
        shown = [place for place, one in enumerate(distances) if one.first in (1, 4, 16)]
        losses = new_table(title, ("put in", "log-ppl", "Δloss at edits", "Δ after", "recov."))
        losses.add_row("(unedited)", f"{result.log_perplexity:.3f}")
        changes = new_table("", ("put in", "over transport", "KL at edits", "KL after"))
        behind = new_table("", ("put in", "top-1", *(f"Δ +{distances[place].first}" for place in shown)))
        for name, effect in result.effects.items():
            at, over, recovered = effect.delta_loss_at_edit, effect.minus_transport, effect.loss_recovered_mean
            style = "bold" if name == "transport" else None
            losses.add_row(
                name,
                f"{effect.log_perplexity:.3f}",
                f"{at.value:+.2f} [{at.low:.2f}, {at.high:.2f}]",
                f"{effect.delta_loss.value:+.3f}",
                f"{recovered:.2f}" if recovered == recovered else "-",
                style=style,
            )
            changes.add_row(
                name,
                f"{over.value:+.3f} [{over.low:.3f}, {over.high:.3f}]" if over else "",
                with_error(effect.kl_at_edit),
                with_error(effect.kl_after),
                style=style,
            )
            later = (f"{effect.by_distance[place].delta_loss.value:+.3f}" for place in shown)
            behind.add_row(name, with_error(effect.agreement), *later, style=style)
        for table in (losses, changes, behind):
            console().print(table)
        if result.unedited:
            say(f"{result.unedited} sequences have no such position: they count as unchanged in log-ppl, and nowhere else")
    notes = (
        f"nats; 95 % intervals, paired bootstrap over {results[0].documents} documents. Δloss at the edited positions; Δ after: over all "
        "positions from the first edit on; over transport: how much more of the latter; recov.: loss recovered, 0 as bad as the mean, "
        "1 unharmed. KL: of the edited next-token distribution from the unedited; top-1: how often the most likely token stays, from the "
        "first edit on; Δ +n: Δloss n positions behind an edit, or in the bin that begins there."
    )
    if any(all(effect.kl_after.value == 0 for effect in result.effects.values()) for result in results):
        notes += " KL after is 0 where the target is the last block: nothing behind it carries an edit to other positions."
    console().print(notes, style="dim", highlight=False)
