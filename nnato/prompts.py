"""One prompt through a multi-layer SAE: which latents are active at which layers, as numbers, text and a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.errors import TextError
from nnato.models import ModelInfo, check_text, describe
from nnato.multilayer import MultiLayerSAE
from nnato.pages import write
from nnato.reduction import capture, classify
from nnato.sites import ResidualSite

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

EXAMPLE = "When Mary and John went to the store, John gave a drink to"
"""The prompt of the paper's figures."""


@dataclass(frozen=True)
class PromptActivity:
    """Activations of one prompt.

    Attributes:
        prompt: The text.
        sites: The layers.
        tokens: All tokens, as text.
        ordinary: bool (positions,): those that are encoded; not special tokens, the first one, and sinks.
        values: Activations, float32 (layers, positions, k); zero where a token is not encoded.
        latents: Whose, int64 (layers, positions, k).
        count: Number of latents.
        model: Fingerprint of the model.
    """

    prompt: str
    sites: tuple[ResidualSite, ...]
    tokens: tuple[str, ...]
    ordinary: torch.Tensor = field(repr=False)
    values: torch.Tensor = field(repr=False)
    latents: torch.Tensor = field(repr=False)
    count: int
    model: dict[str, Any] = field(repr=False)

    def strengths(self, position: int | None = None) -> torch.Tensor:
        """Activation by latent and layer, summed over the prompt or at one position; float64 (latents, layers)."""
        values, latents = (self.values, self.latents) if position is None else (self.values[:, [position]], self.latents[:, [position]])
        layer = torch.arange(len(self.sites))[:, None, None].expand(values.shape)
        key = (latents * len(self.sites) + layer).flatten()
        return torch.bincount(key, values.double().flatten(), minlength=self.count * len(self.sites)).view(self.count, -1)

    def heat_map(self, position: int | None = None) -> tuple[list[int], torch.Tensor]:
        """The latents that are active, latest mean layer first, and each one's distribution over layers, float64 (latents, layers)."""
        strengths = self.strengths(position)
        live = torch.nonzero(strengths.sum(1) > 0)[:, 0]
        shares = strengths[live] / strengths[live].sum(1, keepdim=True)
        mean = shares @ torch.tensor([int(site) for site in self.sites], dtype=torch.float64)
        order = mean.argsort(descending=True, stable=True)
        return live[order].tolist(), shares[order]

    def strongest(self, count: int, position: int | None = None) -> list[int]:
        """The latents with the largest sums of activation, over the prompt or at one position; largest first."""
        total = self.strengths(position).sum(1)
        return [int(latent) for latent in total.argsort(descending=True, stable=True)[:count] if total[latent] > 0]

    def rows(self, most: int, position: int | None = None) -> tuple[list[tuple[int, list[float], float]], int]:
        """The heat map of at most so many latents, the strongest ones.

        Returns:
            For each its number, its distribution over layers and the sum of its activation, latest mean layer first; and how many
            latents are active in all.
        """
        latents, shares = self.heat_map(position)
        shown = set(self.strongest(most, position))
        totals = self.strengths(position).sum(1)
        rows = zip(latents, shares.tolist(), strict=True)
        return [(latent, share, float(totals[latent])) for latent, share in rows if latent in shown], len(latents)

    def to_json(self) -> dict[str, Any]:
        """As in `--json`: for each layer and position the active latents, strongest first; sparse, so a page of text stays small."""
        values, order = self.values.sort(dim=-1, descending=True)
        ranked = zip(self.sites, values.tolist(), self.latents.gather(-1, order).tolist(), strict=True)
        encoded = torch.nonzero(self.ordinary)[:, 0].tolist()
        cells = []
        for site, strengths, latents in ranked:
            for position in encoded:
                pairs = [[latent, round(value, 4)] for latent, value in zip(latents[position], strengths[position], strict=True)]
                cells.append({"site": site.key, "position": position, "latents": [pair for pair in pairs if pair[1] > 0]})
        return {"prompt": self.prompt, "tokens": list(self.tokens), "encoded": self.ordinary.tolist(), "active": cells}


def prompt_activity(model: TransformersModel, sae: MultiLayerSAE, prompt: str = EXAMPLE, info: ModelInfo | None = None) -> PromptActivity:
    """Encode the residuals of one prompt.

    Args:
        model: The model.
        sae: The SAE.
        prompt: The text.
        info: What `describe` says of the model, if that is known: it reads all weights, which takes as long as a short prompt.

    Raises:
        TextError: The prompt holds no token that is encoded.
        PositionError: It is longer than the model's context.
        DictionaryError: The SAE is of another model.
    """
    info = describe(model) if info is None else info
    sae.check_fits(info)
    sae = sae.beside(model)
    ids = torch.tensor([model.tokenizer(prompt).input_ids], dtype=torch.int64)
    if ids.shape[1] < 2:
        raise TextError(f"the prompt {prompt!r} is too short: give at least two tokens")
    check_text(model, ids.shape[1])
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids, dtype=torch.int64))
    if bool(special[:, 1:].all()):
        raise TextError("the prompt holds only special tokens behind its first: give words that the tokenizer knows")
    residuals = capture(model, ids, sae.sites)
    ordinary = classify(residuals, torch.ones_like(special), special, None)[0][0].cpu()
    values, latents = (part.cpu() for part in sae.encode(sae.shared(residuals[:, 0])))
    tokens = tuple(model.tokenizer.decode([token]) for token in ids[0].tolist())
    return PromptActivity(prompt, sae.sites, tokens, ordinary, values * ordinary[:, None], latents, sae.latents, info.fingerprint())


def write_page(activity: PromptActivity, path: str | Path, most: int = 400) -> Path:
    """Write a page with the heat map of a prompt: one file that needs no network and no script.

    Args:
        activity: The activations.
        path: Where to write.
        most: Latents to show, the strongest ones.

    Raises:
        OutputError: It cannot be written.
    """
    rows, active = activity.rows(most)
    tokens = [_token(activity, position) for position in range(len(activity.tokens))]
    name = f"{activity.model['name']}: latents by layer"
    return write(path, "prompt.html", name=name, tokens=tokens, sites=activity.sites, rows=rows, active=active)


def _token(activity: PromptActivity, position: int) -> dict[str, Any]:
    """A token as the page shows it: its text, whether it was left out, and its strongest latents."""
    text = activity.tokens[position].replace("\n", "⏎") or "\u00a0"
    if not bool(activity.ordinary[position]):
        return {"text": text, "off": True, "title": "not encoded"}
    strengths = activity.strengths(position)
    best = strengths.sum(1).argsort(descending=True)[:5].tolist()
    described = ", ".join(f"{latent} (layer {activity.sites[int(strengths[latent].argmax())]})" for latent in best)
    return {"text": text, "off": False, "title": f"most active: {described}"}
