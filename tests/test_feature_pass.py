"""Scores of active features and of activations from a pass, against direct computation on materialised residuals."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import hook_residuals, make_operator
from sklearn.metrics import f1_score, precision_score, r2_score, recall_score, roc_auc_score
from test_dictionaries import KINDS, LATENTS, D, load_dictionary_of, make_sae

from nnato import feature_pass as passes
from nnato.accumulation import accumulate, tokenize
from nnato.active_scores import REASONS, paper_metrics
from nnato.dictionaries import load_dictionary, origin
from nnato.errors import DictionaryError, MomentsError
from nnato.feature_pass import FeatureStatistic, feature_pass
from nnato.features import evaluate_features
from nnato.models import describe
from nnato.operators import identity
from nnato.sites import ResidualSite
from nnato.statistics import ResidualBatch
from nnato.sums import PairSums

SITES = tuple(ResidualSite(block) for block in (0, 1, 3))
FOLDS = 3


def batches(count=9, same=False, seed=0):
    """Batches of two documents of some folds, with a few excluded tokens; with `same`, all sites hold the same residuals."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        residuals = torch.randn(len(SITES), 2, 30, D, generator=generator) * 2 + 1
        residuals[2] = residuals[2] * 0.4 + residuals[0] * 0.6 + residuals[1] * 0.3
        if same:
            residuals[:] = residuals[0]
        ordinary = torch.rand(2, 30, generator=generator) < 0.9
        documents = torch.tensor([10 * number, 10 * number + 1])
        found.append(ResidualBatch(residuals, SITES, ordinary, ~ordinary, documents, "test", number * FOLDS // count))
    return found


def fed(dictionary, operators, latents=None, paper=False, sample=1, **settings):
    latents = torch.arange(LATENTS) if latents is None else latents
    statistic = FeatureStatistic(dictionary, operators, SITES, latents, FOLDS, paper, sample)
    for batch in batches(**settings):
        statistic.update(batch)
    return statistic


def materialised(**settings):
    """Rows of every site, the fold and the document of each."""
    rows, folds, documents = {site: [] for site in SITES}, [], []
    for batch in batches(**settings):
        for place, site in enumerate(SITES):
            rows[site].append(batch.residuals[place][batch.ordinary])
        folds += [batch.fold] * int(batch.ordinary.sum())
        documents += batch.documents[:, None].expand_as(batch.ordinary)[batch.ordinary].tolist()
    return {site: torch.cat(parts) for site, parts in rows.items()}, np.array(folds), np.array(documents)


def operators():
    return [make_operator(0, 3), dataclasses.replace(make_operator(1, 3), weight=make_operator(1, 3).weight * 0.3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [None, torch.tensor([31, 2, 5, 17, 0])])
@pytest.mark.parametrize("scaling", ["none", "layer_norm"])
def test_all_scores_are_those_of_materialised_rows(tmp_path, monkeypatch, kind, chosen, scaling):
    monkeypatch.setattr(passes, "CHUNK", 37)
    monkeypatch.setattr(passes, "BINS", 5000)
    dictionary = load_dictionary_of(kind, tmp_path, scaling=scaling)
    maps = operators()
    maps[1] = dataclasses.replace(maps[1], target_mean=maps[0].target_mean)
    got = fed(dictionary, maps, chosen).result()
    rows, folds, documents = materialised()
    latents = torch.arange(LATENTS) if chosen is None else chosen
    y = rows[ResidualSite(3)]
    z = dictionary.encode(y)[:, latents].double().numpy()
    directions = dictionary.directions[latents]
    a = ((y.double() - maps[0].target_mean) @ directions.T).numpy()
    assert got.tokens == len(y)
    assert got.active.tolist() == (z > 0).sum(0).tolist()
    assert got.documents.tolist() == [len({document % 63 for document in documents[z[:, f] > 0]}) for f in range(len(latents))]
    rebuilt = dictionary.decode(dictionary.encode(y), y).double()
    want = ((y - rebuilt) ** 2).sum() / ((y - maps[0].target_mean) ** 2).sum()
    assert got.unexplained == pytest.approx(float(want), rel=1e-5)
    for scores, operator in zip(got.scores, maps, strict=True):
        predicted = operator(rows[operator.source])
        hat = dictionary.encode(predicted)[:, latents].double().numpy()
        b = ((predicted.double() - maps[0].target_mean) @ directions.T).numpy()
        pre = dictionary.pre_activations(predicted)
        margins = (pre - dictionary.bars(pre))[:, latents].numpy()
        for f in range(len(latents)):
            on = z[:, f] > 0
            if on.sum() > 2:
                assert float(scores.active.r2().value[f]) == pytest.approx(r2_score(a[on, f], b[on, f]), abs=1e-5, rel=1e-5)
                assert float(scores.active.pearson()[f]) == pytest.approx(np.corrcoef(a[on, f], b[on, f])[0, 1], abs=1e-5)
            for fold in range(FOLDS):
                mine = on & (folds == fold)
                assert float(scores.active.errors[fold, f]) == pytest.approx(((a - b)[mine, f] ** 2).sum(), rel=1e-4, abs=1e-4)
            if not on.any() or on.all():
                continue
            assert float(scores.latent.r2().value[f]) == pytest.approx(r2_score(z[:, f], hat[:, f]), abs=1e-5, rel=1e-5)
            assert float(scores.recall[f]) == pytest.approx(recall_score(on, hat[:, f] > 0))
            assert float(scores.f1[f]) == pytest.approx(f1_score(on, hat[:, f] > 0))
            if (hat[:, f] > 0).any():
                assert float(scores.precision[f]) == pytest.approx(precision_score(on, hat[:, f] > 0))
            assert float(scores.auc[f]) == pytest.approx(roc_auc_score(on, margins[:, f]), abs=0.004)


def test_the_identity_of_identical_layers_is_perfect(tmp_path):
    """METHODS acceptance 17."""
    mean = torch.zeros(D, dtype=torch.float64)
    for kind in KINDS:
        dictionary = load_dictionary_of(kind, tmp_path / kind)
        got = fed(dictionary, [identity((SITES[0], SITES[2]), mean, mean)], same=True).result()
        one, seen = got.scores[0], (got.active > 1) & (got.active < got.tokens)
        assert int(seen.sum()) > 10
        for values in (one.latent.r2().value, one.f1, one.auc, one.active.r2().value, one.precision, one.recall):
            torch.testing.assert_close(values[seen], torch.ones_like(values[seen]), atol=1e-6, rtol=0)
        assert one.unexplained == pytest.approx(got.unexplained)


def published(a, b):
    """The paper's metrics of one feature's active tokens, from its authors' formulas."""
    error, absolute = np.abs(a - b), np.abs(a).mean()
    return {
        "r2_lat": np.clip(1 - (error**2).sum() / ((a - a.mean()) ** 2).sum(), -1e6, 1),
        "mse_lat": (error**2).mean(),
        "r_pearson": np.corrcoef(a, b)[0, 1],
        "calibration": (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()),
        "rms_ratio": np.sqrt((b**2).mean() / (a**2).mean()),
        "mean_ratio": b.mean() / a.mean(),
        "mean_abs_ratio": np.abs(b).mean() / absolute,
        "mad_ratio": error.mean() / absolute,
        "rel_error_mean": (error / np.abs(a)).mean(),
        "log_mse_ratio": (np.log(np.abs(b) / np.abs(a)) ** 2).mean(),
    }


def test_metrics_of_the_paper(tmp_path):
    """METHODS acceptance 16: as the authors' `compute_all_feature_metrics` on the same arrays, but NaN for what is never active."""
    dictionary = load_dictionary_of("jumprelu", tmp_path)
    quiet = dictionary.threshold.clone()
    quiet[[3, 4]] = 1e6
    dictionary = dataclasses.replace(dictionary, threshold=quiet)
    maps = operators()[:1]
    got = paper_metrics(fed(dictionary, maps, paper=True).result())
    rows = materialised()[0]
    y, predicted = rows[ResidualSite(3)], maps[0](rows[ResidualSite(0)])
    mask = dictionary.encode(y) > 1e-6
    a, b = ((one.double() @ dictionary.directions.T).numpy() for one in (y, predicted))
    for feature in range(LATENTS):
        on = mask[:, feature].numpy()
        if feature in (3, 4):
            assert all(math.isnan(float(values[feature])) for values in got.values())
        elif on.sum() >= 2:
            for name, want in published(a[on, feature], b[on, feature]).items():
                assert float(got[name][feature]) == pytest.approx(want, rel=1e-6, abs=1e-6), (name, feature)
    with pytest.raises(MomentsError, match="paper=True"):
        paper_metrics(fed(dictionary, maps).result())


def test_missing_scores_have_reasons(tmp_path):
    dictionary = load_dictionary_of("jumprelu", tmp_path)
    threshold, rows = dictionary.threshold.clone(), dictionary.W_dec.clone()
    threshold[0], rows[1] = 1e6, 0
    got = fed(dataclasses.replace(dictionary, threshold=threshold, W_dec=rows), operators()).result()
    said = [REASONS[code] for code in got.reasons(20, 5).tolist()]
    assert said[:2] == ["never active", "its direction does not vary"]
    assert said.count("") > 20
    assert {REASONS[code] for code in got.reasons(20, 60).tolist()} == {"never active", "active in too few documents"} | (
        {"too few active tokens"} if bool(((got.active < 20) & (got.active > 0)).any()) else set()
    )
    assert float(got.rate.max()) <= 1
    assert math.isnan(float(got.scores[0].auc[0]))
    assert math.isnan(float(got.scores[0].recall[0]))


def test_state_makes_the_same_statistic(tmp_path):
    dictionary = load_dictionary_of("topk", tmp_path)
    whole = fed(dictionary, operators(), sample=5)
    latents = torch.arange(LATENTS)
    first = FeatureStatistic(dictionary, operators(), SITES, latents, FOLDS, sample=5)
    for batch in batches()[:4]:
        first.update(batch)
    second = FeatureStatistic(dictionary, operators(), SITES, latents, FOLDS, sample=5)
    second.restore(*first.state())
    for batch in batches()[4:]:
        second.update(batch)
    for name, part in whole.state()[0].items():
        assert part.equal(second.state()[0][name]), name
    with pytest.raises(MomentsError, match="other features or operators"):
        FeatureStatistic(dictionary, operators()[:1], SITES, latents, FOLDS).restore(*first.state())


# ---- of a model ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path, model, corpus):
    """Moments, blocks, a dictionary of site 3, and results of operators into it."""
    make_sae("topk", metadata=origin(describe(model), (ResidualSite(3),))).save_model(tmp_path / "sae")
    dictionary = load_dictionary(tmp_path / "sae")
    blocks = tokenize(model, corpus)
    moments = accumulate(model, blocks, [(0, 3), (1, 3), (0, 1)])
    return moments, blocks, dictionary, evaluate_features(moments, dictionary, [(0, 3), (1, 3)], force=True)


def test_a_pass_sees_the_tokens_of_the_moments(model, ready):
    """The same tokens as the moments', and the numbers of a hook-based forward pass."""
    moments, blocks, dictionary, results = ready
    maps = [result.operator for result in results]
    got = feature_pass(model, blocks, dictionary, maps, sample=1)
    assert got.sampled == got.tokens == moments.tokens["test"]
    rows = {0: [], 1: [], 3: []}
    test = blocks.only("test")
    for batch in (test.batch(some) for some in test.plan(4)):
        seen, _ = hook_residuals(model._module, batch.ids)
        norms = torch.stack([seen[site].double().norm(dim=-1) for site in rows])
        medians = torch.tensor([moments.medians[str(site)] for site in rows], dtype=torch.float64)
        keep = batch.mask & ~batch.special & ~(norms > 10 * medians[:, None, None]).any(0)
        keep[:, 0] = False
        for site, found in rows.items():
            found.append(seen[site][keep])
    y = torch.cat(rows[3])
    z = dictionary.encode(y)
    assert abs(got.active - (z > 0).sum(0)).max() <= 1
    for scores, operator in zip(got.scores, maps, strict=True):
        hat = dictionary.encode(operator(torch.cat(rows[operator.source])))
        want = PairSums.of(z, hat).r2().value
        known = got.active > 5
        torch.testing.assert_close(scores.latent.r2().value[known], want[known], atol=1e-4, rtol=1e-4)


def test_a_pass_resumes_from_its_file(model, ready, tmp_path):
    _, blocks, dictionary, results = ready
    maps, file = [result.operator for result in results], tmp_path / "pass.safetensors"
    whole = feature_pass(model, blocks, dictionary, maps, file=file, batch_size=2)
    again = feature_pass(model, blocks, dictionary, maps, file=file, batch_size=2)
    assert again.scores[0].latent.b.equal(whole.scores[0].latent.b)
    with pytest.raises(MomentsError, match="another model, text or request"):
        feature_pass(model, blocks, dictionary, maps, [1, 2], file=file, batch_size=2)
    refitted = [maps[0], dataclasses.replace(maps[1], weight=maps[1].weight * 0.9)]
    for other in ({"paper": True}, {"operators": refitted}):
        with pytest.raises(MomentsError, match="another model, text or request"):
            feature_pass(model, blocks, dictionary, **{"operators": maps, "file": file, "batch_size": 2, **other})


def test_what_does_not_belong_is_refused(model, ready):
    moments, blocks, dictionary, results = ready
    other = evaluate_features(moments, dataclasses.replace(dictionary, sites=()), [(0, 1)], force=True)[0].operator
    with pytest.raises(DictionaryError, match="the same target"):
        feature_pass(model, blocks, dictionary, [results[0].operator, other])
    with pytest.raises(DictionaryError, match="not at 1"):
        feature_pass(model, blocks, dictionary, [other])
