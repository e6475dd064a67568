"""Layer statistics against loops over dense activations, and the variance of the layer against its definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from nnato.dip import dip
from nnato.errors import MomentsError
from nnato.layer_stats import LayerStats, layer_distributions, layer_variance, layer_variance_intervals, mean_layer_histograms, merged

LAYERS, TOKENS, LATENTS, K = 4, 50, 12, 3


def random_codes(seed, layers=LAYERS, tokens=TOKENS, latents=LATENTS, k=K):
    """Sparse codes, and the same as a dense array (layers, tokens, latents)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(layers, tokens, latents, generator=generator).topk(k, dim=-1).indices
    chosen[1:] = torch.where(torch.rand(layers - 1, tokens, 1, generator=generator) < 0.5, chosen[:1], chosen[1:])
    values = torch.randn(layers, tokens, k, generator=generator).relu()
    dense = torch.zeros(layers, tokens, latents).scatter_(-1, chosen, values)
    return values, chosen, dense.double().numpy()


def of(*seeds, layers=range(LAYERS), batch=None):
    stats, dense = LayerStats(layers, LATENTS), []
    for seed in seeds:
        values, chosen, some = random_codes(seed, len(layers))
        for first in range(0, TOKENS, batch or TOKENS):
            part = slice(first, first + (batch or TOKENS))
            stats.add(values[:, part], chosen[:, part])
        dense.append(some)
    return stats, np.concatenate(dense, axis=1)


def from_dense(dense):
    """Codes that hold every entry."""
    values = torch.tensor(dense, dtype=torch.float32)
    return values, torch.arange(values.shape[-1]).expand(values.shape)


def test_sums_are_those_of_loops():
    stats, dense = of(0, 1, batch=17)
    strength = dense.sum(0)
    for f, at in itertools.product(range(LATENTS), range(LAYERS)):
        a = dense[at, :, f]
        assert stats.active[f, at] == (a > 0).sum()
        assert stats.total[f, at].item() == pytest.approx(a.sum(), rel=1e-12)
        assert stats.squares[f, at].item() == pytest.approx((a**2).sum(), rel=1e-12)
        assert stats.peak[f, at] == a.max()
        p = [a[t] / strength[t, f] for t in range(len(a)) if strength[t, f] > 0]
        assert stats.shares[f, at].item() == pytest.approx(math.fsum(p), rel=1e-12)
        if at + 1 < LAYERS:
            assert stats.stays[f, at] == ((a > 0) & (dense[at + 1, :, f] > 0)).sum()
    for f in range(LATENTS):
        breadth = (dense[:, :, f] > 0).sum(0)
        assert stats.spread[f, 1:].tolist() == [(breadth == j).sum() for j in range(1, LAYERS + 1)]
        live = strength[:, f] > 0
        m = (np.arange(LAYERS) @ dense[:, live, f]) / strength[live, f]
        assert stats.mean_squares[f].item() == pytest.approx((m**2).sum(), rel=1e-12)
        assert stats.weighted_mean_squares[f].item() == pytest.approx((strength[live, f] * m**2).sum(), rel=1e-12)
    assert stats.tokens == 2 * TOKENS


def test_portions_are_the_whole(monkeypatch):
    whole, _ = of(0, 1)
    monkeypatch.setattr("nnato.layer_stats.ENTRIES", 7 * LAYERS * K)
    parts, _ = of(0, 1)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(getattr(parts, name), tensor, rtol=1e-12, atol=1e-12)


def test_merged_parts_are_the_whole():
    whole, _ = of(0, 1, 2)
    parts = merged([of(seed)[0] for seed in (0, 1, 2)])
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(getattr(parts, name), tensor, rtol=1e-12, atol=1e-12)
    assert parts.tokens == whole.tokens
    with pytest.raises(MomentsError, match="do not fit"):
        whole.merge(LayerStats(range(5), LATENTS))
    with pytest.raises(MomentsError, match="no tokens"):
        merged([])


def by_definition(dense, layers, weights):
    """Var(L), E[Var(L|F)], E[Var(L|F,T)] from a table of (layer, token, latent) with weights."""
    strength = dense.sum(0, keepdims=True)
    w = dense if weights == "activation" else np.divide(dense, strength, out=np.zeros_like(dense), where=strength > 0)
    number = np.broadcast_to(np.asarray(layers, dtype=float)[:, None, None], w.shape)

    def variance(axes):
        mass = w.sum(axes, keepdims=True)
        mean = np.divide((w * number).sum(axes, keepdims=True), mass, out=np.zeros_like(mass), where=mass > 0)
        return (w * (number - mean) ** 2).sum() / w.sum()

    return variance((0, 1, 2)), variance((0, 1)), variance((0,))


@pytest.mark.parametrize("weights", ["activation", "uniform"])
@pytest.mark.parametrize("layers", [range(4), (-2, -1, 0, 1), (1, 5, 6, 11), (1000, 1001, 1002, 1003)])
def test_variances_are_those_of_the_definition(weights, layers):
    stats, dense = of(3, 4, layers=layers, batch=9)
    found = layer_variance(stats, weights)
    wanted = by_definition(dense, layers, weights)
    np.testing.assert_allclose([found.total, found.aggregated, found.single], wanted, rtol=1e-8)
    assert found.total >= found.aggregated >= found.single >= 0


def test_law_of_total_variance():
    stats, dense = of(5)
    found = layer_variance(stats, "activation")
    strength = dense.sum(0)
    layer = np.arange(LAYERS)
    mean_of_latent = np.einsum("ltf,l->f", dense, layer) / strength.sum(0)
    between_latents = np.average((mean_of_latent - np.average(mean_of_latent, weights=strength.sum(0))) ** 2, weights=strength.sum(0))
    m = np.divide(np.einsum("ltf,l->tf", dense, layer), strength, out=np.zeros_like(strength), where=strength > 0)
    between_tokens = (strength * (m - mean_of_latent) ** 2).sum() / strength.sum()
    assert found.aggregated == pytest.approx(found.single + between_tokens, abs=1e-9)
    assert found.total == pytest.approx(found.aggregated + between_latents, abs=1e-9)


def test_latents_that_keep_to_a_layer():
    """The aggregated variance is zero; the published number is close to the total."""
    rng = np.random.default_rng(0)
    dense = np.zeros((6, 200, 30))
    dense[rng.integers(0, 6, 30), :, np.arange(30)] = rng.random((30, 200)) * (rng.random((30, 200)) < 0.02)
    stats = LayerStats(range(6), 30)
    stats.add(*from_dense(dense))
    for weights in ("activation", "uniform"):
        found = layer_variance(stats, weights)
        assert found.aggregated == pytest.approx(0, abs=1e-9)
        assert found.total > 1
        assert math.isnan(found.ratio)
    assert layer_variance(stats, "published").share > 0.9


def test_activations_spread_over_all_layers():
    """A token then says nothing: the ratio is 1, and not what is published."""
    dense = np.zeros((5, 300, 10))
    dense[:] = (np.random.default_rng(0).random((300, 10)) < 0.2)[None]
    stats = LayerStats(range(5), 10)
    stats.add(*from_dense(dense))
    assert layer_variance(stats, "activation").ratio == pytest.approx(1)
    assert layer_variance(stats, "uniform").ratio == pytest.approx(1)
    assert layer_variance(stats, "published").ratio > 1.5


def test_numbering_of_layers_does_not_matter():
    first, _ = of(6, layers=(0, 1, 2, 3))
    second, _ = of(6, layers=(-12, -11, -10, -9))
    for weights in ("activation", "uniform"):
        one, other = layer_variance(first, weights), layer_variance(second, weights)
        np.testing.assert_allclose([one.total, one.aggregated, one.single], [other.total, other.aggregated, other.single], rtol=1e-9)


def authors(dense):
    """The published formulas, written down densely (MIT-licensed metric of arXiv 2409.04185, mean over batches)."""
    strength = dense.sum(0)
    p = np.divide(dense, strength, out=np.zeros_like(dense), where=strength > 0)
    layer = np.arange(len(dense))

    def variance(q):
        return np.tensordot(layer**2, q, 1) - np.tensordot(layer, q, 1) ** 2

    return variance(p.mean((1, 2))), variance(p.mean(1)).mean(), variance(p).mean()


def test_published_numbers():
    stats, dense = of(7, 8, batch=20)
    batches = [dense[:, start + first : min(start + first + 20, start + 50)] for start in (0, 50) for first in range(0, 50, 20)]
    wanted = np.mean([authors(batch) for batch in batches], axis=0)
    found = layer_variance(stats, "published")
    np.testing.assert_allclose([found.total, found.aggregated, found.single], wanted, rtol=1e-6)


def test_distributions():
    stats, _ = of(9, 10)
    stats.total[0] = 0
    stats.active[0] = stats.spread[0] = 0  # one that was never active
    stats.total[1] = torch.tensor([0.0, 0.0, 5.0, 0.0])  # one that keeps to a layer
    stats.total[2] = 1.0
    found = layer_distributions(stats, at_least=10)
    for name, values in found.items():
        if name not in ("tokens", "count", "strength"):
            assert math.isnan(values[0]), name
    assert found["std"][1] == 0
    assert found["entropy"][1] == 0
    assert found["mean"][1] == 2
    assert math.isnan(found["bimodality"][1])
    assert found["dip"][1] == found["dip"][2] == 0
    torch.testing.assert_close(found["dip"][3:], dip(stats.total[3:]))
    assert found["entropy"][2].item() == pytest.approx(math.log(LAYERS))
    totals = stats.total.numpy()
    for f in range(2, LATENTS):
        p = totals[f] / totals[f].sum()
        mean = p @ np.arange(LAYERS)
        assert found["mean"][f].item() == pytest.approx(mean)
        assert found["std"][f].item() == pytest.approx(np.sqrt(p @ (np.arange(LAYERS) - mean) ** 2))
        assert found["entropy"][f].item() == pytest.approx(scipy_stats.entropy(p))
        counts = (p * 1e6).round().astype(int)
        sample = np.repeat(np.arange(LAYERS), counts)
        sarle = (scipy_stats.skew(sample) ** 2 + 1) / scipy_stats.kurtosis(sample, fisher=False)
        assert found["bimodality"][f].item() == pytest.approx(sarle, rel=1e-4)
        if f > 2:
            published = (scipy_stats.skew(totals[f]) ** 2 + 1) / scipy_stats.kurtosis(totals[f], fisher=False)
            assert found["bimodality_published"][f].item() == pytest.approx(published)
        assert found["layers"][f] == (stats.active[f] >= 10).sum()


def test_what_is_said_of_a_latent_adds_up_to_what_is_said_of_all():
    stats, _ = of(11, 12)
    found, whole = layer_distributions(stats), layer_variance(stats, "activation")
    weights = found["strength"] / found["strength"].sum()
    assert float((weights * found["std"].square()).sum()) == pytest.approx(whole.aggregated)
    assert float((weights * found["single"]).sum()) == pytest.approx(whole.single)


def test_persistence():
    """A latent active at layers 0, 1 and 2 of a token stays twice, and has breadth 3."""
    dense = np.zeros((4, 5, 2))
    dense[:3, 2, 1] = 1
    stats = LayerStats(range(4), 2)
    stats.add(*from_dense(dense))
    assert stats.stays[1].tolist() == [1, 1, 0]
    assert stats.spread[1].tolist() == [0, 0, 0, 1, 0]
    found = layer_distributions(stats)
    assert found["breadth"][1] == 3
    assert found["persistence"][1].item() == pytest.approx(2 / 3)
    assert not stats.stays[0].any()


def test_std_of_a_latent_near_one_layer_is_a_number():
    """Where E[l²] - E[l]² in single precision is often negative."""
    dense = np.zeros((24, 3, 1))
    dense[23, :, 0], dense[22, 0, 0] = 1e4, 1e-3
    stats = LayerStats(range(24), 1)
    stats.add(*from_dense(dense))
    assert 0 < layer_distributions(stats)["std"][0] < 1e-3


def test_intervals_are_the_jackknife():
    folds = [of(seed)[0] for seed in range(4)]
    found = layer_variance_intervals(folds)
    values = [layer_variance(merged(folds[:i] + folds[i + 1 :])).ratio for i in range(4)]
    half = scipy_stats.t.ppf(0.975, 3) * np.sqrt(3 / 4 * np.sum((np.array(values) - np.mean(values)) ** 2))
    assert found["ratio"].value == layer_variance(merged(folds)).ratio
    assert found["ratio"].high - found["ratio"].value == pytest.approx(half)
    assert math.isnan(layer_variance_intervals(folds[:1])["ratio"].low)


def test_bad_requests():
    stats = LayerStats(range(3), 4)
    with pytest.raises(MomentsError, match="no latent was active"):
        layer_variance(stats)
    with pytest.raises(MomentsError, match="unknown weights"):
        layer_variance(stats, "equal")
    with pytest.raises(MomentsError, match="lack active"):
        stats.take(3, {})
    with pytest.raises(MomentsError, match="number of tokens"):
        stats.take(-1, stats.tensors())


def test_no_tokens_change_nothing():
    stats, _ = of(1)
    before = {name: tensor.clone() for name, tensor in stats.tensors().items()}
    stats.add(torch.zeros(LAYERS, 0, K), torch.zeros(LAYERS, 0, K, dtype=torch.int64))
    stats.add(torch.zeros(LAYERS, 3, K), torch.zeros(LAYERS, 3, K, dtype=torch.int64))
    assert all(torch.equal(before[name], tensor) for name, tensor in stats.tensors().items() if name != "published")
    assert stats.tokens == TOKENS + 3


@pytest.mark.parametrize("layers", [range(LAYERS), (1, 5, 6, 11)])
def test_histograms_of_mean_layers(layers):
    stats, _ = of(13, 14, layers=layers)
    stats.total[0] = 0  # never active
    stats.total[1] = torch.tensor([0.0, 0.0, 5.0, 0.0])
    stats.total[2] = torch.tensor([0.0, 3.0, 3.0, 0.0])
    means, distances = mean_layer_histograms(stats, bins=7)
    wanted = layer_distributions(stats)["mean"].numpy()[1:]
    p = stats.total.numpy()[1:] / stats.total.numpy()[1:].sum(1, keepdims=True)
    places = p @ np.arange(LAYERS)
    for found, values in ((means, wanted), (distances, np.abs(places - np.round(places)))):
        assert float((found.density * found.edges.diff()).sum()) == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(found.density, np.histogram(values, found.edges.numpy(), density=True)[0], atol=1e-12)
    assert (distances.edges[0], distances.edges[-1]) == (0, 0.5)
    assert (means.edges[0], means.edges[-1]) == (layers[0] - 0.5, layers[-1] + 0.5)
    assert distances.density[0] > 0
    assert distances.density[-1] > 0
    with pytest.raises(MomentsError, match="at least one of each"):
        mean_layer_histograms(LayerStats(layers, LATENTS))
    with pytest.raises(MomentsError, match="with 0 bins"):
        mean_layer_histograms(stats, bins=0)
