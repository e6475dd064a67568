"""Scores of features from moments, against materialised predictions, and verdicts on planted models."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from test_cca import read
from test_dictionaries import make_sae
from test_efficiency import rows_of
from test_regression import regression

from nnato.accumulation import accumulate
from nnato.cca import canonical_correlations
from nnato.dictionaries import load_dictionary, origin
from nnato.efficiency import PairRows
from nnato.errors import DictionaryError
from nnato.feature_plots import mean_grid, r2_distributions, trajectories
from nnato.features import evaluate_features, fitted_maps, quadratic_forms, score_directions
from nnato.models import describe
from nnato.plots import save_figure
from nnato.regression import Regression
from nnato.selection import Method
from nnato.sites import ResidualSite
from nnato.verdicts import VERDICTS, Thresholds, judge

PAIR = ResidualSite(1), ResidualSite(3)


def unit(rng, count, width):
    rows = rng.normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_quadratic_forms_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    directions, matrices = rng.normal(size=(11, 5)), rng.normal(size=(3, 5, 5))
    want = np.einsum("fi,mij,fj->mf", directions, matrices, directions)
    for size in (2**23, 40, 1):
        monkeypatch.setattr("nnato.features.CHUNK", size)
        np.testing.assert_allclose(quadratic_forms(torch.from_numpy(directions), list(torch.from_numpy(matrices))), want, atol=1e-12)


@pytest.fixture(scope="module")
def scored():
    """Rows, materialised parts, directions, maps and scores of a noisy linear system."""
    rows, parts = rows_of(np.random.default_rng(0), (120, 60, 80), folds=5)
    directions = unit(np.random.default_rng(1), 30, 8)
    maps = fitted_maps(PAIR, rows, Method())
    return rows, parts, directions, maps, score_directions(torch.from_numpy(directions), rows, maps)


def test_r2_of_every_feature_is_that_of_materialised_predictions(scored):
    """METHODS acceptance 15."""
    _, parts, directions, maps, (scores, _) = scored
    x, y = (part.reshape(-1, 8) for part in parts[2])
    for name, one in maps.items():
        predicted = one(torch.from_numpy(x)).numpy()
        want = [r2_score(y @ direction, predicted @ direction) for direction in directions]
        np.testing.assert_allclose(scores.r2[name].value, want, atol=1e-8)
    errors = {name: ((y - one(torch.from_numpy(x)).numpy()) @ directions.T) ** 2 for name, one in maps.items()}
    skill = 1 - errors["transport"].sum(0) / errors["identity_shift"].sum(0)
    np.testing.assert_allclose(scores.skill.value, skill, atol=1e-8)
    np.testing.assert_allclose(scores.over_null.value, scores.r2["transport"].value - scores.r2["shuffled"].value, atol=1e-8)


def test_errors_are_over_folds_of_documents(scored):
    """The linearised formula of METHODS §9, from rows."""
    _, parts, directions, maps, (scores, _) = scored
    x, y = parts[2]
    a = y @ directions.T
    b = maps["transport"](torch.from_numpy(x)).numpy() @ directions.T
    sse = np.stack([((a - b)[fold::5] ** 2).sum((0, 1)) for fold in range(5)])
    sst = np.stack([((a[fold::5] - a.mean((0, 1))) ** 2).sum((0, 1)) for fold in range(5)])
    ratio = sse.sum(0) / sst.sum(0)
    want = np.sqrt(5 / 4 * ((sse - ratio * sst) ** 2).sum(0)) / sst.sum(0)
    np.testing.assert_allclose(scores.r2["transport"].error, want, rtol=1e-8)
    assert scores.r2["transport"].degrees.tolist() == [4] * 30


def test_sums_are_those_of_rows(scored):
    _, parts, directions, maps, (scores, _) = scored
    x, y = (part.reshape(-1, 8) for part in parts[2])
    a, b = y @ directions.T, maps["transport"](torch.from_numpy(x)).numpy() @ directions.T
    raw = scores.sums.moved(scores.mean)
    for name, want in {"a": a.sum(0), "b": b.sum(0), "aa": (a**2).sum(0), "bb": (b**2).sum(0), "ab": (a * b).sum(0)}.items():
        np.testing.assert_allclose(getattr(raw, name)[0], want, rtol=1e-9, atol=1e-7)


def test_ceilings_bound_every_linear_map_in_sample_and_are_means_of_correlations(scored):
    """METHODS acceptance 18."""
    rows, parts, directions, _, (scores, _) = scored
    x, y = (part.reshape(-1, 8) for part in parts[0])
    best = LinearRegression().fit(x, y @ directions.T)
    np.testing.assert_allclose(scores.ceiling_in_sample, r2_score(y @ directions.T, best.predict(x), multioutput="raw_values"), atol=1e-9)
    rng = np.random.default_rng(3)
    for _ in range(20):
        weight = rng.normal(size=(8, 8))
        predicted = (x - x.mean(0)) @ weight + y.mean(0)
        worse = r2_score(y @ directions.T, predicted @ directions.T, multioutput="raw_values")
        assert (scores.ceiling_in_sample.numpy() >= worse).all()
    train = Regression.merge(rows.folds)
    found = canonical_correlations(train, null=rows.null)
    variance = ((torch.from_numpy(directions) @ train.yy) * torch.from_numpy(directions)).sum(1) / train.n
    omega = (torch.from_numpy(directions) @ found.y_patterns).square() / variance[:, None]
    np.testing.assert_allclose(scores.ceiling_in_sample, omega @ found.rho.square(), atol=1e-9)
    assert (scores.ceiling.low < scores.ceiling.value).all()
    np.testing.assert_allclose(scores.membership, omega[:, : found.spikes].sum(1), atol=1e-9)


def test_jackknifed_ceilings_leave_out_folds_of_training_documents(scored):
    _, parts, directions, _, (scores, _) = scored
    x, y = parts[0]
    without = []
    for fold in range(5):
        kept = [number for number in range(len(x)) if number % 5 != fold]
        u, v = x[kept].reshape(-1, 8), y[kept].reshape(-1, 8) @ directions.T
        without.append(r2_score(v, LinearRegression().fit(u, v).predict(u), multioutput="raw_values"))
    null = scores.ceiling_null.numpy()
    spread = (np.stack(without) - np.mean(without, 0)) / (1 - null)
    np.testing.assert_allclose(scores.ceiling.error, np.sqrt(4 / 5 * (spread**2).sum(0)), rtol=1e-7)
    np.testing.assert_allclose(scores.ceiling.value, (scores.ceiling_in_sample.numpy() - null) / (1 - null), atol=1e-12)


# ---- planted models --------------------------------------------------------------------------------------------------------

KINDS = ("carried", "mapped", "synthesised", "between")
EACH = 12


def planted(rng, documents, length=40, keep=0.8):
    """Documents of an AR process, and a target whose directions are of four kinds, 12 each, in a random orthonormal basis.

    carried: the source's own number with a little noise (R² 0.9); mapped: another direction's (R² 0.9); synthesised: new (R² 0);
    between: R² 0.35.
    """
    width = 4 * EACH
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(width, width)))[0]

    def ar(count):
        noise = rng.normal(size=(count, length, width))
        states = np.empty_like(noise)
        states[:, 0] = noise[:, 0]
        for step in range(1, length):
            states[:, step] = keep * states[:, step - 1] + math.sqrt(1 - keep**2) * noise[:, step]
        return states

    x, new = ar(documents), ar(documents)
    share = np.repeat([0.9, 0.9, 0.0, 0.35], EACH)
    source = np.concatenate([x[..., :EACH], x[..., 2 * EACH : 3 * EACH], x[..., :EACH], x[..., 3 * EACH :]], axis=-1)
    y = np.sqrt(share) * source + np.sqrt(1 - share) * new
    return x @ basis.T, y @ basis.T, basis.T


def planted_rows(seed, documents=(240, 60, 120), folds=10):
    rng = np.random.default_rng(seed)
    parts = [planted(rng, count) for count in documents]
    _, train, null = read(*parts[0][:2], folds=folds)
    width = 4 * EACH
    validation = regression(*(part.reshape(-1, width) for part in parts[1][:2]))
    return PairRows(train, validation, read(*parts[2][:2], folds=folds)[1], null), torch.from_numpy(parts[0][2].copy())


def test_planted_directions_are_told_apart():
    """False discoveries ≤ 5 %, power ≥ 95 % at 9,600 training tokens of 240 documents, 4,800 test tokens of 120, over ten data sets."""
    said = np.zeros((len(KINDS), len(VERDICTS)), dtype=int)
    carried = np.zeros(len(KINDS), dtype=int)
    for seed in range(10):
        rows, directions = planted_rows(seed)
        scores, _ = score_directions(directions, rows, fitted_maps(PAIR, rows, Method()))
        verdicts = judge(scores.r2["transport"], scores.ceiling, scores.over_null, scores.r2["identity_shift"])
        for kind in range(len(KINDS)):
            mine = slice(kind * EACH, (kind + 1) * EACH)
            said[kind] += np.bincount(verdicts.code[mine].numpy(), minlength=len(VERDICTS))
            carried[kind] += int(verdicts.carried[mine].sum())
    transported, synthesised = (said[:, VERDICTS.index(name)] for name in ("transported", "synthesised"))
    assert transported[:2].sum() >= 0.95 * said[:2].sum()
    assert synthesised[2] >= 0.95 * said[2].sum()
    assert transported[2:].sum() <= 0.05 * max(1, transported.sum())
    assert synthesised[[0, 1, 3]].sum() <= 0.05 * max(1, synthesised.sum())
    assert carried[0] >= 0.95 * said[0].sum()
    assert carried[1:].sum() == 0


def test_at_the_threshold_false_discoveries_stay_rare():
    """Directions whose R² is exactly the threshold, beside as many that are transported: few of them may be called."""
    false = found = 0
    for seed in range(10):
        rows, directions = planted_rows(seed, (120, 40, 60))
        scores, _ = score_directions(directions, rows, fitted_maps(PAIR, rows, Method()))
        r2 = scores.r2["transport"]
        null = slice(3 * EACH, 4 * EACH)
        limits = Thresholds(high=float(r2.value[null].mean()))
        verdicts = judge(r2, scores.ceiling, scores.over_null, scores.r2["identity_shift"], limits)
        called = verdicts.code == VERDICTS.index("transported")
        false += int(called[null].sum())
        found += int(called.sum())
    assert found > 200
    assert false <= 0.05 * found


def test_own_null_leaves_little_bias_of_ceilings():
    """METHODS acceptance 18: mean bias of the debiased ceiling ≤ 0.003 on autocorrelated documents."""
    bias = []
    for seed in range(10):
        rows, directions = planted_rows(seed + 100)
        scores, _ = score_directions(directions, rows, fitted_maps(PAIR, rows, Method()))
        bias.append(scores.ceiling.value.numpy() - np.repeat([0.9, 0.9, 0.0, 0.35], EACH))
        assert (scores.ceiling_in_sample > scores.ceiling.value).all()
    assert abs(np.mean(bias)) <= 0.003


# ---- of a model ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dictionary(tmp_path, model):
    make_sae("topk", metadata=origin(describe(model), (ResidualSite(3),))).save_model(tmp_path / "sae")
    return load_dictionary(tmp_path / "sae")


def test_features_of_a_model(model, corpus, dictionary):
    moments = accumulate(model, corpus, [(0, 3), (1, 3), (0, 2)])
    told = []
    results = evaluate_features(moments, dictionary, [(1, 3), (0, 3)], random=20, force=True, progress=lambda *step: told.append(step))
    assert [result.pair for result in results] == [(0, 3), (1, 3)]
    assert told[-1] == ("scoring features", 2, 2)
    for result in results:
        assert len(result.features) == len(result.scores.mean) == 40
        assert len(result.random.mean) == 20
        record = json.loads(json.dumps(result.summary()))
        assert sum(record["verdicts"][name] for name in VERDICTS) == 40
        assert record["r2"]["transport"]["known"] == 40
        assert record["random_directions"]["r2"]["features"] == 20
        assert result.operator.details["model"] == moments.model
    some = evaluate_features(moments, dictionary, [(1, 3)], [7, 2], random=5, force=True)[0]
    row, whole = some.row(0), results[1].row(7)
    assert (row["feature"], row["source"], row["target"]) == (7, 1, 3)
    assert row["r2"]["transport"]["value"] == pytest.approx(whole["r2"]["transport"]["value"], abs=1e-12)
    assert row["membership"] == pytest.approx(whole["membership"])


def test_a_silent_decoder_row_is_nan_and_the_rest_is_not(model, corpus, dictionary):
    moments = accumulate(model, corpus, [(1, 3)])
    rows = dictionary.W_dec.clone()
    rows[4] = 0
    result = evaluate_features(moments, dataclasses.replace(dictionary, W_dec=rows), [(1, 3)], random=3, force=True)[0]
    value = result.scores.r2["transport"].value
    assert torch.isnan(value).nonzero().flatten().tolist() == [4]
    assert result.verdicts.name(4) == "undetermined"
    assert result.summary()["r2"]["transport"]["known"] == 39


def test_what_does_not_belong_is_refused(model, corpus, dictionary):
    moments = accumulate(model, corpus, [(1, 3), (1, 2)])
    with pytest.raises(DictionaryError, match="trained at site 3, not at 2"):
        evaluate_features(moments, dictionary, [(1, 2)])
    for wrong in ([40], [-1], [], [1, 1]):
        with pytest.raises(DictionaryError, match="latents 0 … 39"):
            evaluate_features(moments, dictionary, [(1, 3)], wrong)


@pytest.fixture
def drawn(monkeypatch):
    found = []
    monkeypatch.setattr("nnato.feature_plots.save_figure", lambda figure, path: (found.append(figure), save_figure(figure, path))[1])
    return found


def test_figures_show_the_numbers_of_the_results(model, corpus, tmp_path, drawn):
    make_sae("topk").save_model(tmp_path / "sae")
    pairs = [(0, 1), (0, 3), (1, 3), (2, 3)]
    results = evaluate_features(accumulate(model, corpus, pairs), load_dictionary(tmp_path / "sae"), pairs, random=20, force=True)
    values = [result.scores.r2["transport"].value for result in results]
    r2_distributions(results, tmp_path / "violins.png", "a model")
    into_1, into_3 = drawn[0].axes
    assert [text.get_text() for text in into_3.get_xticklabels()] == ["1", "2", "3"]
    middles = [line.get_ydata()[0] for line in into_3.lines if line.get_marker() == "o"]
    assert middles == pytest.approx([float(values[place].quantile(0.5)) for place in (3, 2, 1)])
    reds = [line.get_ydata()[0] for line in into_1.lines if line.get_color() == "#bc4749"]
    assert reds == pytest.approx([float(results[0].random.r2["transport"].value.nanmedian())])
    mean_grid(results, tmp_path / "grid.png", "a model")
    assert sorted(text.get_text() for text in drawn[1].axes[0].texts) == sorted(f"{float(one.mean()):.2f}" for one in values)
    trajectories(results[1:], tmp_path / "lines.png", "a model", most=7)
    axes = drawn[2].axes[0]
    (middle,) = [line for line in axes.lines if line.get_label() == "median feature"]
    assert list(middle.get_xdata()) == [1, 2, 3]
    assert list(middle.get_ydata()) == pytest.approx([float(values[place].quantile(0.5)) for place in (3, 2, 1)])
    single = [tuple(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 0.5]
    table = torch.stack([values[place] for place in (3, 2, 1)])
    order = table.mean(0).argsort()
    assert len(single) == 7
    assert single[0] == pytest.approx(table[:, order[0]].tolist())
    assert single[-1] == pytest.approx(table[:, order[-1]].tolist())
    other = [torch.full((40,), -3.0), *(torch.full((40,), float(place)) / 4 for place in range(3))]
    other[1][5] = float("nan")
    r2_distributions(results, tmp_path / "violins.png", "a model", other, "something else")
    assert "something else" in drawn[3]._suptitle.get_text()
    assert [line.get_ydata()[0] for line in drawn[3].axes[0].lines if line.get_marker() == "o"] == [-1]
    mean_grid(results, tmp_path / "grid.png", "a model", other)
    assert "-3.00" in [text.get_text() for text in drawn[4].axes[0].texts]
