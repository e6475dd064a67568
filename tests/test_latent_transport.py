"""Persistence and R² of latents, against loops over dense activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_operator
from scipy import stats
from test_multilayer import LATENTS, random_lens, random_sae
from test_similarity import ordinary_rows

from nnato.errors import MomentsError
from nnato.latent_transport import LatentTransport, latent_transport
from nnato.sites import ResidualSite

PAIR = (ResidualSite(1), ResidualSite(2))


@pytest.mark.parametrize("lens", [None, random_lens()], ids=["none", "lens"])
def test_sums_are_those_of_hooks(model, corpus, lens):
    sae, operator = random_sae(lens=lens), make_operator(1, 2)
    blocks = corpus.tokenize(model.tokenizer)
    found = latent_transport(model, sae, [operator], blocks, batch_size=3)
    x = torch.tensor(ordinary_rows(model, blocks.only("test"), sae.sites)).float()

    def encode(rows, site):
        return sae.dictionary.encode(rows if lens is None else lens(rows, site)).double().numpy()

    first, second, predicted = encode(x[1], 1), encode(x[2], 2), encode(operator(x[1]), 2)
    table = found.table(PAIR)
    n = x.shape[1]
    assert sum(found.tokens) == n
    for f in range(LATENTS):
        assert table["active"][f].item() == pytest.approx((first[:, f] > 0).sum(), abs=1)
        assert table["frequency"][f].item() == pytest.approx((second[:, f] > 0).mean(), abs=2 / n)
        if (first[:, f] > 0).any():
            wanted = ((first[:, f] > 0) & (second[:, f] > 0)).sum() / (first[:, f] > 0).sum()
            assert table["persistence"][f].item() == pytest.approx(wanted, abs=0.02)
        if second[:, f].any():
            power = ((second[:, f] - second[:, f].mean()) ** 2).sum()
            for name, values in (("r2", predicted), ("r2_unmoved", first)):
                wanted = 1 - ((second[:, f] - values[:, f]) ** 2).sum() / power
                assert table[name][f].item() == pytest.approx(wanted, rel=1e-2, abs=1e-2)


def planted(seed, relation):
    """Sums of 3 folds in which R² follows from persistence, frequency, or nothing."""
    rng = np.random.default_rng(seed)
    latents, tokens = 300, 1000
    sums = np.zeros((3, 1, latents, 7))
    frequency = rng.uniform(0.05, 0.3, latents)
    persistence = rng.uniform(0.1, 0.9, latents)
    if relation == "frequency":
        persistence = np.clip(frequency * 2 + rng.normal(0, 0.05, latents), 0.01, 0.99)
    r2 = {"persistence": persistence, "frequency": 3 * frequency, "nothing": rng.uniform(0, 1, latents)}[relation]
    for fold in range(3):
        active = frequency * tokens
        power = active - active**2 / tokens
        error = (1 - r2 + rng.normal(0, 0.05, latents)) * power
        sums[fold, 0] = np.stack([active, active, persistence * active, active, active, error, power], axis=1)
    return LatentTransport((PAIR,), (tokens,) * 3, torch.tensor(sums))


def test_a_relation_is_found_where_there_is_one():
    found = planted(0, "persistence").coincidence(PAIR)
    assert found.latents == 300
    assert found.correlation.value > 0.9
    assert found.partial.low > 0.8
    assert found.thirds[0] < found.thirds[1] < found.thirds[2]
    nothing = planted(1, "nothing").coincidence(PAIR)
    assert abs(nothing.correlation.value) < 0.15
    apparent = planted(2, "frequency").coincidence(PAIR)
    assert apparent.correlation.value > 0.7
    assert abs(apparent.partial.value) < 0.2


def test_correlations_are_those_of_scipy():
    transport = planted(3, "persistence")
    table = transport.table(PAIR)
    found = transport.coincidence(PAIR)
    assert found.correlation.value == pytest.approx(stats.spearmanr(table["persistence"], table["r2"]).statistic)
    ranks = [stats.rankdata(table[name]) for name in ("persistence", "r2", "frequency")]
    left = [rank - np.polyval(np.polyfit(ranks[2], rank, 1), ranks[2]) for rank in ranks[:2]]
    assert found.partial.value == pytest.approx(np.corrcoef(*left)[0, 1])
    assert found.r2 == pytest.approx(np.sort(table["r2"].numpy())[149])
    assert found.to_json()["source"] == 1


def test_too_little_is_said(model, corpus):
    found = latent_transport(model, random_sae(), [make_operator(1, 2)], corpus)
    with pytest.raises(MomentsError, match="only 0 latents are active at 100000 tokens"):
        found.coincidence(PAIR, at_least=100_000)
    with pytest.raises(MomentsError, match="give operators between layers"):
        latent_transport(model, random_sae(sites=(0, 1)), [make_operator(1, 2)], corpus)
    with pytest.raises(MomentsError, match="give operators"):
        latent_transport(model, random_sae(), [], corpus)
