"""One prompt through a multi-layer SAE: which latents are active at which layers, as numbers, text and a page."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.errors import TextError
from nnato.models import ModelInfo, check_text, describe
from nnato.multilayer import MultiLayerSAE
from nnato.reduction import capture, classify
from nnato.sites import ResidualSite
from nnato.storage import atomic

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
    shown, active = activity.rows(most)
    rows = [_row(f"{latent}", share, [str(site) for site in activity.sites], f"{total:.2f}") for latent, share, total in shown]
    strip = "".join(_token(activity, position) for position in range(len(activity.tokens)))
    headings = "".join(f"<th>{site}</th>" for site in activity.sites)
    left = f" The strongest {len(rows)} of {active} active latents are shown." if len(rows) < active else ""
    page = _PAGE.format(
        title=html.escape(f"{activity.model['name']}: latents by layer"),
        prompt=strip,
        headings=headings,
        rows="\n".join(rows),
        note=f"Rows are latents, latest mean layer first; a row's shades add up to one over the layers.{left}",
    )
    path = Path(path).expanduser()
    with atomic(path) as temporary:
        temporary.write_text(page)
    return path


def _row(name: str, shares: list[float], layers: list[str], total: str) -> str:
    cells = "".join(
        f'<td style="--a:{share**0.5:.3f}" title="latent {name}, layer {layer}: {share:.1%}"></td>'
        for share, layer in zip(shares, layers, strict=True)
    )
    return f"<tr><th>{name}</th>{cells}<td class=n>{total}</td></tr>"


def _token(activity: PromptActivity, position: int) -> str:
    text = html.escape(activity.tokens[position].replace("\n", "⏎")) or "&nbsp;"
    if not bool(activity.ordinary[position]):
        return f'<span class="off" title="not encoded">{text}</span>'
    strengths = activity.strengths(position)
    best = strengths.sum(1).argsort(descending=True)[:5].tolist()
    described = ", ".join(f"{latent} (layer {activity.sites[int(strengths[latent].argmax())]})" for latent in best)
    return f'<span title="most active: {described}">{text}</span>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1d3557; --paper: #fff; --fill: 42 111 151; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6edf3; --paper: #14181d; --fill: 137 194 217; }} }}
body {{ font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1.5rem; }}
.prompt span {{ white-space: pre-wrap; border-bottom: 2px solid rgb(var(--fill)); margin-right: 1px; }}
.prompt .off {{ opacity: .5; border-color: transparent; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 11px; }}
th {{ font-weight: 400; padding: 0 .4rem; text-align: right; }}
thead th {{ text-align: center; }}
td {{ width: 1.6rem; min-width: 1rem; height: 9px; background: rgb(var(--fill) / var(--a)); }}
td.n {{ background: none; padding: 0 .4rem; text-align: right; }}
</style></head><body>
<h1>{title}</h1>
<p class="prompt">{prompt}</p>
<p>{note} Hover over a cell or a token for numbers.</p>
<div class="scroll"><table><thead><tr><th>latent</th>{headings}<th>Σ activation</th></tr></thead><tbody>
{rows}
</tbody></table></div>
</body></html>
"""
