"""Ridge from moments against scikit-learn, and O(d²) scores against direct ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnato.errors import MomentsError
from nnato.linalg import decomposes, principal_axes, random_orthogonal, singular, solve_positive, spectrum, whitening
from nnato.metrics import METRICS, Weighting, error_matrix, r2, squared_deviations, squared_errors, weighting
from nnato.moments import Moments
from nnato.regression import Frame, Regression
from nnato.ridge import KAPPAS, Path, RidgeSource, Trial, readouts, score_path, score_path_gcv
from nnato.sites import ResidualSite

S, T = ResidualSite(1), ResidualSite(3)
D = 12


def make(n, d=D, seed=0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    scales = np.logspace(0, 2, d)
    x = rng.normal(size=(n, d)) * scales + 50
    y = x @ mix + rng.normal(size=(n, d)) * 3 - 20
    return x, y


def moments_of(x, y):
    moments = Moments.of_pairs([(S, T)], x.shape[1])
    moments.update(torch.from_numpy(np.stack([x, y])))
    return moments


def regression(x, y):
    return Regression.of(moments_of(x, y), (S, T))


@pytest.fixture(scope="module")
def data():
    return {"train": make(300), "validation": make(120, seed=1), "test": make(150, seed=2)}


@pytest.fixture(scope="module")
def parts(data):
    return {split: regression(*xy) for split, xy in data.items()}


def trial(train, heldout, frame=None):
    frame = frame or Frame()
    return Trial(train, heldout, frame, RidgeSource(frame.apply(train).xx))


def alphas_of(x, kappas=KAPPAS):
    unit = ((x - x.mean(0)) ** 2).sum() / x.shape[1]
    return [kappa * unit for kappa in kappas]


def sklearn_name(metric):
    return {"uniform": "uniform_average"}.get(metric, metric)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_ridge_equals_scikit_learn_at_every_penalty(data, parts, kappa):
    x, y = data["train"]
    source = RidgeSource(parts["train"].xx)
    (alpha,) = alphas_of(x, (kappa,))
    assert kappa * source.scale == pytest.approx(alpha, rel=1e-12)
    reference = Ridge(alpha=alpha, solver="svd").fit(x, y)
    weight = source.weight(parts["train"].xy, alpha).numpy()
    assert np.abs(weight - reference.coef_.T).max() <= 1e-9 * np.abs(reference.coef_).max()


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_the_whole_path_equal_direct_ones_and_the_best_is_chosen(data, parts, metric):
    x, y = data["validation"]
    alphas = alphas_of(data["train"][0])
    path = score_path([trial(parts["train"], parts["validation"])], [parts["validation"]], alphas, parts["train"], metric)
    direct = []
    for alpha in alphas:
        predicted = Ridge(alpha=alpha, solver="svd").fit(*data["train"]).predict(x)
        if metric == "whitened":
            root = np.linalg.cholesky(np.linalg.inv(parts["train"].yy.numpy()))
            error, total = ((y - predicted) @ root) ** 2, ((y - y.mean(0)) @ root) ** 2
            direct.append(1 - error.sum() / total.sum())
        else:
            direct.append(r2_score(y, predicted, multioutput=sklearn_name(metric)))
    assert np.abs(np.array(path.scores) - direct).max() <= 1e-9
    assert path.best == int(np.argmax(direct))
    assert path.penalty == alphas[path.best]


@pytest.mark.parametrize("scale", [False, True])
def test_kfold_equals_grid_search(data, scale):
    """METHODS acceptance 8 and 10: the same scores of every penalty, and the same choice."""
    x, y = data["train"]
    alphas = [0.1, 1.0, 10.0, 100.0, 1000.0, 2000.0, 5000.0, 10000.0]
    estimator = make_pipeline(StandardScaler(), Ridge(solver="svd")) if scale else Ridge(solver="svd")
    grid = {("ridge__alpha" if scale else "alpha"): alphas}
    search = GridSearchCV(estimator, grid, cv=KFold(5), scoring="r2").fit(x, y)
    folds = [regression(x[held], y[held]) for _, held in KFold(5).split(x)]
    train = Regression.merge(folds)
    trials = [trial(rest, fold, Frame.of(rest, scale)) for fold in folds for rest in [train.without(fold)]]
    path = score_path(iter(trials), folds, alphas, train, "uniform", "mean")
    assert np.abs(np.array(path.scores) - search.cv_results_["mean_test_score"]).max() <= 1e-9
    assert path.penalty == next(iter(search.best_params_.values()))
    frame = Frame.of(train, scale)
    weight = frame.restore(RidgeSource(frame.apply(train).xx).weight(frame.apply(train).xy, path.penalty)).numpy()
    best = search.best_estimator_
    want = (best[-1].coef_ / best[0].scale_).T if scale else best.coef_.T
    assert np.abs(weight - want).max() <= 1e-9 * np.abs(want).max()


@pytest.mark.parametrize("metric", METRICS)
def test_pooled_scores_are_one_ratio_of_sums(data, metric):
    x, y = data["train"]
    folds = [regression(x[held], y[held]) for _, held in KFold(4).split(x)]
    train = Regression.merge(folds)
    errors, totals = 0.0, 0.0
    for rest, held in KFold(4).split(x):
        errors = errors + (y[held] - Ridge(alpha=50.0, solver="svd").fit(x[rest], y[rest]).predict(x[held])).T ** 2 @ np.ones(len(held))
        totals = totals + ((y[held] - y[held].mean(0)) ** 2).sum(0)
    path = score_path([trial(train.without(fold), fold) for fold in folds], folds, [50.0], train, metric)
    if metric == "variance_weighted":
        assert path.scores[0] == pytest.approx(1 - errors.sum() / totals.sum(), abs=1e-9)
    elif metric == "uniform":
        # Weights are those of all held-out rows together, about their common mean.
        spread = ((y - y.mean(0)) ** 2).sum(0)
        assert path.scores[0] == pytest.approx(1 - (errors / spread).sum() / (totals / spread).sum(), abs=1e-9)
    else:
        assert path.scores[0] < 1


def test_gcv_equals_its_definition(data, parts):
    x, y = data["train"]
    alphas = alphas_of(x)
    source = RidgeSource(parts["train"].xx)
    path = score_path_gcv(source, parts["train"], Frame(), alphas, "variance_weighted")
    centred = np.hstack([np.ones((len(x), 1)), x - x.mean(0)])
    for alpha, score in zip(alphas, path.scores, strict=True):
        penalty = alpha * np.diag([0.0] + [1.0] * x.shape[1])
        hat = centred @ np.linalg.solve(centred.T @ centred + penalty, centred.T)
        gcv = ((y - hat @ y) ** 2).sum() / (1 - np.trace(hat) / len(x)) ** 2
        assert score == pytest.approx(1 - gcv / ((y - y.mean(0)) ** 2).sum(), abs=1e-10)


def test_gcv_has_no_score_where_tokens_are_too_few(data):
    x, y = (part[:8] for part in data["train"])
    few = regression(x, y)
    path = score_path_gcv(RidgeSource(few.xx), few, Frame(), [1e-9, 1e5], "variance_weighted")
    assert path.scores[0] == -float("inf")
    assert path.penalty == 1e5


def test_shrinking_to_a_prior_equals_regression_of_the_difference(data, parts):
    x, y = data["train"]
    prior = torch.eye(D, dtype=torch.float64)
    frame = Frame.of(parts["train"], prior=prior)
    framed = frame.apply(parts["train"])
    weight = frame.restore(RidgeSource(framed.xx).weight(framed.xy, 1e4)).numpy()
    reference = Ridge(alpha=1e4, solver="svd").fit(x, y - x).coef_.T + np.eye(D)
    assert np.abs(weight - reference).max() <= 1e-9 * np.abs(reference).max()
    heldout, held = parts["validation"], data["validation"]
    path = score_path([trial(parts["train"], heldout, frame)], [heldout], [1e4], parts["train"], "uniform")
    predicted = held[0] + Ridge(alpha=1e4, solver="svd").fit(x, y - x).predict(held[0])
    assert path.scores[0] == pytest.approx(r2_score(held[1], predicted), abs=1e-9)
    far = RidgeSource(framed.xx).weight(framed.xy, 1e14)
    assert float((frame.restore(far) - prior).abs().max()) < 1e-6  # a huge penalty leaves the prior


def test_readouts_choose_a_penalty_for_each_direction(data, parts):
    x, y = data["train"]
    directions = np.random.default_rng(5).normal(size=(7, D))
    alphas = alphas_of(x)
    got = readouts(RidgeSource(parts["train"].xx), parts["train"], parts["validation"], torch.from_numpy(directions), torch.tensor(alphas))
    for number, direction in enumerate(directions):
        held_x, held_y = data["validation"][0], data["validation"][1] @ direction
        fits = [Ridge(alpha=alpha, solver="svd").fit(x, y @ direction) for alpha in alphas]
        scores = [r2_score(held_y, one.predict(held_x)) for one in fits]
        best = fits[int(np.argmax(scores))]
        assert np.abs(got.scores[number].numpy() - scores).max() <= 1e-9
        assert float(got.alphas[number]) == best.alpha
        assert np.abs(got.weight[:, number].numpy() - best.coef_).max() <= 1e-9 * np.abs(best.coef_).max()
        assert float(got.bias[number]) == pytest.approx(best.intercept_, rel=1e-9)
    assert len(set(got.alphas.tolist())) > 1
    with pytest.raises(MomentsError, match=r"directions have shape \(2, 3\), not \(directions, 12\)"):
        readouts(RidgeSource(parts["train"].xx), parts["train"], parts["validation"], torch.ones(2, 3), torch.ones(1))


@pytest.mark.parametrize("metric", ["uniform", "variance_weighted"])
def test_r2_equals_scikit_learn_on_test(data, parts, metric):
    weight = RidgeSource(parts["train"].xx).weight(parts["train"].xy, 30.0)
    bias = parts["train"].y_mean - parts["train"].x_mean @ weight
    x, y = data["test"]
    total = parts["test"].yy
    weigh = weighting(metric, total, total)
    want = r2_score(y, x @ weight.numpy() + bias.numpy(), multioutput=sklearn_name(metric))
    assert r2(error_matrix(Regression.of(moments_of(x, y), (S, T)), weight, bias), total, weigh) == pytest.approx(want, abs=1e-9)
    folds = [regression(x[part], y[part]) for part in np.array_split(np.arange(len(x)), 4)]
    errors = squared_errors(weight, bias, folds, weigh)
    totals = squared_deviations(folds, parts["test"].y_mean, weigh)
    assert 1 - float(errors.sum() / totals.sum()) == pytest.approx(want, abs=1e-9)


def test_error_matrix_is_that_of_materialised_predictions(data):
    rng = np.random.default_rng(5)
    weight, bias = rng.normal(size=(D, D)), rng.normal(size=D)
    x, y = data["test"]
    error = y - x @ weight - bias
    got = error_matrix(Regression.of(moments_of(x, y), (S, T)), torch.from_numpy(weight), torch.from_numpy(bias)).numpy()
    assert np.abs(got - error.T @ error).max() <= 1e-11 * np.abs(error.T @ error).max()


@pytest.mark.parametrize("metric", METRICS)
def test_weightings_have_roots_and_scales(parts, metric):
    weigh = weighting(metric, parts["train"].yy, parts["test"].yy)
    root, inverse = weigh.factors(D)
    matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(D, D)))
    torch.testing.assert_close(weigh.apply(matrix), matrix @ root @ root.T)
    torch.testing.assert_close(inverse @ root, torch.eye(D, dtype=torch.float64), atol=1e-9, rtol=0)
    scale = torch.linspace(1, 2, D, dtype=torch.float64)
    scaled = weigh.scaled(scale)
    torch.testing.assert_close(scaled.trace(matrix), weigh.trace(scale[:, None] * matrix * scale))
    torch.testing.assert_close(scaled.apply(matrix), matrix @ scaled.factors(D)[0] @ scaled.factors(D)[0].T)
    dense = Weighting(root @ root.T)
    torch.testing.assert_close(dense.factors(D)[0] @ dense.factors(D)[0].T, dense.gamma)


def test_penalties_at_the_end_of_the_grid_are_marked():
    assert Path((1.0, 2.0), (0.1, 0.2)).at_edge
    assert not Path((1.0, 2.0, 3.0), (0.1, 0.2, 0.1)).at_edge
    assert not Path((1.0,), (0.1,)).at_edge


def test_directions_without_variance_get_no_weight():
    x, y = make(200)
    x[:, 3] = 7.0
    rows = regression(x, y)
    (alpha,) = alphas_of(x, (1e-8,))
    weight = RidgeSource(rows.xx).weight(rows.xy, alpha).numpy()
    assert np.abs(weight[3]).max() <= 1e-12
    reference = Ridge(alpha=alpha, solver="svd").fit(x, y).coef_.T
    assert np.abs(weight - reference).max() <= 1e-9 * np.abs(reference).max()


def test_the_grid_has_at_least_twenty_penalties():
    assert len(KAPPAS) >= 20
    assert (KAPPAS[0], KAPPAS[-1]) == (pytest.approx(1e-8), pytest.approx(1e2))


def test_bad_words_are_refused(parts):
    with pytest.raises(MomentsError, match="unknown metric 'r2'; known are variance_weighted, uniform, whitened"):
        weighting("r2", torch.eye(2), torch.eye(2))
    with pytest.raises(MomentsError, match="unknown average 'median'; known are pooled, mean"):
        score_path([], [], [1.0], parts["train"], "uniform", "median")
    still = Regression(9, *(torch.zeros_like(part) for part in (parts["train"].x_mean,) * 2 + (parts["train"].xx,) * 3))
    with pytest.raises(MomentsError, match="the held-out residuals of the target do not vary"):
        score_path([trial(parts["train"], still)], [still], [1.0], parts["train"], "variance_weighted")


def test_linalg_refuses_what_has_no_spectrum():
    bad = torch.full((2, 2), float("nan"), dtype=torch.float64)
    for function in (spectrum, principal_axes, singular, lambda matrix: solve_positive(matrix, matrix)):
        with pytest.raises(MomentsError, match="not finite"):
            function(bad)
    with pytest.raises(MomentsError, match="do not vary"):
        spectrum(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(MomentsError, match="not positive definite"):
        solve_positive(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), torch.ones(2, 1, dtype=torch.float64))


def test_linalg_equals_numpy():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(8, 5))
    matrix = half @ half.T  # rank 5 of 8
    torch_matrix = torch.from_numpy(matrix)
    whitener, colourer = whitening(torch_matrix)
    assert whitener.shape == (8, 5)
    assert np.abs((whitener.T @ torch_matrix @ whitener).numpy() - np.eye(5)).max() <= 1e-10
    assert np.abs((colourer.T @ whitener).numpy() - np.eye(5)).max() <= 1e-12
    assert np.abs((colourer @ colourer.T).numpy() - matrix).max() <= 1e-12 * np.abs(matrix).max()
    decomposed = spectrum(torch_matrix)
    assert np.abs((decomposed.colourer @ decomposed.colourer.T).numpy() - matrix).max() <= 1e-12 * np.abs(matrix).max()
    assert np.abs((decomposed.whitener.T @ torch_matrix @ decomposed.whitener).numpy() - np.eye(5)).max() <= 1e-9
    values, vectors = principal_axes(torch_matrix)
    assert np.abs(values.numpy() - np.linalg.eigvalsh(matrix)[::-1]).max() <= 1e-12 * np.abs(matrix).max()
    assert decomposes(torch_matrix, values, vectors)
    assert not decomposes(torch_matrix, values, vectors + 1e-6)
    assert not decomposes(torch_matrix, values + 1e-6, vectors)
    left, sizes, right = singular(torch.from_numpy(half))
    assert np.abs((left * sizes @ right.T).numpy() - half).max() <= 1e-12
    positive = torch_matrix + torch.eye(8, dtype=torch.float64)
    assert np.abs(solve_positive(positive, torch_matrix).numpy() - np.linalg.solve(positive.numpy(), matrix)).max() <= 1e-10
    rotation = random_orthogonal(8, 3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8, dtype=torch.float64))
    assert bool((rotation == random_orthogonal(8, 3)).all())
    assert not bool((rotation == random_orthogonal(8, 4)).all())
