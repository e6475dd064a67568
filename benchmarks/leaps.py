"""Does any operator beat copying the source residual? Δloss and KL at every leap into one target, with intervals.

Ridge with the penalty chosen by R² of validation documents, the same with the penalty chosen by the loss of validation sequences, ridge
shrunk to the identity, and reduced-rank ridge of several ranks, against the identity and the identity moved by the difference of means; and
mean, resample and zero, which do not depend on the leap. All at the same positions of the same test sequences. Writes NAME.json, a
leap at a time, so that the same command goes on behind the last one, and prints the tables of the documentation.

    nnato accumulate --pairs 2:10,3:10,4:10,5:10,6:10,7:10,8:10,9:10 --out moments/
    python benchmarks/leaps.py moments/ --sequences 16 --validation 6 --name leaps-gemma-3-270m
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from common import RESULTS

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
RERUN = ("out", "name")
"""Settings that say where results go, not what they are."""


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


def chosen_by_loss(model: Any, blocks: Any, operator: TransportOperator, accumulated: Any, count: int, factors: list[float]) -> Any:
    """The penalty, among multiples of the one that R² chose, with the smallest mean Δloss on validation sequences; and what was tried."""
    trials = with_penalties(accumulated, operator, factors)
    names = ["transport", *(trial.name for trial in trials)]
    (result,) = ablate(model, [operator], blocks, interventions=names, controls=trials, sequences=count, split="validation")
    losses = {name: effect.delta_loss.value for name, effect in result.effects.items()}
    best = min(losses, key=losses.__getitem__)
    found = next((trial for trial in trials if trial.name == best), operator)
    kappas = {"kappa_by_r2": operator.details["kappa"], "kappa_by_loss": found.details["kappa"]}
    return dataclasses.replace(found, name="by_loss"), {"pair": result.name(), **kappas, "losses": losses}


def rows(result: AblationResult) -> list[dict[str, Any]]:
    """What figures and tables show, in plain data."""
    return [
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
        for name, effect in result.effects.items()
    ]


def markdown(record: dict[str, Any]) -> str:
    """Two tables of the documentation from what the JSON holds: of Δloss at the edits, and of KL from the first edit on."""
    names = list(dict.fromkeys(row["put_in"] for row in record["rows"] if row["put_in"] != "transport"))
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


def begun(path: Path, settings: dict[str, str]) -> dict[str, Any] | None:
    """What an interrupted run of these settings has measured already."""
    record = json.loads(path.read_text()) if path.exists() else None
    return record if record is not None and record["settings"] == settings else None


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moments", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="leaps")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--validation", type=int, default=8, help="Validation sequences that choose the penalty by loss.")
    parser.add_argument("--positions", default="5")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--ranks", default="8,64,256")
    parser.add_argument("--factors", default="0.1,10", help="Multiples of the penalty chosen by R² that are tried.")
    arguments = parser.parse_args()
    path = prepare_folder(arguments.out) / f"{arguments.name}.json"
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in RERUN}
    accumulated = load_moments(arguments.moments)
    settings["moments"] = accumulated.provenance["command"]
    model = load_model(arguments.model or accumulated.model["name"])
    keys = ("source", "tokens", "per_document", "column")
    blocks = tokenize(model, Corpus(**{key: accumulated.text[key] for key in keys}, context=arguments.context))
    ranks = [f"rank_{rank}" for rank in arguments.ranks.split(",")]
    names = ["transport", *CANDIDATES, *ranks, *COPIES]
    how = {"positions": arguments.positions, "sequences": arguments.sequences, "seeds": arguments.seeds}
    factors = [float(factor) for factor in arguments.factors.split(",")]
    record = begun(path, settings)
    for source, target in sorted(accumulated.moments.pairs, reverse=True):
        if record is not None and any(row["leap"] == target - source for row in record["rows"]):
            continue
        print(f"{source} → {target}", flush=True)
        (operator,) = (found.operator for found in fit(accumulated, [(source.key, target.key)]))
        by_loss, choice = chosen_by_loss(model, blocks, operator, accumulated, arguments.validation, factors)
        controls = [by_loss, *controls_of(accumulated, [operator], ["shrunk_to_identity", *ranks])]
        (result,) = ablate(model, [operator], blocks, interventions=names, controls=controls, **how)
        if record is None:
            (references,) = ablate(model, [operator], blocks, interventions=REFERENCES, **how)
            record = {
                "about": f"{accumulated.model['name']}, {accumulated.text['source']}",
                "settings": settings,
                "target": str(target),
                "positions": result.draws.describe(),
                "log_perplexity": result.log_perplexity,
                "sequences": result.sequences,
                "documents": result.documents,
                "tokens": result.tokens,
                "training_tokens": operator.details["training_tokens"],
                "seeds": list(result.draws.seeds),
                "penalties": [],
                "rows": [],
                "references": rows(references),
                "provenance": provenance(),
            }
        record["penalties"].append(choice)
        record["rows"] += rows(result)
        write_json(path, record)
    if record is not None:
        print(markdown(record))


if __name__ == "__main__":
    main()
