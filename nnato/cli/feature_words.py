"""`nnato features explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nnato.cli import common

if TYPE_CHECKING:
    from nnato.explanations import Explained


@common.command("explain")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--sae", help="The SAE, if the file does not say: what nnato features evaluate takes.")
@click.option("--neuronpedia", help="Where it is on Neuronpedia, as model/source, if neither says.")
@click.option("--export", type=click.Path(path_type=Path), help="A .jsonl or .jsonl.gz exported there, instead of the network.")
@click.option("--url", help="Address of the site.  [default: https://www.neuronpedia.org]")
@common.json_option
def explain(file: Path, sae: str | None, neuronpedia: str | None, export: Path | None, url: str | None, as_json: bool) -> None:
    """What the features of FILE are said to mean: links to Neuronpedia, and explanations where they can be had.

    FILE is what nnato features select wrote, or a JSON list of numbers. Explanations of an SAE are fetched by one request and kept in the
    cache; without a network the links remain. They are written by language models, from examples, and may be wrong.

    \b
    Examples:
      nnato features explain selected/selected.json
      nnato features explain list.json --export batch-0.jsonl.gz \\
        --neuronpedia gemma-2-2b/20-gemmascope-res-16k
    """
    from nnato import explanations
    from nnato.dictionaries import NEURONPEDIA, load_dictionary
    from nnato.errors import DictionaryError
    from nnato.feature_selection import read_features

    chosen = read_features(file)
    known = neuronpedia or chosen.about.get("sae", {}).get("neuronpedia")
    if known is None and sae is not None:
        known = load_dictionary(sae).neuronpedia
    if not isinstance(known, str):
        raise DictionaryError(
            "nobody knows where this SAE is on Neuronpedia, and one that was trained here is not there at all: "
            "if it is, give --neuronpedia model/source"
        )
    found = explanations.explain(known, chosen.features.tolist(), base=url or NEURONPEDIA, export=export)
    if as_json:
        common.print_json({}, None, {"sae": known, "unavailable": found.unavailable, "features": found.to_json()})
        return
    show(found)


def show(found: Explained) -> None:
    """One line for each feature, with its link and all of its explanations."""
    for entry in found.to_json():
        common.say(f"{entry['feature']:>7}  {entry['link']}")
        for one in entry["explanations"]:
            common.say(f"         {one['text']}" + (f"  ({one['author']})" if one["author"] else ""))
    if found.unavailable is not None:
        common.say(f"Links only: {found.unavailable}")
