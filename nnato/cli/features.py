"""`nnato features`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato.cli import common, tables

if TYPE_CHECKING:
    from nnato.accumulation import Accumulated
    from nnato.active_scores import FeaturePass
    from nnato.dictionaries import Dictionary
    from nnato.features import FeatureResult
    from nnato.statistics import Progress


@click.group("features")
def command() -> None:
    """Features of sparse autoencoders: transported, or synthesised?"""


@common.command("evaluate")
@click.argument("moments", required=False, type=click.Path(path_type=Path))
@click.option("--target", required=True, help="The site of the SAE.")
@click.option("--sae", required=True, help="A folder of sae_lens, a params.npz of Gemma Scope, RELEASE/ID, or mlsae:PATH.")
@click.option("--leap", help="Leaps before --target, for example 1-8.  [default: all sources that the moments hold]")
@click.option("--features", "chosen", default="all", show_default=True, help="all, numbers (3,17), or a JSON file with a list of them.")
@click.option("--high", type=float, default=0.5, show_default=True, help="R² from which a feature is transported.")
@click.option("--low", type=float, default=0.2, show_default=True, help="Ceiling up to which a feature is synthesised.")
@click.option("--rate", type=float, default=0.05, show_default=True, help="False-discovery rate of both.")
@click.option("--random", type=click.IntRange(min=1), default=512, show_default=True, help="Random directions to judge beside them.")
@click.option("--moments-only", is_flag=True, help="Do not read the test documents again: scores of all tokens only.")
@click.option("--force", is_flag=True, help="Go on with fewer than 5 effective tokens per dimension.")
@click.option("--device", help="Where to run: cpu, cuda, cuda:1.  [default: a GPU if there is one]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for numbers (JSON, CSV) and figures.")
@common.json_option
def _evaluate(
    moments: Path | None,
    target: str,
    sae: str,
    leap: str | None,
    chosen: str,
    high: float,
    low: float,
    rate: float,
    random: int,
    moments_only: bool,
    force: bool,
    device: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Judge operators into a site by the decoder directions of an SAE. From MOMENTS (by default the embedded model's, cached).

    Of all test tokens, R² with intervals over documents, ceilings and verdicts; from one more pass over the test documents, scores where
    features are active, and of the activations of predictions.

    \b
    Examples:
      nnato features evaluate --target 9 --sae sae-9/
      nnato features evaluate moments/ --target 20 --leap 1-8 \\
        --sae gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical
    """
    from nnato.dictionaries import load_dictionary
    from nnato.features import check_latents, evaluate_features
    from nnato.verdicts import Thresholds

    limits, numbers = Thresholds(high, low, rate), _numbers(chosen)
    folder = common.output_folder(out)
    dictionary = load_dictionary(sae)
    check_latents(dictionary, numbers)
    with common.progress_bar() as progress:
        accumulated = common.open_moments(moments, progress)
        pairs = common.pairs_to_target(accumulated, target, leap) or ()
        results = evaluate_features(
            accumulated, dictionary, pairs, numbers, thresholds=limits, random=random, force=force, progress=progress
        )
        seen = None if moments_only else _pass(accumulated, dictionary, results, numbers, device, progress)
    record = {"sae": dictionary.fingerprint(), "pairs": [_entry(result, place, seen) for place, result in enumerate(results)]}
    if folder is not None:
        from nnato.feature_plots import r2_by_leap

        common.write_json(folder / "features.json", record)
        common.write_csv(folder / "features.csv", [row for result in results for row in _rows(result)])
        r2_by_leap(results, folder / "features.png", common.about(accumulated.model, accumulated.text))
    if as_json:
        common.print_json(accumulated.model, accumulated.text, record)
        return
    tables.show_accumulated(accumulated)
    tables.show_features(results, seen)
    if out is not None:
        common.say(f"features.json, features.csv and features.png in {out}")


command.add_command(_evaluate)


def _numbers(text: str) -> list[int] | None:
    """The latents that an option names; None for all."""
    from nnato.errors import DictionaryError

    if text == "all":
        return None
    parts: list[Any] = text.split(",")
    if not all(str(part).strip().isdecimal() for part in parts):
        try:
            parts = json.loads(Path(text).expanduser().read_text())
        except (OSError, ValueError, RecursionError):
            parts = []
    if not isinstance(parts, list) or not parts or not all(str(part).strip().isdecimal() and len(str(part)) < 10 for part in parts):
        raise DictionaryError(f"features {text!r}: write all, numbers such as 3,17, or name a JSON file that holds a list of them")
    return [int(part) for part in parts]


def _pass(
    accumulated: Accumulated,
    dictionary: Dictionary,
    results: list[FeatureResult],
    numbers: list[int] | None,
    device: str | None,
    progress: Progress,
) -> FeaturePass:
    """One pass over the test documents of the moments."""
    from nnato.accumulation import tokenize
    from nnato.corpus import Corpus
    from nnato.errors import TextError
    from nnato.feature_pass import feature_pass

    model = common.load(accumulated.model["name"], device, "float32", progress)
    keys = ("source", "context", "tokens", "per_document", "column", "folds")
    blocks = tokenize(model, Corpus(**{key: accumulated.text[key] for key in keys}), progress)
    if blocks.fingerprint["digest"] != accumulated.text["digest"]:
        raise TextError(f"text {accumulated.text['source']!r} is not what the moments are of any more: use --moments-only")
    return feature_pass(model, blocks, dictionary, [result.operator for result in results], numbers, progress=progress)


def _entry(result: FeatureResult, place: int, seen: FeaturePass | None) -> dict[str, Any]:
    """A pair in JSON; of active scores only those of features with enough tokens, and how many these are."""
    entry = result.summary()
    if seen is not None:
        entry["active"] = seen.summary(place)
    return entry


def _rows(result: FeatureResult) -> list[dict[str, Any]]:
    """The rows of the CSV file: one for each feature."""
    r2, ceiling = result.scores.r2["transport"], result.scores.ceiling
    return [
        {
            "source": result.pair[0],
            "target": result.pair[1],
            "feature": int(feature),
            "verdict": result.verdicts.name(place),
            "r2": float(r2.value[place]),
            "r2_low": float(r2.low[place]),
            "r2_high": float(r2.high[place]),
            "ceiling": float(ceiling.value[place]),
            "relative": float(result.relative.value[place]),
            "membership": float(result.scores.membership[place]),
        }
        for place, feature in enumerate(result.features)
    ]
