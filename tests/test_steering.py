"""Latents added to residuals, and reconstructions, against forward hooks and the definition."""

from __future__ import annotations

import pytest
import torch
from conftest import BLOCKS, WIDTH, hook_residuals
from test_fidelity import perfect_sae
from test_multilayer import LATENTS, random_lens, random_sae

from nnato.errors import DictionaryError, MomentsError, PositionError, SiteError, TextError
from nnato.operators import AffineMap
from nnato.sites import ResidualSite
from nnato.steering import steer

PROMPT = "w3 w5 w7 w9"


def ids_of(model):
    return torch.tensor([model.tokenizer(PROMPT).input_ids])


@pytest.mark.parametrize("site", [0, BLOCKS - 1])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_logits_are_those_of_hooks(any_model, site, positions):
    """The delta is factor · σ · decoder row, with the σ of each token."""
    sae = random_sae()
    edited = slice(-1, None) if positions == "last" else slice(1, None)

    def add(residual, _):
        new = residual.clone()
        x = residual[0, edited].double()
        new[0, edited] += (-2.5 * x.std(1, keepdim=True) * sae.dictionary.W_dec[7].double()).float()
        return new

    def replace(residual, _):
        new = residual.clone()
        x = residual[0, edited]
        new[0, edited] = sae.dictionary.decode(sae.dictionary.encode(x), x)
        return new

    found = steer(any_model, sae, PROMPT, 7, site, factor=-2.5, positions=positions)
    ids = ids_of(any_model)
    for run, edits in (("model", {}), ("steered", {site: add}), ("reconstruction", {site: replace})):
        _, logits = hook_residuals(any_model._module, ids, edits.items())
        torch.testing.assert_close(found.logits[run], logits[0].float(), atol=2e-5, rtol=1e-4)
    assert found.kl("steered") > 0
    assert found.kl("model") == 0


def test_nothing_added_changes_no_bit(any_model):
    for site in (0, BLOCKS - 1):
        found = steer(any_model, random_sae(), PROMPT, 3, site, factor=0.0, positions="all")
        assert torch.equal(found.logits["steered"], found.logits["model"])
    perfect = steer(any_model, perfect_sae(), PROMPT, 3, 1, positions="all")
    torch.testing.assert_close(perfect.logits["reconstruction"], perfect.logits["model"], atol=1e-5, rtol=1e-5)


def test_the_last_position_changes_nothing_before_it(any_model):
    found = steer(any_model, random_sae(), PROMPT, 3, 0, factor=30.0)
    for run in ("steered", "reconstruction"):
        torch.testing.assert_close(found.logits[run][:-1], found.logits["model"][:-1], atol=1e-6, rtol=0)
        assert float((found.logits[run][-1] - found.logits["model"][-1]).abs().max()) > 1e-4


def test_behind_a_lens_the_latent_is_mapped_back(model):
    lens = random_lens()
    sae, site = random_sae(lens=lens), ResidualSite(1)
    with pytest.raises(MomentsError, match="needs a way back"):
        steer(model, sae, PROMPT, 7, site)
    generator = torch.Generator().manual_seed(3)
    weight, mean = torch.randn(WIDTH, WIDTH, generator=generator).double(), torch.randn(WIDTH, generator=generator).double()
    back = {site: AffineMap.make(site, site, weight, mean, -mean)}
    found = steer(model, sae, PROMPT, 7, site, factor=2.0, back=back)

    def add(residual, _):
        x = residual[0, -1].double()
        shared = (x - lens.translators[site].source_mean) @ lens.translators[site].weight + lens.translators[site].target_mean
        new = residual.clone()
        new[0, -1] += (2 * shared.std() * sae.dictionary.W_dec[7].double() @ weight).float()
        return new

    def replace(residual, _):
        x = residual[0, -1].double()
        shared = ((x - lens.translators[site].source_mean) @ lens.translators[site].weight + lens.translators[site].target_mean).float()
        new = residual.clone()
        made = sae.dictionary.decode(sae.dictionary.encode(shared[None]), shared[None])[0].double()
        new[0, -1] = ((made - mean) @ weight - mean).float()
        return new

    for run, edit in (("steered", add), ("reconstruction", replace)):
        _, logits = hook_residuals(model._module, ids_of(model), {1: edit}.items())
        torch.testing.assert_close(found.logits[run], logits[0].float(), atol=1e-4, rtol=1e-4)
    last = steer(model, sae, PROMPT, 7, lens.last, factor=2.0)  # there the lens is the identity
    plain = steer(model, random_sae(), PROMPT, 7, lens.last, factor=2.0)
    torch.testing.assert_close(last.logits["steered"], plain.logits["steered"])


def test_what_is_said_of_the_next_token(model):
    found = steer(model, random_sae(), PROMPT, 7, 2, factor=20.0)
    p = found.logits["steered"][-1].double().softmax(0)
    q = found.logits["model"][-1].double().softmax(0)
    assert [token for token, _ in found.top("steered", 3)] == p.argsort(descending=True)[:3].tolist()
    assert found.top("steered", 1)[0][1] == pytest.approx(float(p.max()))
    assert found.changes(1)[0][1] == pytest.approx(float((p.log() - q.log()).max()))
    wanted = torch.nn.functional.kl_div(p.log(), q.log(), reduction="sum", log_target=True)
    assert found.kl("steered") == pytest.approx(float(wanted))
    record = found.to_json(model.tokenizer, 3)
    assert record["site"] == 2
    assert [len(ones) for ones in record["top"].values()] == [3, 3, 3]
    assert record["raised"][0]["token"] == model.tokenizer.decode([found.changes(1)[0][0]])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((PROMPT, LATENTS, 1), {}, DictionaryError, f"run from 0 to {LATENTS - 1}"),
        ((PROMPT, -1, 1), {}, DictionaryError, "no latent -1"),
        ((PROMPT, 1, 2), {}, SiteError, "does not read layer 2; it reads 1, 3"),
        ((PROMPT, 1, 9), {}, SiteError, "does not exist"),
        ((PROMPT, 1, 1), {"positions": "first"}, PositionError, "give last or all"),
        ((" ", 1, 1), {}, TextError, "the prompt is empty"),
    ],
)
def test_bad_requests(model, arguments, options, error, message):
    with pytest.raises(error, match=message):
        steer(model, random_sae(sites=(1, 3)), *arguments, **options)
