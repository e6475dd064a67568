"""What a model loses when the residual of one layer is replaced by its reconstruction: cross-entropy, KL and logits, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnato.accumulation import tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.errors import MomentsError
from nnato.intervals import Interval, ratio_spread
from nnato.losses import token_losses
from nnato.models import describe
from nnato.moments import Moments
from nnato.multilayer import MultiLayerSAE
from nnato.operators import AffineMap
from nnato.reduction import TokenClasses, capture, classify, stacked
from nnato.regression import Regression
from nnato.selection import Method, Solver
from nnato.sites import ResidualSite
from nnato.statistics import Progress
from nnato.trace import ATOTrace, save

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel

PORTION = 64
"""Positions whose logits are compared at once."""
_SIDES = (ResidualSite(0), ResidualSite(1))


@dataclass(frozen=True)
class Fidelity:
    """The cost of one layer's reconstruction, as means over the edited positions, with 95 % intervals over documents.

    Attributes:
        site: The layer.
        delta_loss: Cross-entropy with the reconstruction less that without, nats.
        kl: KL(unedited ‖ edited) of the next token, nats.
        logit_mse: Mean squared difference of logits.
    """

    site: ResidualSite
    delta_loss: Interval
    kl: Interval
    logit_mse: Interval

    def to_json(self) -> dict[str, Any]:
        """As in `--json`."""
        return {"site": self.site.key, **{name: getattr(self, name).to_json() for name in ("delta_loss", "kl", "logit_mse")}}


def fidelity(
    model: TransformersModel,
    sae: MultiLayerSAE,
    corpus: Corpus | TokenBlocks,
    *,
    back: Mapping[ResidualSite, AffineMap] | None = None,
    sequences: int = 8,
    progress: Progress | None = None,
) -> list[Fidelity]:
    """Replace the residuals of all ordinary tokens of a layer by their reconstructions, one layer at a time, in test documents.

    Args:
        model: The model.
        sae: The SAE.
        corpus: The text, tokenised already or not.
        back: For an SAE behind a lens, the way back to the residual of each layer: what `backward_maps` returned.
        sequences: Full blocks to read, of as many documents as possible.
        progress: Told of each sequence.

    Raises:
        MomentsError: The SAE has a lens, and there is no way back.
        TextError: There are too few full blocks.
    """
    sae.check_fits(describe(model))
    sae = sae.beside(model)
    if sae.lens is not None and back is None:
        raise MomentsError("behind a lens, reconstructions need a way back to the residual stream: give backward_maps(…)")
    blocks = tokenize(model, corpus, progress)
    sums = torch.zeros(len(sae.sites), 3, sequences, dtype=torch.float64)
    counts = torch.zeros(sequences, dtype=torch.float64)
    medians = None
    for number, row in enumerate(blocks.full_blocks("test", sequences)):
        if progress is not None:
            progress("replacing layers", number, sequences)
        tokens = blocks.batch([row])
        with torch.no_grad(), ATOTrace(model, input_ids=tokens.ids, use_cache=False) as t:
            residuals = save(stacked(model, t, sae.sites))
            logits = save(t.logits)
        ordinary, _, medians = classify(residuals, tokens.mask, tokens.special, medians)
        at = torch.nonzero(ordinary[0, :-1])[:, 0]  # the last position predicts nothing that is there
        shared = sae.shared(residuals[:, ordinary])
        reconstruction = sae.decode(*sae.encode(shared), shared)
        counts[number] = len(at)
        targets = tokens.ids[0, at.cpu() + 1].to(logits.device)
        for which, site in enumerate(sae.sites):
            value = residuals[which].clone()
            rows = reconstruction[which]
            value[ordinary] = (rows if back is None or site not in back else back[site](rows)).to(value)
            with torch.no_grad(), ATOTrace(model, input_ids=tokens.ids, use_cache=False) as t:
                if site < 0:
                    t.patch(site, value)
                else:
                    t.resume(site, value)
                edited = save(t.logits)
            sums[which, :, number] = _compare(logits[0], edited[0], at, targets)
    if progress is not None:
        progress("replacing layers", sequences, sequences)
    return [Fidelity(site, *(_mean(sums[which, part], counts) for part in range(3))) for which, site in enumerate(sae.sites)]


def _compare(clean: torch.Tensor, edited: torch.Tensor, at: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over positions of Δloss, KL and mean squared difference of logits, float64 (3,)."""
    sums = torch.zeros(3, dtype=torch.float64)
    for part in torch.split(torch.arange(len(at), device=at.device), PORTION):
        before, after = clean[at[part]].float(), edited[at[part]].float()
        losses, normaliser = token_losses(before, targets[part])
        edited_losses, edited_normaliser = token_losses(after, targets[part])
        probability = torch.exp(before - normaliser[:, None])
        kl = (probability * (before - after)).sum(-1) + (edited_normaliser - normaliser)  # in this order exactly zero without a change
        sums += torch.stack(
            [(edited_losses - losses).double().sum(), kl.double().sum(), (after - before).square().mean(-1).double().sum()]
        ).cpu()
    return sums


def _mean(totals: torch.Tensor, counts: torch.Tensor) -> Interval:
    value, spread = float(totals.sum() / counts.sum()), ratio_spread(totals, counts)
    return Interval(value) if spread is None else spread.around(value)


@dataclass(frozen=True)
class BackwardMap:
    """The way back from a reconstruction behind a lens to the residual of a layer.

    Attributes:
        map: The affine map.
        fvu: Share of the residual's variance that reconstruction and map together leave out, on test documents.
        inverse_fvu: The same with the exact inverse of the lens, which amplifies the error of the reconstruction.
    """

    map: AffineMap
    fvu: float
    inverse_fvu: float


def backward_maps(
    model: TransformersModel,
    sae: MultiLayerSAE,
    corpus: Corpus | TokenBlocks,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[ResidualSite, BackwardMap]:
    """Fit, for each layer, a ridge regression from *reconstructions* behind the lens to residuals before it.

    Fitted to what is not reconstructed but exact, it would be the lens' inverse, which turns an error of 10 % into one of many times the
    variance.

    Args:
        model: The model.
        sae: An SAE with a lens.
        corpus: The text: training documents are fitted to, validation documents choose the penalty, test documents judge.
        batch_size: Token blocks per forward pass.
        progress: Told of batches done.

    Raises:
        MomentsError: The SAE has no lens, or there are too few tokens.
    """
    sae = sae.beside(model)
    if sae.lens is None:
        raise MomentsError("there is no lens to come back from")
    info = describe(model)
    sae.check_fits(info)
    blocks = tokenize(model, corpus, progress)
    device = next(model._module.parameters()).device
    sites = [site for site in sae.sites if site != sae.lens.last]

    def empty() -> Moments:
        return Moments.of_pairs([_SIDES], info.d_model, device)

    moments = {(split, site): empty() for split in ("train", "validation", "test") for site in sites}
    exact = {site: torch.zeros(2, dtype=torch.float64) for site in sites}
    inverses = {site: torch.linalg.inv(sae.lens.translators[site].weight) for site in sites}
    classes, plan = TokenClasses(), blocks.plan(batch_size)
    for number, rows in enumerate(plan):
        if progress is not None:
            progress("ways back", number, len(plan))
        tokens = blocks.batch(rows)
        residuals = capture(model, tokens.ids, sae.sites)
        x = residuals[:, classes.ordinary(tokens.ids, tokens.mask, tokens.special, residuals)]
        shared = sae.shared(x)
        seen = sae.decode(*sae.encode(shared), shared)
        for which, site in enumerate(sae.sites):
            if site == sae.lens.last:
                continue
            moments[tokens.split, site].update(torch.stack([seen[which], x[which].float()]))
            if tokens.split == "test":
                lens = sae.lens.translators[site]
                undone = (seen[which].double() - lens.target_mean) @ inverses[site] + lens.source_mean
                exact[site][0] += (undone - x[which].double()).square().sum().cpu()
    if progress is not None:
        progress("ways back", len(plan), len(plan))
    found = {}
    for site in sites:
        train, validation, test = (Regression.of(moments[split, site], _SIDES) for split in ("train", "validation", "test"))
        weight = Solver(Method()).solve(train, validation).weight
        judged = test.about(train)
        errors = float(judged.yy.trace()) + float((weight * (judged.xx @ weight - 2 * judged.xy)).sum())
        power = float(test.yy.trace())
        made = AffineMap.make(site, site, weight, train.x_mean, train.y_mean)
        found[site] = BackwardMap(made, errors / power, float(exact[site][0]) / power)
    return found
