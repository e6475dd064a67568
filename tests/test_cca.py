"""Canonical correlations against independent implementations and planted truths (METHODS §5, acceptance 18-22)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.cross_decomposition import CCA
from test_regression import regression

from nnato.cca import (
    EffectiveSize,
    NullPairs,
    canonical_correlations,
    cross_fit,
    debias,
    direction_ceilings,
    effective_size,
    noise_edge,
    participation_ratio,
    participation_ratio_squared,
    principal_angles,
)
from nnato.errors import MomentsError
from nnato.regression import Regression


def planted(rng, sequences=150, length=64, width=256, shared=32, rho=0.9, ar=0.8, positions=0):
    """Rows of AR(1) sequences whose first dimensions correlate; some more dimensions carry a signal of position alone, mixed in."""

    def series(dims):
        noise = rng.normal(size=(sequences, length, dims))
        noise[:, 1:] *= math.sqrt(1 - ar**2)
        for step in range(1, length):
            noise[:, step] += ar * noise[:, step - 1]
        return noise

    x, y = series(width), series(width)
    y[..., :shared] = rho * x[..., :shared] + math.sqrt(1 - rho**2) * y[..., :shared]
    if positions:
        where = 3 * rng.normal(size=(1, length, positions))
        x[..., -positions:] += where
        y[..., -positions:] += where
    mixes = [rng.normal(size=(width, width)) / math.sqrt(width) for _ in range(2)]
    return x @ mixes[0] + 1, y @ mixes[1] - 2, mixes


def read(x, y, folds=5):
    """Moments of sequences: of all, by fold, and of shuffled pairs."""
    width = x.shape[-1], y.shape[-1]
    parts = [regression(x[fold::folds].reshape(-1, width[0]), y[fold::folds].reshape(-1, width[1])) for fold in range(folds)]
    flat_x, flat_y = x.reshape(-1, width[0]), np.roll(y, 1, axis=0).reshape(-1, width[1])
    null = torch.from_numpy((flat_x - flat_x.mean(0)).T @ (flat_y - flat_y.mean(0)))
    return Regression.merge(parts), parts, NullPairs(len(flat_x), null)


def small(n=400, d_x=9, d_y=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d_x)) * np.logspace(0, 2, d_x) + 10
    return x, x @ rng.normal(size=(d_x, d_y)) / 30 + rng.normal(size=(n, d_y)) * np.linspace(0.2, 4, d_y)


def test_correlations_equal_an_independent_implementation():
    x, y = small()
    got = canonical_correlations(regression(x, y))
    qx, qy = (np.linalg.qr(part - part.mean(0))[0] for part in (x, y))
    want = np.linalg.svd(qx.T @ qy, compute_uv=False)
    assert np.abs(got.rho.numpy() - want).max() <= 1e-8
    reference = CCA(n_components=6, max_iter=100000, tol=1e-12).fit(x, y)
    a, b = reference.transform(x, y)
    assert np.abs(got.rho.numpy() - [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(6)]).max() <= 1e-6
    u, v = ((part - part.mean(0)) @ directions.numpy() for part, directions in ((x, got.x_directions), (y, got.y_directions)))
    for one, other, covariance in ((u, u, np.eye(6)), (v, v, np.eye(6)), (u, v, np.diag(want))):
        assert np.abs(one.T @ other / len(x) - covariance).max() <= 1e-8
    for part, variates, patterns in ((x, u, got.x_patterns), (y, v, got.y_patterns)):
        assert np.abs((part - part.mean(0)).T @ variates / len(x) - patterns.numpy()).max() <= 1e-8


def test_the_sum_of_squares_is_the_whitened_r2_of_least_squares():
    x, y = small()
    weight = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
    error = (y - y.mean(0)) - (x - x.mean(0)) @ weight
    inverse = np.linalg.inv((y - y.mean(0)).T @ (y - y.mean(0)))
    got = canonical_correlations(regression(x, y))
    assert float(got.rho.square().sum()) / got.width == pytest.approx(1 - np.trace(inverse @ error.T @ error) / 6, abs=1e-10)


@pytest.mark.parametrize("condition", [1e14, 1e10, 1e8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rank_deficient_data_give_finite_correlations_up_to_one(condition, seed):
    """κ(Cxx) up to 1e14, duplicated and constant columns, an exact linear map."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    x = rng.normal(size=(2000, 20)) * np.logspace(0, -np.log10(condition) / 2, 20) @ rotation + 3
    x = np.hstack([x, x[:, :2], np.full((2000, 1), 7.0)])
    y = x @ rng.normal(size=(23, 15))
    got = canonical_correlations(regression(x, y))
    for tensor in (got.rho, got.debiased, got.x_directions, got.y_directions, got.x_patterns, got.y_patterns):
        assert bool(torch.isfinite(tensor).all())
    assert float(got.rho.max()) <= 1 + 1e-9
    assert got.ranks[0] <= 20
    few = canonical_correlations(regression(x[:12], y[:12]), force=True)
    assert few.ranks[0] <= 11
    assert float(few.rho.max()) <= 1 + 1e-9
    assert bool(torch.isnan(few.debiased).all())  # no silent number where there are fewer tokens than dimensions


def test_planted_dimensions_are_counted_and_debiased_under_autocorrelation():
    """Acceptance 20 and 22: 32 of 256 dimensions at ρ = 0.9, AR(0.8), 9,600 tokens; true Σρ² = 25.92."""
    x, y, mixes = planted(np.random.default_rng(0))
    train, folds, null = read(x, y)
    got = canonical_correlations(train, folds, null)
    truth = 32 * 0.81
    assert 1900 < got.size.n < 2900
    assert abs(got.dimensions - 32) <= 1
    assert float(got.debiased.sum()) == pytest.approx(truth, rel=0.02)
    assert float(got.rho.square().sum()) > 1.5 * truth  # in sample
    assert float(got.cross_fitted.sum()) < truth
    assert got.noise_floor == pytest.approx(256**2 / got.size.n)
    naive = canonical_correlations(train)
    assert naive.dimensions > 60  # tokens are not independent
    assert got.rank_for(0.9) == pytest.approx(29, abs=1)
    # The subspace found is the one planted: rows of the mix that carry the shared dimensions.
    covariance = train.yy.numpy() / train.n
    root = np.linalg.cholesky(np.linalg.inv(covariance)).T
    found, want = (root @ part for part in (got.y_patterns[:, :32].numpy(), mixes[1][:32].T))
    assert np.degrees(subspace_angles(found, want)[:10]).mean() < 25


def test_the_subspace_is_found_to_ten_degrees_with_enough_tokens():
    x, y, mixes = planted(np.random.default_rng(1), sequences=600, width=64, shared=8, ar=0.0)
    train, _, null = read(x, y)
    got = canonical_correlations(train, null=null)
    assert abs(got.dimensions - 8) <= 1
    root = np.linalg.cholesky(np.linalg.inv(train.yy.numpy() / train.n)).T
    angles = subspace_angles(root @ got.y_patterns[:, :8].numpy(), root @ mixes[1][:8].T)
    assert np.degrees(angles[0]) < 10


def test_independent_data_have_no_transport():
    x, y, _ = planted(np.random.default_rng(2), width=64, shared=0, sequences=200)
    train, folds, null = read(x, y)
    got = canonical_correlations(train, folds, null)
    assert got.dimensions <= 1
    error = 2 * float(got.cross_fitted.std()) / math.sqrt(len(got.cross_fitted))
    assert abs(float(got.cross_fitted.sum()) / got.width) <= 0.02 + error
    assert float(got.debiased.sum()) / got.width <= 0.02
    assert participation_ratio(got.rho) == pytest.approx(0.72 * 64, rel=0.05)
    assert participation_ratio(got.rho) == pytest.approx(participation_ratio(got.null), rel=0.05)


def test_position_effects_are_trimmed():
    """Four dimensions of pure position survive the shuffle; they must not count as noise, nor as transport."""
    rng = np.random.default_rng(3)
    plain, _, plain_null = read(*planted(rng, width=128, shared=16)[:2])
    x, y, _ = planted(np.random.default_rng(3), width=128, shared=16, positions=4)
    train, _, null = read(x, y)
    got, want = canonical_correlations(train, null=null), canonical_correlations(plain, null=plain_null)
    assert abs(got.size.position_only - 4) <= 1
    assert got.size.n == pytest.approx(want.size.n, rel=0.05)
    assert abs(got.dimensions - 16) <= 1
    untrimmed = 1 + 128**2 / float(got.null.square().sum())
    assert untrimmed < 0.75 * want.size.n


def test_tokens_without_a_partner_are_counted_in():
    rng = np.random.default_rng(4)
    x, y, _ = planted(rng, width=64, shared=8)
    train, _, null = read(x, y)
    half_x, half_y = x[::2].reshape(-1, 64), np.roll(y, 1, axis=0)[::2].reshape(-1, 64)
    half = NullPairs(len(half_x), torch.from_numpy((half_x - half_x.mean(0)).T @ (half_y - half_y.mean(0))))
    all_, some = (canonical_correlations(train, null=pairs).size.n for pairs in (null, half))
    assert some == pytest.approx(all_, rel=0.1)


def test_debias_solves_its_quadratic_and_the_edge_is_that_of_simulated_noise():
    ranks, size = (40, 60), EffectiveSize(800.0, 0, noise_edge(40, 60, 800.0))
    truth = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64)
    a, b = 40 / 800, 60 / 800
    sample = truth * (1 - a + a / truth) * (1 - b + b / truth)
    torch.testing.assert_close(debias(sample, ranks, size), truth, atol=1e-12, rtol=0)
    assert float(debias(torch.ones(1, dtype=torch.float64), ranks, size)) == pytest.approx(1)
    rng = np.random.default_rng(5)
    tops = []
    for _ in range(20):
        qx, qy = (np.linalg.qr(rng.normal(size=(800, d)))[0] for d in ranks)
        tops.append(np.linalg.svd(qx.T @ qy, compute_uv=False)[0] ** 2)
    assert np.mean(np.array(tops) < size.edge) >= 0.9
    assert np.mean(tops) > 0.85 * size.edge


def test_too_few_effective_tokens_are_refused():
    x, y, _ = planted(np.random.default_rng(6), sequences=12, width=64, shared=4)
    train, folds, null = read(x, y)
    with pytest.raises(MomentsError, match=r"worth \d+ independent ones, fewer than 5 for each of 64 dimensions"):
        canonical_correlations(train, folds, null)
    assert canonical_correlations(train, folds, null, force=True).dimensions >= 0
    with pytest.raises(MomentsError, match="hold no noise"):
        effective_size(torch.zeros(4, dtype=torch.float64), (4, 4))


def test_ceilings_of_directions_bound_every_map_and_are_convex_means_of_rho():
    """Acceptance 18."""
    x, y = small()
    train = regression(x, y)
    got = canonical_correlations(train)
    directions = torch.from_numpy(np.random.default_rng(7).normal(size=(20, 6)))
    ceilings = direction_ceilings(train, directions).in_sample
    loadings = (directions @ got.y_patterns).square() / ((directions @ train.yy) * directions).sum(1, keepdim=True) * train.n
    torch.testing.assert_close(loadings.sum(1), torch.ones(20, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float((ceilings - loadings @ got.rho.square()).abs().max()) <= 1e-9
    for seed in range(20):
        weight = np.random.default_rng(seed).normal(size=(9, 6)) if seed else np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
        target = (y - y.mean(0)) @ directions.numpy().T
        error = target - (x - x.mean(0)) @ weight @ directions.numpy().T
        r2 = 1 - (error**2).sum(0) / (target**2).sum(0)
        assert (r2 <= ceilings.numpy() + 1e-9).all()
        if seed == 0:
            assert np.abs(r2 - ceilings.numpy()).max() <= 1e-9
    still = direction_ceilings(train, torch.zeros(1, 6, dtype=torch.float64))
    assert math.isnan(float(still.in_sample))


def test_own_null_takes_the_bias_off_ceilings_of_directions():
    """Acceptance 18: mean bias ≤ 0.003 on planted autocorrelated data."""
    biases = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x, y, mixes = planted(rng, width=128, shared=32)
        train, _, null = read(x, y)
        directions = rng.normal(size=(200, 128)) @ np.linalg.inv(mixes[1]).T  # in coordinates of the independent dimensions
        loadings = directions @ mixes[1].T
        truth = 0.81 * (loadings[:, :32] ** 2).sum(1) / (loadings**2).sum(1)
        got = direction_ceilings(train, torch.from_numpy(directions), null)
        biases.append((np.mean(got.debiased.numpy() - truth), np.mean(got.in_sample.numpy() - truth)))
    own, in_sample = np.mean(biases, axis=0)
    assert abs(own) <= 0.003
    assert in_sample > 0.02


def test_fewer_shuffled_pairs_than_tokens_do_not_bias_ceilings_of_directions():
    biases = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x, y, mixes = planted(rng, width=64, shared=16)
        train, _, _ = read(x, y)
        half_x, half_y = x[::2].reshape(-1, 64), np.roll(y, 1, axis=0)[::2].reshape(-1, 64)
        null = NullPairs(len(half_x), torch.from_numpy((half_x - half_x.mean(0)).T @ (half_y - half_y.mean(0))))
        directions = rng.normal(size=(200, 64)) @ np.linalg.inv(mixes[1]).T
        loadings = directions @ mixes[1].T
        truth = 0.81 * (loadings[:, :16] ** 2).sum(1) / (loadings**2).sum(1)
        biases.append(np.mean(direction_ceilings(train, torch.from_numpy(directions), null).debiased.numpy() - truth))
    assert abs(np.mean(biases)) <= 0.006  # 0.03 without the correction


def test_cross_fitting_is_signed_correlation_of_held_out_variates():
    rng = np.random.default_rng(12)
    x, y = rng.normal(size=(60, 10, 6)), rng.normal(size=(60, 10, 5))
    x[..., 0] += y[..., 0]
    _, folds, _ = read(x, y, folds=3)
    found = []
    for fold in range(3):
        rest = np.arange(60)[np.arange(60) % 3 != fold]
        (rest_x, rest_y), (held_x, held_y) = (
            [part[chosen].reshape(-1, part.shape[-1]) for part in (x, y)] for chosen in (rest, np.arange(60)[fold::3])
        )
        qx, rx = np.linalg.qr(rest_x - rest_x.mean(0))
        qy, ry = np.linalg.qr(rest_y - rest_y.mean(0))
        left, _, right = np.linalg.svd(qx.T @ qy, full_matrices=False)
        a, b = held_x @ np.linalg.solve(rx, left), held_y @ np.linalg.solve(ry, right.T)
        rho = np.array([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(5)])
        found.append(np.sign(rho) * rho**2)
    assert (np.array(found) < 0).any()
    assert np.abs(cross_fit(Regression.merge(folds), folds).numpy() - np.mean(found, axis=0)).max() <= 1e-10


def test_projector_and_membership():
    x, y = small()
    train = regression(x, y)
    got = canonical_correlations(train)
    projector = got.projector(3)
    torch.testing.assert_close(projector @ projector, projector, atol=1e-9, rtol=0)
    inside = got.y_patterns[:, :3].T
    torch.testing.assert_close(inside @ projector, inside, atol=1e-9, rtol=0)
    outside = got.y_patterns[:, 3:].T
    assert float((outside @ projector).abs().max()) <= 1e-9
    member = got.membership(got.y_directions.T, train.yy, 3)
    torch.testing.assert_close(member, torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64), atol=1e-9, rtol=0)
    root = np.linalg.cholesky(np.linalg.inv(train.yy.numpy()))
    isotropic = torch.from_numpy(np.random.default_rng(8).normal(size=(20000, 6)) @ root.T)
    assert float(got.membership(isotropic, train.yy, 3).mean()) == pytest.approx(3 / 6, abs=0.01)


def test_angles_between_subspaces_equal_scipy():
    rng = np.random.default_rng(9)
    x, y = small()
    other = x[:, :4] + rng.normal(size=(len(x), 4))
    first, second = canonical_correlations(regression(x, y)), canonical_correlations(regression(other, y))
    got = principal_angles(*((c.y_directions[:, :3], c.y_patterns[:, :3]) for c in (first, second)))
    root = np.linalg.cholesky(np.linalg.inv(np.cov(y.T))).T
    want = np.degrees(subspace_angles(*(root @ c.y_patterns[:, :3].numpy() for c in (first, second))))[::-1]
    assert np.abs(got.numpy() - want).max() <= 1e-5


def test_participation_ratios_count_equal_correlations():
    rho = torch.tensor([0.5] * 7 + [0.0] * 3, dtype=torch.float64)
    assert participation_ratio(rho) == pytest.approx(7)
    assert participation_ratio_squared(rho) == pytest.approx(7)
    assert math.isnan(participation_ratio(torch.zeros(3)))
