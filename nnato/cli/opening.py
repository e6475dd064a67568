"""What the commands of `nnato mlsae` that read an SAE share: its options, and a model with an SAE and a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnato.cli import common

if TYPE_CHECKING:
    from nnato.corpus import TokenBlocks
    from nnato.multilayer import MultiLayerSAE
    from nnato.nnsight_setup import TransformersModel
    from nnato.statistics import Progress

reading_options = common.options(
    click.argument("sae"),
    click.option("--model", help="The model it is read with.  [default: the one it was trained on, else the embedded one]"),
    click.option("--layers", help="all, or a list such as 3,9,15.  [default: where it was trained, else all]"),
    click.option("--lens", type=click.Path(path_type=Path), help="A lens to read it through.  [default: the one it was trained with]"),
    common.model_options,
)
sae_options = common.options(reading_options, common.text_options)
out_option = click.option("--out", type=click.Path(path_type=Path), help="Folder for numbers (JSON, CSV) and figures.")


class Opened:
    """A model with an SAE that is read with it, and a text."""

    def __init__(self, options: dict[str, Any], progress: Progress, remote: bool = False) -> None:
        from nnato.dictionaries import load_dictionary
        from nnato.lens import Lens
        from nnato.models import describe
        from nnato.multilayer import load_multilayer
        from nnato.sites import parse_sites

        reference = options["sae"]
        lens = None if options["lens"] is None else Lens.load(options["lens"])
        name = options["model"] or load_dictionary(reference).model.get("name")
        self.progress = progress
        self.model: TransformersModel = common.load(name, options["device"], options["dtype"], progress, remote)
        self.info = describe(self.model)
        sites = None if options["layers"] is None else parse_sites(options["layers"], self.info.blocks)
        self.sae: MultiLayerSAE = load_multilayer(reference, self.info, sites, lens)
        self._text = {name: options.get(name) for name in ("text", "tokens", "context", "per_document", "column")}

    def blocks(self) -> TokenBlocks:
        """The text, cut and checked."""
        from nnato.accumulation import tokenize
        from nnato.corpus import Corpus
        from nnato.multilayer import TOKENS

        return tokenize(self.model, common.make_corpus(Corpus(tokens=TOKENS), **self._text), self.progress)

    def print_json(self, blocks: TokenBlocks | None, results: Any) -> None:
        """The JSON object of a command."""
        common.print_json(self.info.fingerprint(), None if blocks is None else blocks.fingerprint, results)
