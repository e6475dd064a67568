"""One prompt through a multi-layer SAE, and the contexts in which latents are most active."""

from __future__ import annotations

import html.parser
import json

import numpy as np
import pytest
import torch
from conftest import BLOCKS, hook_residuals
from test_multilayer import LATENTS, random_lens, random_sae

from nnato.errors import DictionaryError, PositionError, TextError
from nnato.prompts import prompt_activity, write_page
from nnato.top_examples import Leaders, busiest, top_examples

PROMPT = "w3 w5 w7 w11 w13 w17 w19 w23"


def dense_codes(model, sae, ids, lens=None):
    seen, _ = hook_residuals(model._module, ids)
    x = residuals = torch.stack([seen[site] for site in sae.sites])
    x = x if lens is None else torch.stack([lens(rows, site) for rows, site in zip(x, sae.sites, strict=True)])
    return sae.dictionary.encode(x).double().numpy(), residuals


@pytest.mark.parametrize("lens", [None, random_lens()], ids=["none", "lens"])
def test_activations_of_a_prompt(model, lens):
    sae = random_sae(lens=lens)
    found = prompt_activity(model, sae, PROMPT)
    ids = torch.tensor([model.tokenizer(PROMPT).input_ids])
    dense = dense_codes(model, sae, ids, lens)[0][:, 0]
    dense[:, ~found.ordinary.numpy()] = 0
    np.testing.assert_allclose(found.strengths().numpy(), dense.sum(1).T, atol=1e-3)
    np.testing.assert_allclose(found.strengths(3).numpy(), dense[:, 3].T, atol=1e-3)
    assert not found.ordinary[0]  # BOS
    assert found.tokens[0] == "<bos>"
    latents, shares = found.heat_map()
    assert sorted(latents) == sorted(np.flatnonzero(dense.sum((0, 1)) > 0).tolist())
    assert torch.allclose(shares.sum(1), torch.ones(len(latents)).double())
    means = shares @ torch.arange(BLOCKS).double()
    assert (means.diff() <= 0).all()
    for position, part in ((None, dense.sum(1)), (3, dense[:, 3])):
        rows, active = found.rows(2, position)
        assert active == np.count_nonzero(part.sum(0))
        assert {latent for latent, _, _ in rows} == set(np.argsort(-part.sum(0), kind="stable")[:2].tolist())
        for latent, share, total in rows:
            np.testing.assert_allclose([*share, total], [*(part[:, latent] / part[:, latent].sum()), part[:, latent].sum()], atol=1e-3)
    assert set(found.strongest(5)) == set(np.argsort(-dense.sum((0, 1)), kind="stable")[:5].tolist())
    record = found.to_json()
    assert len(json.dumps(record)) < 1e6
    cell = next(one for one in record["active"] if (one["site"], one["position"]) == (2, 4))
    assert [latent for latent, _ in cell["latents"]] == sorted(np.flatnonzero(dense[2, 4]), key=lambda f: -dense[2, 4, f])


class Checker(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "td" and "style" in dict(attributes):
            self.cells.append(dict(attributes)["title"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(model, tmp_path):
    found = prompt_activity(model, random_sae(), PROMPT)
    page = write_page(found, tmp_path / "p.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert not {"script", "link", "img", "iframe"} & checker.tags
    assert "://" not in page
    latents, shares = found.heat_map()
    assert len(checker.cells) == len(latents) * BLOCKS
    assert checker.cells[0] == f"latent {latents[0]}, layer 0: {float(shares[0, 0]):.1%}"
    assert "&lt;bos&gt;" in page
    few = Checker()
    few.feed(write_page(found, tmp_path / "few.html", most=3).read_text())
    assert len(few.cells) == 3 * BLOCKS


def test_prompts_that_cannot_be_read(model):
    with pytest.raises(TextError, match="too short"):
        prompt_activity(model, random_sae(), "")
    with pytest.raises(TextError, match="only special tokens behind its first"):
        prompt_activity(model, random_sae(), "none known")
    with pytest.raises(PositionError, match="at most 512"):
        prompt_activity(model, random_sae(), "w1 " * 600)


def test_leaders_are_those_of_sorting():
    generator = torch.Generator().manual_seed(0)
    leaders, entries = Leaders(6, 4), {}
    for batch in range(5):
        keys = torch.randint(0, 5, (30,), generator=generator)
        values = torch.rand(30, generator=generator) + 0.01
        places = torch.arange(30) + 30 * batch
        leaders.add(keys, values, places)
        for key, value, place in zip(keys.tolist(), values.tolist(), places.tolist(), strict=True):
            entries.setdefault(key, []).append((value, place))
    for key in range(6):
        best = sorted(entries.get(key, []), reverse=True)[:4]
        wanted = best + [(0.0, -1)] * (4 - len(best))
        assert list(zip(leaders.values[key].tolist(), leaders.places[key].tolist(), strict=True)) == wanted


@pytest.mark.parametrize("lens", [None, random_lens()], ids=["none", "lens"])
def test_examples_are_those_of_brute_force(model, corpus, lens):
    sae = random_sae(lens=lens)
    blocks = corpus.tokenize(model.tokenizer)
    found = top_examples(model, sae, blocks, count=3, batch_size=3)
    test, best, medians = blocks.only("test"), {}, None
    for rows in test.plan(3):
        tokens = test.batch(rows)
        dense, x = dense_codes(model, sae, tokens.ids, lens)
        allowed = tokens.mask & ~tokens.special
        allowed[:, 0] = False
        norms = x.norm(dim=-1)
        medians = norms[:, allowed].median(dim=1).values if medians is None else medians
        allowed &= ~(norms > 10 * medians[:, None, None]).any(0)
        for block, position in torch.nonzero(allowed).tolist():
            for layer, latent in np.argwhere(dense[:, block, position] > 0):
                context = tokens.ids[block][tokens.mask[block]].tolist()
                entry = (dense[layer, block, position, latent], position, context, int(tokens.documents[block]))
                best.setdefault((latent, layer), []).append(entry)
    for latent in range(LATENTS):
        for layer in range(BLOCKS):
            wanted = sorted(best.get((latent, layer), []), key=lambda entry: -entry[0])[:3]
            examples = found.of(model.tokenizer, latent, layer)
            np.testing.assert_allclose([one.activation for one in examples], [entry[0] for entry in wanted], rtol=1e-4)
            every = np.array([entry[0] for entry in best.get((latent, layer), [])])
            for one, (value, position, context, document) in zip(examples, wanted, strict=True):
                if np.isclose(every, value, rtol=1e-4).sum() > 1:
                    continue  # documents that begin alike are alike
                first = max(position - 10, 0)
                assert one.tokens == tuple(model.tokenizer.decode([token]) for token in context[first : position + 6])
                assert one.tokens[one.at] == model.tokenizer.decode([context[position]])
                assert one.document == document
    everywhere = found.of(model.tokenizer, busiest(found, 1)[0])
    assert everywhere[0].activation == found.leaders.values.max()
    assert [one.activation for one in everywhere] == sorted((one.activation for one in everywhere), reverse=True)
    assert everywhere[0].to_json()["document"] == f"{everywhere[0].document:016x}"


def test_examples_that_do_not_exist(model, corpus):
    found = top_examples(model, random_sae(sites=(1, 2)), corpus, count=1)
    with pytest.raises(DictionaryError, match="latents run from 0 to 63"):
        found.of(model.tokenizer, 64)
    with pytest.raises(DictionaryError, match="not read at site 3"):
        found.of(model.tokenizer, 0, 3)
    with pytest.raises(DictionaryError, match="ask for at least one"):
        top_examples(model, random_sae(), corpus, count=0)
