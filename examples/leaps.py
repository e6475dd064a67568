"""Does any operator beat copying the source residual? Δloss and KL at every leap into one target, with intervals.

Ridge with the penalty chosen by R² of validation documents, the same with the penalty chosen by the loss of validation sequences, ridge
shrunk to the identity, and reduced-rank ridge, against the identity and the identity moved by the difference of means; and mean, resample
and zero, which do not depend on the leap. All at the same positions of the same test sequences. Writes leaps.json, leaps.md and
leaps.png into --out.

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
from nnato.controls import rows as rows_of
from nnato.selection import Solver
from nnato.storage import prepare_folder, provenance

CANDIDATES = ("by_loss", "shrunk_to_identity")
COPIES = ("identity", "identity_shift")
REFERENCES = ("mean", "resample", "zero")


def with_penalties(accumulated: Any, operator: TransportOperator, factors: list[float]) -> list[TransportOperator]:
    """The ridge operators of some multiples of an operator's penalty."""
    train, validation = (rows_of(accumulated, split, operator.pair) for split in ("train", "validation"))
    made = []
    for factor in factors:
        kappa = operator.details["kappa"] * factor
        weight = Solver(Method(kappas=(kappa,))).solve(train, validation).weight
        details = {**operator.details, "kappa": kappa}
        made.append(dataclasses.replace(operator, weight=weight, name=f"times_{factor:g}", details=details))
    return made


def chosen_by_loss(model: Any, blocks: Any, operators: list[TransportOperator], accumulated: Any, count: int, factors: list[float]) -> Any:
    """For each pair the penalty, among multiples of the one that R² chose, with the smallest mean Δloss on validation sequences."""
    trials = [trial for operator in operators for trial in with_penalties(accumulated, operator, factors)]
    names = ["transport", *(f"times_{factor:g}" for factor in factors)]
    results = ablate(model, operators, blocks, interventions=names, controls=trials, sequences=count, split="validation", progress=say)
    chosen, table = [], []
    for operator, result in zip(operators, results, strict=True):
        losses = {name: effect.delta_loss.value for name, effect in result.effects.items()}
        best = min(losses, key=losses.__getitem__)
        found = next((trial for trial in trials if (trial.pair, trial.name) == (operator.pair, best)), operator)
        chosen.append(dataclasses.replace(found, name="by_loss"))
        kappas = {"kappa_by_r2": operator.details["kappa"], "kappa_by_loss": found.details["kappa"]}
        table.append({"pair": result.name(), **kappas, "losses": losses})
    return chosen, table


def say(stage: str, done: int, total: int | None) -> None:
    """Progress."""
    print(stage, done, total, flush=True)


def draw(results: list[AblationResult], references: AblationResult, path: Path, about: str) -> None:
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
    for name, style in zip(references.effects, (":", "--", "-."), strict=True):
        left.axhline(references.effects[name].log_perplexity, color="grey", linewidth=1, linestyle=style)
        right.axhline(references.effects[name].delta_loss_at_edit.value, color="grey", linewidth=1, linestyle=style, label=name)
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
                    "delta_loss_diluted": effect.delta_loss_diluted.to_json(),
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


def markdown(record: dict[str, Any]) -> str:
    """Two tables of the documentation from what leaps.json holds: of Δloss at the edits, and of KL from the first edit on."""
    names = [row["put_in"] for row in record["rows"] if row["leap"] == 1 and row["put_in"] != "transport"]
    parts = []
    for title, own, against, digits in (
        ("Δloss at the edits, nats", "delta_loss_at_edit", "at_edit_minus_transport", 3),
        ("KL from the first edit on, nats", "kl", "kl_minus_transport", 4),
    ):
        lines = [f"| leap | ridge: {title} | " + " | ".join(f"{name} - ridge" for name in names) + " |", "|---" * (len(names) + 2) + "|"]
        for leap in sorted({row["leap"] for row in record["rows"]}):
            mine = {row["put_in"]: row for row in record["rows"] if row["leap"] == leap}
            cells = [_cell(mine["transport"][own], digits), *(_cell(mine[name][against], digits) for name in names)]
            lines.append(f"| {leap} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(interval: dict[str, float], digits: int) -> str:
    """A number with its interval, in bold if that excludes zero."""
    text = f"{interval['value']:+.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"
    return f"**{text}**" if interval["low"] > 0 or interval["high"] < 0 else text


def main() -> None:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moments", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("leaps"))
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--validation", type=int, default=8, help="Validation sequences that choose the penalty by loss.")
    parser.add_argument("--positions", default="5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--ranks", default="64,256")
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
    names = ["transport", *CANDIDATES, *ranks, *COPIES]
    how = {"positions": arguments.positions, "sequences": arguments.sequences, "seeds": arguments.seeds, "progress": say}
    results = ablate(model, operators, blocks, interventions=names, controls=controls, **how)
    references = ablate(model, operators[-1:], blocks, interventions=REFERENCES, **how)[0]
    results.sort(key=lambda result: result.pair[1] - result.pair[0])
    about = f"{accumulated.model['name']}, {text['source']}"
    settings = {key: str(value) for key, value in vars(arguments).items()}
    first = results[0]
    sizes = {"sequences": first.sequences, "documents": first.documents, "tokens": first.tokens, "seeds": list(first.draws.seeds)}
    record = {
        "about": about,
        "settings": settings,
        "target": str(first.pair[1]),
        "positions": first.draws.describe(),
        "log_perplexity": first.log_perplexity,
        **sizes,
        "penalties": choice,
        "rows": rows(results),
        "references": rows([references]),
        "provenance": provenance(),
    }
    write_json(folder / "leaps.json", record)
    draw(results, references, folder / "leaps.png", about)
    (folder / "leaps.md").write_text(markdown(record))


if __name__ == "__main__":
    main()
