"""Traits of latents against plain loops, effects on the loss against hooks, and selections of planted dictionaries."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import WIDTH, hook_residuals
from scipy import sparse
from test_dictionaries import LATENTS, load_dictionary_of

from nnato import feature_selection as selections
from nnato import feature_traits as traits
from nnato.accumulation import tokenize
from nnato.corpus import Corpus
from nnato.dictionaries import Dictionary
from nnato.errors import DictionaryError, FileFormatError, MomentsError
from nnato.feature_selection import Chosen, causal_effects, prompt_effects, read_features, select_features
from nnato.feature_traits import ActiveTokens, PublishedTraits, entropy_of_counts, largest_correlations, vocabulary_focus
from nnato.sites import ResidualSite
from nnato.statistics import ResidualBatch

SITE = ResidualSite(1)


def chao_shen(counts):
    """Chao & Shen 2003, equation 6, in plain Python."""
    n, once = sum(counts), sum(count == 1 for count in counts)
    coverage = 1 - (once if once < n else n - 1) / n
    total = 0.0
    for count in counts:
        p = coverage * count / n
        total -= p * math.log(p) / (1 - (1 - p) ** n)
    return total


def test_entropy_is_that_of_the_formula():
    counts = [[3, 1, 1, 9], [1, 1, 1], [50], [1], [2, 2]]
    owners = np.concatenate([np.full(len(some), owner) for owner, some in enumerate(counts)])
    got = entropy_of_counts(owners, np.concatenate(counts), 6)
    want = [chao_shen(counts[0]), chao_shen(counts[1]), 0.0, 0.0, chao_shen(counts[4]), math.nan]
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_entropy_of_few_draws_is_less_biased_than_the_plain_one():
    rng, kinds, draws = np.random.default_rng(0), 200, 60
    corrected, plain = [], []
    for _ in range(200):
        counts = np.bincount(rng.integers(0, kinds, draws))
        counts = counts[counts > 0]
        corrected.append(entropy_of_counts(np.zeros(len(counts), dtype=int), counts, 1)[0])
        plain.append(-(counts / draws * np.log(counts / draws)).sum())
    assert abs(np.mean(corrected) - math.log(kinds)) < 0.25 * abs(np.mean(plain) - math.log(kinds))


@pytest.mark.parametrize("cells", [1 << 23, 90, 1])
def test_largest_correlations_are_those_of_numpy(monkeypatch, cells):
    monkeypatch.setattr(traits, "CELLS", cells)
    rng = np.random.default_rng(0)
    rows = np.maximum(rng.normal(size=(300, 30)) - 1, 0)
    rows[:, 7] = 0
    rows[:, 9] = 2 * rows[:, 3] + 0.1 * rows[:, 9]
    with np.errstate(invalid="ignore", divide="ignore"):
        want = np.corrcoef(rows.T)
    np.fill_diagonal(want, np.nan)
    got = largest_correlations(sparse.csc_matrix(rows))
    assert np.isnan(got[7])
    known = np.arange(30) != 7
    np.testing.assert_allclose(got[known], np.nanmax(want[known], axis=1), atol=1e-12)
    assert got[9] > 0.99


def test_independent_latents_are_not_redundant():
    rng = np.random.default_rng(0)
    rows = np.maximum(rng.normal(size=(20_000, 40)) - 1, 0)
    assert largest_correlations(sparse.csc_matrix(rows)).max() < 0.04


def test_focus_is_a_deviation_from_the_mean_logit():
    generator = torch.Generator().manual_seed(0)
    directions, unembedding = torch.randn(11, 6, generator=generator), torch.randn(50, 6, generator=generator)
    directions[4] = 0
    logits = (directions @ unembedding.T).double().numpy()
    with np.errstate(invalid="ignore"):
        want = (logits.max(1) - logits.mean(1)) / logits.std(1)
    np.testing.assert_allclose(vocabulary_focus(directions, unembedding), want, rtol=1e-5)


def batches(count=12, seed=0):
    """Batches of two documents with their tokens; a third of the tokens is excluded."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        residuals = torch.randn(1, 2, 40, WIDTH, generator=generator) * 2
        ordinary = torch.rand(2, 40, generator=generator) < 0.7
        ids = torch.randint(0, 9, (2, 40), generator=generator)
        yield ResidualBatch(residuals, (SITE,), ordinary, ~ordinary, torch.tensor([2 * number, 2 * number + 1]), "train", 0, ids)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_traits_are_those_of_materialised_activations(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(traits, "CHUNK", 17)
    dictionary = load_dictionary_of(kind, tmp_path)
    dictionary = dataclasses.replace(dictionary, b_enc=dictionary.b_enc - 100 * (torch.arange(LATENTS) == 5))
    statistic, again = ActiveTokens(dictionary, SITE), ActiveTokens(dictionary, SITE)
    z, ids, documents = [], [], []
    for number, batch in enumerate(batches()):
        statistic.update(batch)
        z.append(dictionary.encode(batch.residuals[0][batch.ordinary]).double().numpy())
        ids += batch.ids[batch.ordinary].tolist()
        documents += batch.documents[:, None].expand_as(batch.ordinary)[batch.ordinary].tolist()
        if number == 4:
            again.restore(*statistic.state())
        elif number > 4:
            again.update(batch)
    z, ids, documents = np.concatenate(z), np.array(ids), np.array(documents)
    got = statistic.result()
    assert got.tokens == len(z)
    np.testing.assert_allclose(got.rate, (z > 0).mean(0), atol=1e-12)
    for latent in range(LATENTS):
        on = z[:, latent] > 0
        if on.sum() < 50 or len(set(documents[on])) < 10:
            assert math.isnan(got.coherence[latent])
        else:
            counts = np.bincount(ids[on])
            assert float(got.coherence[latent]) == pytest.approx(-chao_shen(counts[counts > 0].tolist()))
    assert 0 < int(torch.isnan(got.coherence).sum()) < LATENTS
    with np.errstate(invalid="ignore", divide="ignore"):
        want = np.corrcoef(z.T)
    np.fill_diagonal(want, -np.inf)
    known = z.std(0) > 0
    np.testing.assert_allclose(got.redundancy[known], np.nanmax(want, axis=1)[known], atol=1e-9)
    assert math.isnan(got.redundancy[5])
    resumed = again.result()
    assert all(getattr(resumed, name).nan_to_num(9).equal(getattr(got, name).nan_to_num(9)) for name in ("rate", "coherence", "redundancy"))
    with pytest.raises(MomentsError, match="without their tokens"):
        statistic.update(dataclasses.replace(next(batches()), ids=None))


def test_published_traits_are_those_of_the_papers_loop(tmp_path, monkeypatch):
    """The same positions are drawn; everything else is done latent by latent."""
    monkeypatch.setattr(traits, "SAMPLED_LATENTS", 12)
    monkeypatch.setattr(traits, "LARGEST", 6)
    dictionary = load_dictionary_of("jumprelu", tmp_path)
    statistic, again = PublishedTraits(dictionary, SITE, seed=3), PublishedTraits(dictionary, SITE, seed=3)
    chosen = np.sort(np.random.default_rng(0).choice(LATENTS, size=12, replace=False))
    counters = [{} for _ in range(LATENTS)]
    fired, products, tokens, sequence = np.zeros(LATENTS), np.zeros((12, LATENTS)), 0, 0
    for number, batch in enumerate(batches(5)):
        statistic.update(batch)
        for document in range(2):
            pre = batch.residuals[0][document] - dictionary.shift
            z = (pre @ dictionary.W_enc + dictionary.b_enc).clamp(min=0)
            drawn = torch.randint(0, 40, (40,), generator=torch.Generator().manual_seed(3 * 1_000_003 + sequence))
            some = z[drawn]
            for latent in range(LATENTS):
                for place in torch.topk(some[:, latent], 6).indices.tolist():
                    token = int(batch.ids[document][drawn[place]])
                    counters[latent][token] = counters[latent].get(token, 0) + 1
            unit = (some / (some.std(0) + 1e-6)).double().numpy()
            products += unit[:, chosen].T @ unit / 40
            fired += (z > 0).double().sum(0).numpy()
            tokens, sequence = tokens + 40, sequence + 1
        if number == 1:
            again.restore(*statistic.state())
        elif number > 1:
            again.update(batch)
    got = statistic.result()
    entropy = []
    for counter in counters:
        p = np.array(list(counter.values())) / sum(counter.values())
        entropy.append(-(p * np.log(p + 1e-12)).sum())
    # Of zeros, which are all alike, top-k may take any: only latents with six positive values in each sample are sure to agree.
    sure = np.array([abs(a + b) < 1e-9 for a, b in zip(entropy, got.coherence.tolist(), strict=True)])
    assert sure.mean() > 0.8
    np.testing.assert_allclose(got.rate, fired / tokens, atol=1e-12)
    np.testing.assert_allclose(got.redundancy, np.clip(np.abs(products / sequence).max(0), 0, 1), atol=1e-5)
    assert float(got.redundancy[chosen].min()) > 0.5  # the latent itself is among those it is compared with
    assert again.result().coherence.equal(got.coherence)
    assert again.result().redundancy.equal(got.redundancy)


def losses_by_hooks(module, ids, edits=()):
    _, logits = hook_residuals(module, ids, edits)
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").double()


@pytest.mark.parametrize("site", ["embed", 1, 3])
@pytest.mark.parametrize("scaling", ["none", "layer_norm"])
def test_effects_are_those_of_hooks(any_model, corpus, tmp_path, monkeypatch, site, scaling):
    monkeypatch.setattr(selections, "ROWS", 3)
    dictionary = load_dictionary_of("topk", tmp_path, scaling=scaling)
    at = ResidualSite.parse(site)
    blocks = tokenize(any_model, corpus).only("train")
    medians = torch.tensor([1e9], dtype=torch.float64)
    candidates = torch.tensor([31, 2, 5, 17, 0, 8])
    got = causal_effects(any_model, dictionary, at, blocks, candidates, medians, sequences=4, positions=20)
    module = any_model._module
    for place, latent in enumerate(candidates.tolist()):
        changes, seen = [], set()
        for rows in blocks.plan(1):
            tokens = blocks.batch(rows)
            ids, document = tokens.ids[:, :21], int(tokens.documents[0])
            residual = hook_residuals(module, ids)[0][site][0]
            z = dictionary.encode(residual)
            on = (z[:, latent] > 0) & ~tokens.special[0, :21]
            on[0] = on[-1] = False
            if not bool(on.any()) or document in seen or len(changes) == 4:
                continue
            only, nothing = torch.zeros_like(z), torch.zeros_like(z)
            only[on, latent] = z[on, latent]
            part = dictionary.decode(only, residual) - dictionary.decode(nothing, residual)
            before = losses_by_hooks(module, ids)
            after = losses_by_hooks(module, ids, {site: lambda value, seen, part=part: value - part})
            changes.append(float((after - before)[on[:-1]].mean()))
            seen.add(document)
        assert int(got.sequences[place]) == len(changes)
        if len(changes) >= 3:
            assert float(got.delta[place]) == pytest.approx(np.mean(changes), abs=2e-5)
            assert float(got.error[place]) == pytest.approx(np.std(changes, ddof=1) / math.sqrt(len(changes)), abs=2e-5)
        else:
            assert math.isnan(got.delta[place])
    assert int((got.sequences == 4).sum()) >= 3
    noisy = dataclasses.replace(got, delta=torch.tensor([1.0, -1.0, 0.0]), error=torch.tensor([0.0, 1.0, 0.0]))
    assert noisy.shrunk.tolist() == [1.0, -0.5, 0.0]


def test_effects_on_prompts_are_those_of_hooks(model, tmp_path):
    dictionary = load_dictionary_of("jumprelu", tmp_path)
    candidates = torch.arange(0, LATENTS, 3)
    got = prompt_effects(model, dictionary, SITE, candidates)
    for place, latent in enumerate(candidates.tolist()):
        changes = []
        for prompt in selections.PROMPTS:
            ids = torch.tensor([model.tokenizer(prompt).input_ids])
            residual = hook_residuals(model._module, ids)[0][1][0]
            z = ((residual - dictionary.shift) @ dictionary.W_enc[:, latent] + dictionary.b_enc[latent]).clamp(min=0)
            part = z[:, None] * dictionary.W_dec[latent]
            after = losses_by_hooks(model._module, ids, {1: lambda value, seen, part=part: value - part})
            changes.append(float((after - losses_by_hooks(model._module, ids)).mean()))
        assert float(got[place]) == pytest.approx(np.mean(changes), abs=2e-5)


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory):
    """60 documents of 20 different words."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("repetitive")
    for number in range(60):
        (folder / f"{number:03}.txt").write_text(" ".join(f"w{i}" for i in rng.integers(0, 20, 100)))
    return Corpus(str(folder), context=32, per_document=None)


@pytest.fixture
def planted(model):
    """At `embed`, 8 latents of one token each that write it too; 60 of mixed tokens, 2 of them twins; and 4 that are silent."""
    embedding = model._module.get_input_embeddings().weight.detach()[4:24] * WIDTH**0.5
    generator = torch.Generator().manual_seed(1)
    unembedding = model._module.get_output_embeddings().weight.detach()
    own = torch.nn.functional.normalize(embedding[:8], dim=1)
    others = torch.nn.functional.normalize(torch.randn(60, WIDTH, generator=generator), dim=1)
    others[1] = others[0]
    encoder = torch.cat([own, others, others[:4]])
    reach = embedding @ own.T
    bars = (reach.diagonal() + (reach - 1e9 * torch.eye(20, 8)).amax(0)) / 2  # above the reach of all other words
    thresholds = torch.cat([bars, torch.full((60,), 0.3), torch.full((4,), 1e6)])
    decoder = torch.cat([torch.nn.functional.normalize(unembedding[4:12], dim=1) * 3, others * 0.1, others[:4]])
    zeros = torch.zeros(WIDTH)
    return Dictionary("jumprelu", encoder.T.contiguous(), torch.zeros(72), decoder, zeros, zeros, threshold=thresholds)


def test_planted_monosemantic_latents_rank_first(model, planted, repetitive, tmp_path):
    """METHODS acceptance 27."""
    got = select_features(model, planted, "embed", repetitive, top=0.1, positions=31)
    assert set(got.features.tolist()) <= set(range(8))
    assert len(got.features) == 7
    assert torch.isnan(got.score[-4:]).all()
    assert torch.isnan(got.terms["coherence"][-4:]).all()
    assert float(got.terms["coherence"][:8].min()) == pytest.approx(0, abs=1e-9)
    assert float(got.terms["redundancy"][8]) == pytest.approx(1)
    assert float(got.terms["redundancy"][:8].max()) < 0.9
    assert got.score[got.features].tolist() == sorted(got.score[got.features].tolist(), reverse=True)
    file = tmp_path / "pass.safetensors"
    for _ in range(2):  # the second time from its file
        again = select_features(model, planted, "embed", repetitive, top=0.1, positions=31, file=file)
        assert again.score.nan_to_num(9).equal(got.score.nan_to_num(9))
        assert again.features.equal(got.features)


def test_the_published_score_is_put_together_as_published(model, planted, repetitive):
    got = select_features(model, planted, "embed", repetitive, preset="paper", top=0.25)

    def unit(x):
        return (x - x.min()) / (x.max() - x.min() + 1e-8)

    parts = {name: values.numpy() for name, values in got.terms.items()}
    entropy, z_peak, redundancy, rate = -parts["coherence"], parts["focus"], parts["redundancy"], -parts["dead"]
    first = 0.40 * unit(-entropy) + 0.35 * unit(z_peak) - 0.15 * unit(redundancy) - 0.10 * unit(-rate)
    candidates = np.argsort(-first, kind="stable")[:32]
    assert set(np.flatnonzero(parts["causal"])) <= set(candidates.tolist())
    causal = np.zeros(72)
    causal[candidates] = unit(np.maximum(parts["causal"][candidates], 0))
    score = 0.35 * unit(-entropy) + 0.25 * unit(z_peak) + 0.30 * causal - 0.07 * unit(redundancy) - 0.03 * unit(-rate)
    np.testing.assert_allclose(got.score, score, atol=1e-9)
    assert got.features.tolist() == np.argsort(-score, kind="stable")[:18].tolist()
    assert not torch.isnan(got.score).any()


def test_selections_are_read_again(model, planted, repetitive, tmp_path):
    got = select_features(model, planted, "embed", repetitive, top=0.05, positions=31)
    file = tmp_path / "selected.json"
    file.write_text(json.dumps(got.to_json()).replace("NaN", "null"))
    chosen = read_features(file)
    assert chosen.features.equal(got.features)
    assert chosen.rate.equal(got.rate)
    chosen.check_fits(planted)
    with pytest.raises(DictionaryError, match="another SAE"):
        chosen.check_fits(dataclasses.replace(planted, W_dec=planted.W_dec * 2))
    with pytest.raises(DictionaryError, match="among 72 latents"):
        Chosen(chosen.features, chosen.rate).check_fits(
            dataclasses.replace(
                planted, **{name: getattr(planted, name)[..., :9] for name in ("W_enc", "b_enc", "threshold")}, W_dec=planted.W_dec[:9]
            )
        )
    file.write_text("[3, 1]")
    assert read_features(file).features.tolist() == [3, 1]
    for wrong in ("{}", "[]", "[1.5]", "[true]", "[-1]", '{"features": 3}', '{"features": [1], "rate": ["a"]}', "[" * 5000, "no"):
        file.write_text(wrong)
        with pytest.raises(FileFormatError, match="no JSON file|no list of features"):
            read_features(file)
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    for missing in ("nothing.json", "endless.json"):
        with pytest.raises(FileFormatError, match="does not exist or is not a file"):
            read_features(tmp_path / missing)


def test_refused(model, planted, repetitive):
    for wrong in ({"preset": "best"}, {"top": 0}, {"sequences": 2}, {"positions": 1}):
        with pytest.raises(DictionaryError, match="presets are corrected, paper"):
            select_features(model, planted, "embed", repetitive, **wrong)
    with pytest.raises(DictionaryError, match="not at 2"):
        select_features(model, dataclasses.replace(planted, sites=(ResidualSite(1),)), 2, repetitive)
