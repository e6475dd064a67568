"""The contexts in which each latent of a multi-layer SAE is most active, at each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.accumulation import tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.errors import DictionaryError
from nnato.models import describe
from nnato.multilayer import MultiLayerSAE
from nnato.reduction import TokenClasses, capture
from nnato.sites import ResidualSite
from nnato.statistics import Progress
from nnato.storage import read_json, require, require_entries

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

FILE = "examples.json"
WINDOW = (10, 5)
"""Tokens shown before and behind the one at which a latent is active; fewer at the ends of a block, and never of another document."""


@dataclass(frozen=True)
class Example:
    """A latent at a token.

    Attributes:
        latent: The latent.
        site: The layer.
        activation: How active it is.
        tokens: The token and its neighbours, as text.
        at: Which of them it is.
        document: Hash of the document.
    """

    latent: int
    site: ResidualSite
    activation: float
    tokens: tuple[str, ...]
    at: int
    document: int

    def to_json(self) -> dict[str, Any]:
        """As in `--json`."""
        return {
            "latent": self.latent,
            "site": self.site.key,
            "activation": self.activation,
            "tokens": list(self.tokens),
            "at": self.at,
            "document": f"{self.document:016x}",
        }


class Leaders:
    """The largest values of each of many keys, and where they come from.

    Attributes:
        values: Descending, float32 (keys, count); zero where there are fewer.
        places: int64 (keys, count); -1 where there are fewer.
    """

    def __init__(self, keys: int, count: int) -> None:
        self.values = torch.zeros(keys, count)
        self.places = torch.full((keys, count), -1, dtype=torch.int64)

    def add(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        """Add entries: keys, int64 (n,), positive values, float (n,), and places, int64 (n,)."""
        order = values.argsort(descending=True, stable=True)
        order = order[keys[order].argsort(stable=True)]
        keys, values, places = keys[order], values[order].float(), places[order]
        touched, sizes = torch.unique_consecutive(keys, return_counts=True)
        rank = torch.arange(len(keys)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        group = torch.arange(len(touched)).repeat_interleave(sizes)
        count = self.values.shape[1]
        few = rank < count
        new_values, new_places = torch.zeros(len(touched), count), torch.full((len(touched), count), -1, dtype=torch.int64)
        new_values[group[few], rank[few]], new_places[group[few], rank[few]] = values[few], places[few]
        both = torch.cat([self.values[touched], new_values], dim=1)
        best, chosen = both.topk(count, dim=1)
        self.values[touched] = best
        self.places[touched] = torch.cat([self.places[touched], new_places], dim=1).gather(1, chosen)


@dataclass(frozen=True)
class TopExamples:
    """The most active contexts of every latent at every layer.

    Attributes:
        sae: The SAE.
        blocks: The text.
        leaders: Values and places (block · context + position) by latent and layer.
    """

    sae: MultiLayerSAE = field(repr=False)
    blocks: TokenBlocks = field(repr=False)
    leaders: Leaders = field(repr=False)

    def of(self, tokenizer: Any, latent: int, site: int | str | ResidualSite | None = None, count: int | None = None) -> list[Example]:
        """Examples of a latent, most active first.

        Args:
            tokenizer: The model's.
            latent: The latent.
            site: Only at this layer.
            count: At most so many; all that are kept by default.

        Raises:
            DictionaryError: There is no such latent, or the SAE was not read at this layer.
        """
        if not 0 <= latent < self.sae.latents:
            raise DictionaryError(f"latents run from 0 to {self.sae.latents - 1}: {latent} is not one of them")
        chosen = self.sae.sites if site is None else (ResidualSite.parse(site),)
        if missing := set(chosen) - set(self.sae.sites):
            raise DictionaryError(f"the SAE was not read at site {min(missing)}, but at {', '.join(map(str, self.sae.sites))}")
        found = []
        for one in chosen:
            key = latent * len(self.sae.sites) + self.sae.sites.index(one)
            entries = zip(self.leaders.values[key].tolist(), self.leaders.places[key].tolist(), strict=True)
            found += [example_at(self.blocks, tokenizer, latent, one, value, place) for value, place in entries if place >= 0]
        return sorted(found, key=lambda example: -example.activation)[:count]


def example_at(blocks: TokenBlocks, tokenizer: Any, latent: int, site: ResidualSite, value: float, place: int) -> Example:
    """A latent with the value it has at a place of a text: row · context + position."""
    row, position = divmod(place, blocks.context)
    tokens = blocks.batch([row])
    first = max(position - WINDOW[0], 0)
    ids = tokens.ids[0, first : position + WINDOW[1] + 1].tolist()
    return Example(latent, site, value, tuple(tokenizer.decode([one]) for one in ids), position - first, int(tokens.documents[0]))


def top_examples(
    model: TransformersModel,
    sae: MultiLayerSAE,
    corpus: Corpus | TokenBlocks,
    *,
    count: int = 8,
    split: str = "test",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> TopExamples:
    """Find the contexts of all latents in one pass over a text; memory is 12 bytes for each latent, layer and example.

    Args:
        model: The model.
        sae: The SAE.
        corpus: The text, tokenised already or not.
        count: Examples for each latent and layer.
        split: Which documents.
        batch_size: Token blocks per forward pass.
        progress: Told of batches done.

    Raises:
        DictionaryError: The SAE is of another model, or no example was asked for.
    """
    if count < 1:
        raise DictionaryError(f"{count} examples: ask for at least one")
    sae.check_fits(describe(model))
    sae = sae.beside(model)
    blocks = tokenize(model, corpus, progress).only(split)
    leaders, classes, plan = Leaders(sae.latents * len(sae.sites), count), TokenClasses(), blocks.plan(batch_size)
    layer = torch.arange(len(sae.sites))[:, None, None]
    for number, rows in enumerate(plan):
        if progress is not None:
            progress("looking for examples", number, len(plan))
        tokens = blocks.batch(rows)
        residuals = capture(model, tokens.ids, sae.sites)
        ordinary = classes.ordinary(tokens.ids, tokens.mask, tokens.special, residuals)
        values, latents = (part.cpu() for part in sae.encode(sae.shared(residuals[:, ordinary])))
        at = torch.nonzero(ordinary.cpu())
        place = (torch.as_tensor(rows)[at[:, 0]] * blocks.context + at[:, 1])[None, :, None].expand(values.shape)
        on = values > 0
        leaders.add((latents * len(sae.sites) + layer)[on], values[on], place[on])
    if progress is not None:
        progress("looking for examples", len(plan), len(plan))
    return TopExamples(sae, blocks, leaders)


def read_examples(path: str | Path, sae: MultiLayerSAE) -> dict[int, list[Example]]:
    """Read the examples that `nnato mlsae examples SAE --out FOLDER` wrote.

    Args:
        path: The file, or its folder.
        sae: The SAE they are of.

    Returns:
        Examples by latent, as they were written: most active first.

    Raises:
        FileFormatError: It is no such file, or names a latent or a layer that the SAE does not have.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    found: dict[int, list[Example]] = {}
    for name, records in read_json(path).items():
        known = name.isascii() and name.isdigit() and len(name) < 10 and int(name) < sae.latents
        require(known, path, f"{name!r} is no latent of the SAE, which has {sae.latents}")
        require(isinstance(records, list), path, f"latent {name} has no list of examples")
        found[int(name)] = [_example(record, int(name), sae, path) for record in records]
    return found


def _example(record: Any, latent: int, sae: MultiLayerSAE, path: Path) -> Example:
    require(isinstance(record, dict), path, f"an example of latent {latent} is no object")
    require_entries(record, path, latent=int, activation=float, tokens=list, at=int, document=str)
    require(record["latent"] == latent, path, f"an example of latent {latent} is of another one")
    sites = {site.key: site for site in sae.sites}
    require(record.get("site") in list(sites), path, f"latent {latent} has an example at a layer where the SAE is not read")
    tokens = record["tokens"]
    require(all(isinstance(token, str) for token in tokens), path, f"an example of latent {latent} holds something else than text")
    require(0 <= record["at"] < len(tokens), path, f"an example of latent {latent} is at none of its tokens")
    require(math.isfinite(record["activation"]), path, f"an example of latent {latent} has no finite activation")
    require(re.fullmatch("[0-9a-f]{16}", record["document"]) is not None, path, f"an example of latent {latent} names no document")
    return Example(latent, sites[record["site"]], record["activation"], tuple(tokens), record["at"], int(record["document"], 16))


def busiest(examples: TopExamples, count: int) -> Sequence[int]:
    """The latents with the largest activation anywhere, largest first."""
    peak = examples.leaders.values[:, 0].view(examples.sae.latents, -1).amax(1)
    return [int(latent) for latent in peak.argsort(descending=True)[:count] if peak[latent] > 0]
