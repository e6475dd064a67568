"""`nnato features`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato.cli import common, feature_choice, feature_show, feature_words, tables
from nnato.cli.running import Group

if TYPE_CHECKING:
    from nnato.accumulation import Accumulated
    from nnato.active_scores import FeaturePass
    from nnato.corpus import TokenBlocks
    from nnato.features import FeatureResult
    from nnato.nnsight_setup import TransformersModel
    from nnato.statistics import Progress


@click.group("features", cls=Group)
def command() -> None:
    """Features of sparse autoencoders: transported, or synthesised?"""


@common.command("evaluate")
@click.argument("moments", required=False, type=click.Path(path_type=Path))
@click.option("--target", required=True, help="The site of the SAE.")
@common.sae_option
@click.option("--leap", help="Leaps before --target, for example 1-8.  [default: all sources that the moments hold]")
@click.option(
    "--features",
    "chosen",
    default="all",
    show_default=True,
    help="all, numbers (819 is latent 819), or a JSON file: a list of them, or what nnato features select wrote.",
)
@click.option("--preset", type=click.Choice(["paper"]), help="Also the paper's ten numbers of active tokens (active: above 1e-6).")
@click.option("--high", type=float, default=0.5, show_default=True, help="R² from which a feature is transported.")
@click.option("--low", type=float, default=0.2, show_default=True, help="Ceiling up to which a feature is synthesised.")
@click.option("--rate", type=float, default=0.05, show_default=True, help="False-discovery rate of both.")
@click.option("--random", type=click.IntRange(min=1), default=512, show_default=True, help="Random directions to judge beside them.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of these, and of controls that are active as often.")
@click.option("--moments-only", is_flag=True, help="Do not read the test documents again: scores of all tokens only.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    help="Encode predictions of one test token in so many; 1 for all.  [default: so many that about 4,096 tokens are]",
)
@click.option("--force", is_flag=True, help="Go on with fewer than 5 effective tokens per dimension.")
@common.device_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder for numbers (JSON, CSV), figures, and checkpoints of the pass.")
@common.json_option
def _evaluate(
    moments: Path | None,
    target: str,
    sae: str,
    leap: str | None,
    chosen: str,
    preset: str | None,
    high: float,
    low: float,
    rate: float,
    random: int,
    seed: int,
    moments_only: bool,
    sample: int | None,
    force: bool,
    device: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Judge operators into a site by the decoder directions of an SAE. From MOMENTS (by default the embedded model's, cached).

    Of all test tokens, R² with intervals over documents, ceilings and verdicts; from one more pass over the test documents, scores where
    features are active, and of the activations of predictions. Chosen features are judged beside others that are active as often.

    \b
    Examples:
      nnato features evaluate --target 9 --sae sae-9/
      nnato features evaluate --target 9 --sae sae-9/ \\
        --features selected/selected.json
      nnato features evaluate moments/ --target 20 --leap 1-8 \\
        --sae gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical
    """
    import torch

    from nnato.dictionaries import load_dictionary
    from nnato.errors import DictionaryError
    from nnato.feature_pass import feature_pass
    from nnato.features import check_latents, evaluate_features
    from nnato.verdicts import Thresholds

    limits, selection = Thresholds(high, low, rate), feature_choice.chosen_features(chosen)
    if moments_only and preset is not None:
        raise DictionaryError("the paper's numbers are of active tokens: leave --moments-only away")
    folder = common.output_folder(out)
    dictionary = load_dictionary(sae)
    if selection is not None:
        selection.check_fits(dictionary)
    latents = check_latents(dictionary, None if selection is None else selection.features)
    with common.progress_bar() as progress:
        accumulated = common.open_moments(moments, progress)
        pairs = common.pairs_to_target(accumulated, target, leap) or ()
        dictionary.check_fits(accumulated.model, pairs[0][1])
        seen = None if moments_only else opened(accumulated, device, progress)
        judged = latents
        if selection is not None:
            control = feature_choice.controls(selection, dictionary, pairs[0][1], seen, seed, progress)
            judged = latents if control is None else torch.cat([latents, control])
        found = evaluate_features(
            accumulated, dictionary, pairs, judged, thresholds=limits, random=random, seed=seed, force=force, progress=progress
        )
        passed = None
        if seen is not None:
            passed = feature_pass(
                *seen,
                dictionary,
                [result.operator for result in found],
                None if selection is None else judged,
                paper=preset == "paper",
                sample=sample,
                file=None if folder is None else folder / "pass.safetensors",
                progress=progress,
            )
    results = _Results(found, len(latents), passed)
    entries = [results.entry(place) for place in range(len(found))]
    record = {"sae": dictionary.fingerprint(), "pairs": entries}
    if folder is not None:
        from nnato.feature_plots import r2_by_leap, r2_distributions, trajectories

        common.write_json(folder / "features.json", record)
        common.write_csv(folder / "features.csv", [row for place in range(len(found)) for row in results.rows(place)])
        about = common.about(accumulated.model, accumulated.text)
        r2_by_leap(results.selected, folder / "features.png", about)
        r2_distributions(results.selected, folder / "distributions.png", about)
        trajectories(results.selected, folder / "trajectories.png", about)
    if as_json:
        common.print_json(accumulated.model, accumulated.text, record, seed)
        return
    tables.show_accumulated(accumulated)
    tables.show_features(results.selected, entries)
    if results.matched:
        feature_choice.show_bias(list(zip(results.selected, results.matched, strict=True)))
    if out is not None:
        common.say(f"features.json, features.csv, features.png, distributions.png and trajectories.png in {out}")


command.add_command(_evaluate)
command.add_command(feature_choice.select)
command.add_command(feature_words.explain)
command.add_command(feature_show.show)


def opened(accumulated: Accumulated, device: str | None, progress: Progress) -> tuple[TransformersModel, TokenBlocks]:
    """The model and the text of moments."""
    from nnato.accumulation import tokenize
    from nnato.corpus import Corpus
    from nnato.errors import TextError

    model = common.load(accumulated.model["name"], device, "float32", progress)
    keys = ("source", "context", "tokens", "per_document", "column", "folds")
    blocks = tokenize(model, Corpus(**{key: accumulated.text[key] for key in keys}), progress)
    if blocks.fingerprint["digest"] != accumulated.text["digest"]:
        raise TextError(f"text {accumulated.text['source']!r} is not what the moments are of any more: use --moments-only")
    return model, blocks


class _Results:
    """Results of chosen features and of their controls, which were judged together."""

    def __init__(self, found: list[FeatureResult], count: int, passed: FeaturePass | None) -> None:
        import torch

        self.passed, self.count = passed, count
        alone = len(found[0].features) == count
        self.selected = found if alone else [one.only(torch.arange(count)) for one in found]
        self.matched = [] if alone else [one.only(torch.arange(count, len(one.features))) for one in found]

    def entry(self, place: int) -> dict[str, Any]:
        """A pair in JSON; of active scores only those of features with enough tokens, and how many these are."""
        from nnato.feature_controls import selection_bias, to_json

        entry = self.selected[place].summary()
        if self.matched:
            matched = self.matched[place]
            entry["matched"] = {name: matched.summary()[name] for name in ("r2", "ceiling", "relative", "verdicts")}
            entry["selection"] = to_json(selection_bias(self.selected[place], matched))
        if self.passed is not None:
            entry["active"] = self.passed.summary(place, slice(self.count))
            if self.matched:
                entry["matched"]["active"] = self.passed.summary(place, slice(self.count, None))
            if self.passed.absolute is not None:
                entry["paper"] = self._paper(self.passed, place)
        return entry

    def _paper(self, passed: FeaturePass, place: int) -> dict[str, Any]:
        """Mean and quantiles of the paper's numbers over features with enough active tokens."""
        from nnato.active_scores import paper_metrics
        from nnato.sums import quantiles

        known = passed.reasons()[: self.count] == 0
        found = {name: values[: self.count][known] for name, values in paper_metrics(passed, place).items()}
        return {name: {"mean": float(values.nanmean()), **quantiles(values)} for name, values in found.items()}

    def rows(self, place: int) -> list[dict[str, Any]]:
        """The rows of the CSV file: one for each feature."""
        from nnato.active_scores import paper_metrics

        rows = _rows(self.selected[place])
        if self.passed is not None and self.passed.absolute is not None:
            for name, values in paper_metrics(self.passed, place).items():
                for row, value in zip(rows, values.tolist(), strict=False):
                    row[name] = value
        return rows


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
