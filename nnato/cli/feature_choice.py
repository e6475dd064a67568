"""`nnato features select`, and what `nnato features evaluate` does with a selection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato.cli import common
from nnato.cli.tables import new_table

if TYPE_CHECKING:
    import torch

    from nnato.corpus import TokenBlocks
    from nnato.dictionaries import Dictionary
    from nnato.feature_selection import Chosen, Selection
    from nnato.features import FeatureResult
    from nnato.nnsight_setup import TransformersModel
    from nnato.sites import ResidualSite
    from nnato.statistics import Progress

FILE = "selected.json"
NOTE = "same rates: other features, drawn among those active as often; 95 % over features"


@common.command("select")
@click.argument("model", required=False)
@click.option("--target", required=True, help="The site of the SAE.")
@common.sae_option
@click.option("--preset", type=click.Choice(["corrected", "paper"]), default="corrected", show_default=True, help="Paper: as its code.")
@click.option("--top", default="5%", show_default=True, help="How many to keep, as a share of all latents.")
@click.option("--sequences", type=int, default=4, show_default=True, help="Of each candidate, to measure what it does to the loss.")
@click.option("--seed", type=int, default=0, show_default=True)
@common.text_options
@common.batch_option
@common.model_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("selected"), show_default=True, help="Folder for the result.")
@common.json_option
def select(
    model: str | None,
    target: str,
    sae: str,
    preset: str,
    top: str,
    sequences: int,
    seed: int,
    batch_size: int,
    device: str | None,
    dtype: str,
    out: Path,
    as_json: bool,
    **text: Any,
) -> None:
    """Choose features of an SAE of MODEL that are worth judging.

    By training documents: the tokens at which features are active, the words that they write, how alike they are, the loss without them.
    The result is a JSON file for nnato features evaluate --features FILE. Interrupted, the same command resumes.

    \b
    Examples:
      nnato features select --target 9 --sae sae-9/ --top 5%
      nnato features select google/gemma-2-2b --target 20 --preset paper \\
        --sae gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71
    """
    from nnato.accumulation import default_corpus
    from nnato.dictionaries import load_dictionary
    from nnato.feature_selection import select_features
    from nnato.models import describe

    share, folder = _share(top), common.output_folder(out)
    dictionary = load_dictionary(sae)
    with common.progress_bar() as progress:
        loaded = common.load(model or dictionary.model.get("name"), device, dtype, progress)
        found = select_features(
            loaded,
            dictionary,
            target,
            common.make_corpus(default_corpus(describe(loaded)), **text),
            preset=preset,
            top=share,
            sequences=sequences,
            seed=seed,
            batch_size=batch_size,
            file=folder / "pass.safetensors",
            progress=progress,
        )
    record = found.to_json()
    common.write_json(folder / FILE, record)
    if as_json:
        common.print_json(dict(found.about["model"]), dict(found.about["text"]), {"path": str(folder / FILE), **record}, seed)
        return
    _show(found, folder / FILE)


def _share(text: str) -> float:
    """Read `5%` or `0.05`."""
    from nnato.errors import DictionaryError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise DictionaryError(f"top {text!r}: write a share of all latents, such as 5% or 0.05")
    return value


def _show(found: Selection, file: Path) -> None:
    about = found.about
    names = ("score", *found.terms)
    title = f"The best {min(10, len(found.features))} of {len(found.features)} features ({about['preset']} score)"
    table = new_table(title, ("feature", *names))
    for feature in found.features[:10].tolist():
        row = found.row(feature)
        table.add_row(str(feature), *(f"{row[name]:.3g}" for name in names))
    common.console().print(table)
    known = found.to_json()["known"]
    notes = (
        f"of {about['latents']:,} latents and {about['tokens']:,} tokens of {about['split']} documents; coherence: minus the entropy of "
        f"its tokens, known of {known['coherence']:,}; redundancy: largest correlation with another; dead: minus its rate; causal: loss "
        f"without it less loss with it, nats, measured for {about['candidates']:,}."
    )
    common.console().print(notes, style="dim", highlight=False)
    common.say(f"{file}. Next: nnato features evaluate --target {about['site']} --sae {about['sae']['source']} --features {file}")


# ---- with a selection --------------------------------------------------------------------------------------------------------


def chosen_features(text: str) -> Chosen | None:
    """The latents that `--features` names; None for all."""
    import torch

    from nnato.errors import DictionaryError
    from nnato.feature_selection import Chosen, read_features

    if text == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    if all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        return Chosen(torch.tensor([int(part) for part in parts]))
    if not Path(text).expanduser().is_file():
        raise DictionaryError(f"features {text!r}: write all, numbers such as 3,17, or name a JSON file that holds a list of them")
    return read_features(text)


def controls(
    chosen: Chosen,
    dictionary: Dictionary,
    site: ResidualSite,
    seen: tuple[TransformersModel, TokenBlocks] | None,
    seed: int,
    progress: Progress,
) -> torch.Tensor | None:
    """Latents that are active as often as the chosen ones, int64 (chosen,); None where nobody knows how often that is, or none are left.

    Args:
        chosen: Of the command line.
        dictionary: The SAE.
        site: Where.
        seen: Model and text, if they are there.
        seed: Of the draws.
        progress: Told of a pass over the text, if rates are not in the file.
    """
    from nnato.feature_controls import firing_rates, matched_on_rate

    rate = chosen.rate
    if rate is None and seen is not None:
        rate = firing_rates(*seen, dictionary, site, progress=progress)
    if rate is None:
        common.note("no control that is matched on rate: the list does not say how often features are active, and no text is read")
        return None
    if 2 * len(chosen.features) > int((rate > 0).sum()):
        common.note(f"no control that is matched on rate: {len(chosen.features)} features are too many of those that are ever active")
        return None
    return matched_on_rate(rate, chosen.features, seed)


def show_bias(results: list[tuple[FeatureResult, FeatureResult]]) -> None:
    """Table of selected features beside controls."""
    from nnato.feature_controls import selection_bias

    columns = ("pair", "selected", "same rates", "random dir.", "selected - same rates")
    table = new_table("mean R² of selected features and of controls", columns)
    for selected, matched in results:
        bias = selection_bias(selected, matched)
        difference = bias["difference"]["mean"]
        table.add_row(
            f"{selected.pair[0]} → {selected.pair[1]}",
            *(f"{bias[name]['mean'].value:.3f}" for name in ("selected", "matched", "random_directions")),
            f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
        )
    common.console().print(table)
    common.console().print(NOTE, style="dim", highlight=False)
