"""What a model says next when one latent is added to the residual of a layer, or that residual is replaced by its reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nnato.errors import DictionaryError, MomentsError, PositionError, SiteError, TextError
from nnato.models import ModelInfo, check_text, describe
from nnato.multilayer import MultiLayerSAE
from nnato.operators import AffineMap
from nnato.sites import ResidualSite
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

POSITIONS = {"last": slice(-1, None), "all": slice(1, None)}
"""Which tokens are edited: the prompt's last one, or all but the first, at which many models keep residuals of their own kind."""
RUNS = ("model", "reconstruction", "steered")


@dataclass(frozen=True)
class Steered:
    """The logits of one prompt, unedited and under two edits of a layer.

    Attributes:
        prompt: The prompt.
        site: The layer.
        latent: The latent that is added.
        factor: How much of it.
        positions: Which tokens are edited, one of `POSITIONS`.
        logits: By `RUNS`, float32 (positions, vocabulary): the model as it is; with its residuals at the layer replaced by their
            reconstructions; with the latent added.
    """

    prompt: str
    site: ResidualSite
    latent: int
    factor: float
    positions: str
    logits: Mapping[str, torch.Tensor] = field(repr=False)

    def kl(self, run: str) -> float:
        """KL(model ‖ run) of the next token, nats."""
        log_p, log_q = (torch.log_softmax(self.logits[name][-1].double(), 0) for name in ("model", run))
        return float((log_p.exp() * (log_p - log_q)).sum())

    def top(self, run: str, count: int = 10) -> list[tuple[int, float]]:
        """The most likely next tokens and their probabilities, most likely first."""
        best = torch.softmax(self.logits[run][-1].double(), 0).topk(min(count, self.logits[run].shape[1]))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def changes(self, count: int = 10) -> list[tuple[int, float]]:
        """The tokens whose log-probabilities the latent raises most, and by how much, nats; largest first."""
        model, steered = (torch.log_softmax(self.logits[name][-1].double(), 0) for name in ("model", "steered"))
        best = (steered - model).topk(min(count, len(model)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def to_json(self, tokenizer: Any, count: int = 10) -> dict[str, Any]:
        """As in `--json`."""

        def named(pairs: list[tuple[int, float]], value: str) -> list[dict[str, Any]]:
            return [{"id": token, "token": tokenizer.decode([token]), value: number} for token, number in pairs]

        return {
            "prompt": self.prompt,
            "site": self.site.key,
            "latent": self.latent,
            "factor": self.factor,
            "positions": self.positions,
            "top": {run: named(self.top(run, count), "probability") for run in RUNS},
            "kl": {run: self.kl(run) for run in RUNS[1:]},
            "raised": named(self.changes(count), "log_probability"),
        }


def steer(
    model: TransformersModel,
    sae: MultiLayerSAE,
    prompt: str,
    latent: int,
    site: int | str | ResidualSite,
    *,
    factor: float = 1.0,
    positions: str = "last",
    back: Mapping[ResidualSite, AffineMap] | None = None,
    info: ModelInfo | None = None,
) -> Steered:
    """Run a prompt unedited, with a layer replaced by its reconstruction, and with `factor` of a latent added there.

    A latent of activation `factor` adds `factor` decoder rows where the dictionary reads, times the token's standard deviation σ if it
    standardises, so this is what is added. Behind a lens, a linear map leads back to the residual stream.

    Args:
        model: The model.
        sae: The SAE.
        prompt: The prompt.
        latent: Which latent.
        site: Which of the SAE's layers.
        factor: Activation to add; negative to take away, 0 for the logits of the model, to the bit.
        positions: One of `POSITIONS`.
        back: For an SAE behind a lens, the way back to the residual of each layer: of `fidelity.backward_maps`.
        info: What `describe` says of the model, if that is known: it reads all weights, which takes as long as a short prompt.

    Raises:
        DictionaryError: The SAE is of another model, or has no such latent.
        SiteError: It does not read this layer.
        MomentsError: It has a lens, and there is no way back.
        PositionError: Positions are unknown, or the prompt is longer than the model's context.
        TextError: The prompt is empty.
    """
    info = describe(model) if info is None else info
    sae.check_fits(info)
    at = ResidualSite.parse(site, info.blocks)
    if at not in sae.sites:
        raise SiteError(f"the SAE does not read layer {at}; it reads {', '.join(map(str, sae.sites))}")
    if not 0 <= latent < sae.latents:
        raise DictionaryError(f"there is no latent {latent}: latents run from 0 to {sae.latents - 1}")
    if positions not in POSITIONS:
        raise PositionError(f"positions {positions!r}: give {' or '.join(POSITIONS)}")
    if sae.lens is not None and at != sae.lens.last and at not in (back or {}):
        raise MomentsError("behind a lens, a latent needs a way back to the residual stream: give backward_maps(…)")
    ids = torch.tensor([model.tokenizer(prompt).input_ids], dtype=torch.int64)
    if not prompt.strip() or ids.shape[1] < 1:
        raise TextError("the prompt is empty: give some words")
    check_text(model, ids.shape[1])
    way = (back or {}).get(at) if sae.lens is not None else None
    sae = sae.beside(model)
    edits = {"reconstruction": _reconstruction(sae, at, way), "steered": _addition(sae, at, way, latent, factor)}
    logits = {"model": _logits(model, ids, at, None, positions)}
    logits |= {run: _logits(model, ids, at, edit, positions) for run, edit in edits.items()}
    return Steered(prompt, at, latent, factor, positions, logits)


Change = Callable[[torch.Tensor], torch.Tensor]


def _reconstruction(sae: MultiLayerSAE, site: ResidualSite, way: AffineMap | None) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        shared = sae.shared(x[None], (site,))
        found = sae.decode(*sae.encode(shared), shared)[0]
        return found if way is None else way(found)

    return change


def _addition(sae: MultiLayerSAE, site: ResidualSite, way: AffineMap | None, latent: int, factor: float) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        rows = sae.shared(x[None], (site,)).reshape(-1, x.shape[-1])
        which = torch.full((len(rows),), latent, device=rows.device)
        added = sae.dictionary.contributions(torch.full((len(rows),), factor, device=rows.device), which, rows)
        if way is not None:
            added = added.double() @ way.weight.to(added.device)  # of a difference, the means of the map cancel
        return x + added.reshape(x.shape).to(x)

    return change


def _logits(model: TransformersModel, ids: torch.Tensor, site: ResidualSite, edit: Change | None, positions: str) -> torch.Tensor:
    with torch.no_grad(), ATOTrace(model, input_ids=ids, use_cache=False) as t:
        if edit is not None:
            t.patch(site, edit, POSITIONS[positions])
        logits: torch.Tensor = save(t.logits)
    return logits[0].float().cpu()
