"""Does any operator beat copying the source residual? Δloss and KL at every leap into one target, with intervals.

Ridge with the penalty chosen by R² of validation documents, the same with the penalty chosen by the loss of validation sequences, ridge shrunk to
the identity, reduced-rank ridge, against the identity, the identity moved by the difference of means, mean, resample and zero; all on the same
positions of the same test sequences. Writes leaps.json and leaps.png into --out.

    nnato accumulate --pairs 2:10,3:10,4:10,5:10,6:10,7:10,8:10,9:10 --out moments/
    python examples/leaps.py moments/ --out leaps/
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nnato import AblationResult, Corpus, Method, TransportOperator, ablate, fit, load_model, load_moments
from nnato.accumulation import tokenize
from nnato.cli.common import write_json
from nnato.controls import controls_of
from nnato.sites import Pair
from nnato.storage import prepare_folder, provenance

CANDIDATES = ("by_loss", "shrunk_to_identity")
REFERENCES = ("identity", "identity_shift", "mean", "resample", "zero")


def with_penalty(accumulated: Any, pair: Pair, kappa: float, name: str) -> TransportOperator:
    """The ridge operator of one penalty."""
    operator = fit(accumulated, [pair], method=Method(kappas=(kappa,)))[0].operator
    return dataclasses.replace(operator, name=name)


def chosen_by_loss(model: Any, blocks: Any, operators: list[TransportOperator], accumulated: Any, count: int, factors: list[float]) -> Any:
    """For each pair the penalty, among multiples of the one that R² chose, with the smallest mean Δloss on validation sequences."""
    trials = [
        with_penalty(accumulated, operator.pair, operator.details["kappa"] * factor, f"times_{factor:g}")
        for operator in operators
        for factor in factors
    ]
    names = ["transport", *(f"times_{factor:g}" for factor in factors)]
    results = ablate(model, operators, blocks, interventions=names, controls=trials, sequences=count, split="validation", progress=say)
    chosen, table = [], []
    for operator, result in zip(operators, results, strict=True):
        losses = {name: effect.delta_loss.value for name, effect in result.effects.items()}
        best = min(losses, key=losses.__getitem__)
        factor = 1.0 if best == "transport" else float(best.removeprefix("times_"))
        kappa = operator.details["kappa"] * factor
        chosen.append(with_penalty(accumulated, operator.pair, kappa, "by_loss"))
        table.append({"pair": str(result.name()), "kappa_by_r2": operator.details["kappa"], "kappa_by_loss": kappa, "losses": losses})
    return chosen, table


def say(stage: str, done: int, total: int | None) -> None:
    """Progress."""
    print(stage, done, total, flush=True)


def draw(results: list[AblationResult], path: Path, about: str) -> None:
    """Log-perplexity, and Δloss at the edits, against the leap, one line per intervention, with 95 % intervals."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(results[0].effects):
        leaps = [result.pair[1] - result.pair[0] + 0.02 * number for result in results]
        effects = [result.effects[name] for result in results]
        for axes, values, base in (
            (left, [effect.delta_loss_diluted for effect in effects], results[0].log_perplexity),
            (right, [effect.delta_loss_at_edit for effect in effects], 0.0),
        ):
            middle = [value.value + base for value in values]
            errors = [[value.value - value.low for value in values], [value.high - value.value for value in values]]
            axes.errorbar(leaps, middle, yerr=errors, marker="o", markersize=3, capsize=2, linewidth=1, label=name, color=f"C{number}")
    left.axhline(results[0].log_perplexity, color="black", linewidth=1)
    left.set_ylabel("log-perplexity over all predictions, nats (line: unedited)")
    right.set_yscale("log")
    right.set_ylabel("Δloss at the edited positions, nats (log scale)")
    right.legend(fontsize=7, ncols=2)
    for axes in (left, right):
        axes.set_xlabel(f"leap into block {results[0].pair[1]}")
    first = results[0]
    how = f"{first.draws.describe()}, {first.sequences} sequences of {first.documents} documents, {first.tokens:,} tokens"
    figure.suptitle(f"{about} · {how}, 95 % intervals", fontsize=9)
    figure.savefig(path, dpi=130)


def rows(results: list[AblationResult]) -> list[dict[str, Any]]:
    """What the table of the documentation shows, in plain data."""
    found = []
    for result in results:
        for name, effect in result.effects.items():
            found.append(
                {
                    "leap": result.pair[1] - result.pair[0],
                    "put_in": name,
                    "log_perplexity": effect.log_perplexity,
                    "delta_loss": effect.delta_loss.to_json(),
                    "delta_loss_at_edit": effect.delta_loss_at_edit.to_json(),
                    "kl": effect.kl_interval.to_json(),
                    "kl_at_edit": effect.kl_at_edit.to_json(),
                    "minus_transport": effect.minus_transport.to_json() if effect.minus_transport else None,
                    "at_edit_minus_transport": effect.at_edit_minus_transport.to_json() if effect.at_edit_minus_transport else None,
                    "kl_minus_transport": effect.kl_minus_transport.to_json() if effect.kl_minus_transport else None,
                    "top1_agreement": effect.agreement.to_json(),
                }
            )
    return found


def main() -> None:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moments", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("leaps"))
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--validation", type=int, default=12, help="Validation sequences that choose the penalty by loss.")
    parser.add_argument("--positions", default="5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--ranks", default="16,64,256")
    parser.add_argument("--factors", default="0.1,10", help="Multiples of the penalty chosen by R² that are tried.")
    arguments = parser.parse_args()
    folder = prepare_folder(arguments.out)
    accumulated = load_moments(arguments.moments)
    model = load_model(arguments.model or accumulated.model["name"])
    text = accumulated.text
    keys = ("source", "tokens", "per_document", "column")
    blocks = tokenize(model, Corpus(**{key: text[key] for key in keys}, context=arguments.context), say)
    operators = [result.operator for result in fit(accumulated)]
    factors = [float(factor) for factor in arguments.factors.split(",")]
    by_loss, choice = chosen_by_loss(model, blocks, operators, accumulated, arguments.validation, factors)
    ranks = [f"rank_{rank}" for rank in arguments.ranks.split(",")]
    controls = [*by_loss, *controls_of(accumulated, operators, ["shrunk_to_identity", *ranks])]
    names = ["transport", *CANDIDATES, *ranks, *REFERENCES]
    results = ablate(
        model,
        operators,
        blocks,
        positions=arguments.positions,
        interventions=names,
        controls=controls,
        sequences=arguments.sequences,
        seeds=arguments.seeds,
        progress=say,
    )
    results.sort(key=lambda result: result.pair[1] - result.pair[0])
    about = f"{accumulated.model['name']}, {text['source']}"
    draw(results, folder / "leaps.png", about)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    first = results[0]
    sizes = {"sequences": first.sequences, "documents": first.documents, "tokens": first.tokens, "seeds": list(first.draws.seeds)}
    write_json(
        folder / "leaps.json",
        {"about": about, "settings": settings, **sizes, "penalties": choice, "rows": rows(results), "provenance": provenance()},
    )


if __name__ == "__main__":
    main()
