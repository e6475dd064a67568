"""Reconstructions put in the place of residuals, against forward hooks; the way back from behind a lens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH, hook_residuals
from test_multilayer import random_lens, random_sae
from test_similarity import ordinary_rows

from nnato.dictionaries import Dictionary
from nnato.errors import MomentsError
from nnato.fidelity import backward_maps, fidelity
from nnato.lens import logit_lens
from nnato.multilayer import MultiLayerSAE
from nnato.operators import AffineMap
from nnato.sites import ResidualSite


def perfect_sae(sites=range(BLOCKS)):
    """Each coordinate and its negative is a latent, so nothing is lost."""
    eye = torch.eye(WIDTH)
    encoder, zero = torch.cat([eye, -eye], 1), torch.zeros(WIDTH)
    dictionary = Dictionary("topk", encoder, torch.zeros(2 * WIDTH), encoder.T.contiguous(), zero, zero, k=WIDTH)
    return MultiLayerSAE(dictionary, tuple(map(ResidualSite, sites)))


def test_perfect_reconstruction_costs_nothing(any_model, corpus):
    for score in fidelity(any_model, perfect_sae((1, 3)), corpus, sequences=2):
        for name in ("delta_loss", "kl", "logit_mse"):
            assert getattr(score, name).value == pytest.approx(0, abs=1e-6), name


@pytest.mark.parametrize("lens", [None, random_lens()], ids=["none", "lens"])
def test_costs_are_those_of_hooks(any_model, corpus, lens):
    """Behind a lens, reconstructions take the given way back, at every layer but the last one."""
    sae = random_sae(sites=(0, 2, 3), lens=lens)
    generator = torch.Generator().manual_seed(5)
    ways = {site: torch.randn(WIDTH, WIDTH, generator=generator).double() / 4 for site in sae.sites[:2]}
    means = torch.randn(2, WIDTH, generator=generator).double()
    back = {site: AffineMap.make(site, site, weight, *means) for site, weight in ways.items()}
    blocks = corpus.tokenize(any_model.tokenizer)
    found = fidelity(any_model, sae, blocks, back=None if lens is None else back, sequences=3)
    sums, medians = {}, None
    for row in blocks.full_blocks("test", 3):
        tokens = blocks.batch([row])
        seen, logits = hook_residuals(any_model._module, tokens.ids)
        allowed = tokens.mask & ~tokens.special
        allowed[:, 0] = False
        norms = torch.stack([seen[site] for site in sae.sites]).norm(dim=-1)
        medians = norms[:, allowed].median(dim=1).values if medians is None else medians
        allowed &= ~(norms > 10 * medians[:, None, None]).any(0)
        at = [p for p in range(tokens.ids.shape[1] - 1) if allowed[0, p]]
        clean = torch.log_softmax(logits[0].double(), -1)
        for site in sae.sites:

            def replace(residual, _, allowed=allowed, site=site):
                new, x = residual.clone(), residual[allowed]
                shared = x if lens is None else lens(x, site)
                made = sae.dictionary.decode(sae.dictionary.encode(shared), shared)
                new[allowed] = made if lens is None or site not in ways else ((made.double() - means[0]) @ ways[site] + means[1]).float()
                return new

            _, edited = hook_residuals(any_model._module, tokens.ids, {int(site): replace}.items())
            other = torch.log_softmax(edited[0].double(), -1)
            for p in at:
                target = tokens.ids[0, p + 1]
                row_sums = (
                    float(clean[p, target] - other[p, target]),
                    float((clean[p].exp() * (clean[p] - other[p])).sum()),
                    float((edited[0, p] - logits[0, p]).double().square().mean()),
                )
                sums.setdefault(site, []).append(row_sums)
    for score in found:
        wanted = np.mean(sums[score.site], axis=0)
        np.testing.assert_allclose([score.delta_loss.value, score.kl.value, score.logit_mse.value], wanted, rtol=2e-3, atol=1e-5)
        assert score.kl.value > 0
        assert score.kl.low < score.kl.value < score.kl.high


def test_the_embedding_can_be_replaced_too(model, corpus):
    sae = dataclasses.replace(random_sae(), sites=(ResidualSite.EMBED, ResidualSite(0)))
    embed, first = fidelity(model, sae, corpus, sequences=2)
    assert embed.site.key == "embed"
    assert embed.kl.value > 0
    assert first.kl.value > 0


def test_behind_a_lens_there_has_to_be_a_way_back(model, corpus):
    sae = random_sae(lens=random_lens())
    with pytest.raises(MomentsError, match="need a way back"):
        fidelity(model, sae, corpus)
    with pytest.raises(MomentsError, match="no lens to come back from"):
        backward_maps(model, random_sae(), corpus)
    maps = {site: one.map for site, one in backward_maps(model, sae, corpus).items()}
    assert all(np.isfinite(score.kl.value) for score in fidelity(model, sae, corpus, back=maps, sequences=2))


def test_fitted_way_back_beats_the_inverse(model, corpus):
    """And what both leave is what the residuals of hooks say."""
    lens = random_lens()
    sae, blocks = random_sae(lens=lens), corpus.tokenize(model.tokenizer)
    test = torch.tensor(ordinary_rows(model, blocks.only("test"), sae.sites))
    for site, one in backward_maps(model, sae, blocks).items():
        assert one.fvu < one.inverse_fvu, site
        x = test[int(site)]
        shared = lens(x.float(), site)
        made = sae.dictionary.decode(sae.dictionary.encode(shared), shared).double()
        power = (x - x.mean(0)).square().sum()
        translator = lens.translators[site]
        inverse = torch.linalg.solve(translator.weight.T, (made - translator.target_mean).T).T + translator.source_mean
        for found, back in ((one.fvu, one.map(made)), (one.inverse_fvu, inverse)):
            assert found == pytest.approx(float((back - x).square().sum() / power), rel=1e-3)


def test_way_back_is_ridge_on_reconstructions(model, corpus):
    """Of the training documents, as numpy solves it; the penalty is what numpy finds best on validation documents."""
    lens, site = random_lens(), ResidualSite(1)
    sae, blocks = random_sae(sites=(1,), lens=lens), corpus.tokenize(model.tokenizer)
    rows = {}
    for split in ("train", "validation"):
        x = torch.tensor(ordinary_rows(model, blocks.only(split), sae.sites))[0]
        shared = lens(x.float(), site)
        rows[split] = sae.dictionary.decode(sae.dictionary.encode(shared), shared).double().numpy(), x.numpy()
    seen, x = rows["train"]
    found = backward_maps(model, sae, blocks)[site].map
    np.testing.assert_allclose(found.source_mean.numpy(), seen.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.target_mean.numpy(), x.mean(0), atol=1e-4)
    centred, wanted = seen - seen.mean(0), x - x.mean(0)
    scale = np.trace(centred.T @ centred) / WIDTH
    weights = [np.linalg.solve(centred.T @ centred + scale * kappa * np.eye(WIDTH), centred.T @ wanted) for kappa in np.logspace(-8, 2, 41)]
    apart = [np.abs(found.weight.numpy() - weight).max() for weight in weights]
    other, target = rows["validation"]
    errors = [np.square((other - seen.mean(0)) @ weight + x.mean(0) - target).sum() for weight in weights]
    left = np.square(found(torch.tensor(other)).numpy() - target).sum()
    assert min(apart) < 0.05 * np.abs(found.weight.numpy()).max()
    assert left < 1.002 * min(errors)


def test_way_back_from_exact_residuals_is_the_inverse(model, corpus):
    """And of a lens that does nothing, the identity."""
    for lens in (logit_lens(BLOCKS, WIDTH), random_lens()):
        sae = dataclasses.replace(perfect_sae(), lens=lens)
        for site, one in backward_maps(model, sae, corpus).items():
            assert one.fvu < 1e-3, site
            assert one.inverse_fvu < 1e-6, site
            assert site < lens.last
