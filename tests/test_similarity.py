"""Similarities against plain numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import BLOCKS, VOCABULARY, hook_residuals
from test_multilayer import random_lens, random_sae

from nnato import similarity
from nnato.errors import DictionaryError, MomentsError
from nnato.similarity import cosine_histogram, distance_histogram, layer_cosines, max_cosines, token_matches
from nnato.sites import ResidualSite

SITES = tuple(map(ResidualSite, range(BLOCKS)))


def ordinary_rows(model, blocks, sites):
    rows, medians = [], None
    for batch in blocks.plan(3):
        tokens = blocks.batch(batch)
        seen, _ = hook_residuals(model._module, tokens.ids)
        x = torch.stack([seen[site] for site in sites])
        allowed = tokens.mask & ~tokens.special
        allowed[:, 0] = False
        norms = x.norm(dim=-1)
        medians = norms[:, allowed].median(dim=1).values if medians is None else medians
        rows.append(x[:, allowed & ~(norms > 10 * medians[:, None, None]).any(0)])
    return torch.cat(rows, dim=1).double().numpy()


@pytest.mark.parametrize("lens", [None, random_lens()], ids=["none", "lens"])
def test_layer_cosines(model, corpus, lens):
    blocks = corpus.tokenize(model.tokenizer)
    x = ordinary_rows(model, blocks.only("test"), SITES)
    if lens is not None:
        x = np.stack([lens(torch.tensor(rows), site).numpy() for rows, site in zip(x, SITES, strict=True)])
    centred = x - x.mean(1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=-1, keepdims=True)
    for found in layer_cosines(model, SITES, blocks, lens=lens, batch_size=3):
        wanted = (centred[found.pair[0]] * centred[found.pair[1]]).sum(-1)
        assert found.mean.value == pytest.approx(wanted.mean(), abs=1e-5)
        assert found.std == pytest.approx(wanted.std(), abs=1e-4)
        assert found.mean.low < found.mean.value < found.mean.high


def test_equal_layers_have_cosine_one(model, corpus):
    same = layer_cosines(model, (SITES[1], SITES[1]), corpus)[0]
    assert same.mean.value == pytest.approx(1)
    assert same.std == pytest.approx(0, abs=1e-6)
    with pytest.raises(MomentsError, match="need two layers"):
        layer_cosines(model, SITES[:1], corpus)


def test_max_cosines(monkeypatch):
    directions = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    unit = directions.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T - 9 * np.eye(50)
    np.testing.assert_allclose(max_cosines(directions).numpy(), cosines.max(1), atol=1e-12)
    whole = max_cosines(directions)
    monkeypatch.setattr(similarity, "CELLS", 50 * 7)
    torch.testing.assert_close(max_cosines(directions), whole, rtol=0, atol=1e-12)
    assert torch.allclose(max_cosines(torch.cat([directions, 3 * directions])), torch.ones(100).double())
    assert torch.allclose(max_cosines(directions[:20], directions), torch.ones(20).double())
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(max_cosines(directions[order]), whole[order])
    zero = max_cosines(torch.cat([directions, torch.zeros(1, 8)]))
    assert zero[-1].isnan()
    torch.testing.assert_close(zero[:-1], whole, rtol=0, atol=1e-12)
    with pytest.raises(DictionaryError, match="no other direction"):
        max_cosines(directions[:1])


def test_histograms_count_every_pair(monkeypatch):
    directions = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    unit = directions.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    first, second = np.triu_indices(40, 1)
    cosines = (unit[first] * unit[second]).sum(1)
    monkeypatch.setattr(similarity, "CELLS", 40 * 7)
    found = cosine_histogram(directions).numpy()
    np.testing.assert_array_equal(found, np.histogram(cosines, 100, (-1, 1))[0])
    assert found.sum() == 40 * 39 // 2
    layers = torch.rand(40, generator=torch.Generator().manual_seed(1)).double() * 5
    layers[3] = torch.nan
    table = distance_histogram(layers, directions).numpy()
    assert table.sum() == 39 * 38 // 2
    keep = (first != 3) & (second != 3)
    apart = np.abs(layers.numpy()[first] - layers.numpy()[second])[keep]
    wanted = np.histogram2d(apart, cosines[keep], (64, 64), ((0, apart.max()), (-1, 1)))[0]
    np.testing.assert_array_equal(table, wanted)


def test_a_latent_that_is_a_token_is_like_that_token(model):
    sae = random_sae()
    embedding = model._module.get_input_embeddings().weight.detach()
    decoder = sae.dictionary.W_dec.clone()
    decoder[5] = 4 * embedding[17]
    dictionary = dataclasses.replace(sae.dictionary, W_dec=decoder)
    found = token_matches(model, dictionary)["embedding"]
    assert found.tokens[5, 0] == 17
    assert found.cosines[5, 0].item() == pytest.approx(1)
    assert found.tokens.shape == (64, 8)
    table = (embedding / embedding.norm(dim=1, keepdim=True)).numpy()
    rows = (decoder / decoder.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_array_equal(found.tokens[:, 0].numpy(), (rows @ table.T).argmax(1))
    assert found.to_json(model.tokenizer, 5)[0]["token"] == model.tokenizer.decode([17])
    assert len(token_matches(model, dictionary, [3, 5], 200)["unembedding"].tokens[0]) == VOCABULARY
    with pytest.raises(DictionaryError, match="latents run from 0 to 63"):
        token_matches(model, dictionary, [64])
