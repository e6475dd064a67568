"""The tuned lens: closed form, files, KL, and training."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BLOCKS, VOCABULARY, WIDTH, hook_residuals, make_module, put
from test_multilayer import random_lens

from nnato.accumulation import accumulate
from nnato.errors import FileFormatError, OperatorError, SiteError
from nnato.lens import Lens, export_lens, fit_lens, import_lens, lens_pairs, logit_lens
from nnato.lens_training import _Best, divergence, evaluate_lens, head, train_lens
from nnato.models import describe, wrap
from nnato.sites import ResidualSite

LAST = ResidualSite(BLOCKS - 1)


@pytest.fixture(scope="module")
def fitted(tokenizer, corpus):
    model = wrap(make_module("gemma2"), tokenizer)
    return fit_lens(accumulate(model, corpus, lens_pairs(BLOCKS)))


def test_pairs_lead_from_everywhere_to_the_last_block():
    assert lens_pairs(3) == ((-1, 2), (0, 2), (1, 2))


def test_closed_form_is_ridge_shrunk_to_the_identity(model, corpus, fitted):
    """Against numpy, on the residuals themselves."""
    lens, fits = fitted
    blocks = corpus.tokenize(model.tokenizer)
    train = accumulate(model, blocks, lens_pairs(BLOCKS)).moments
    for one in fits:
        moments = train.of("train")
        xx, xy = (moments.scatter_of(one.operator.source, site).numpy() for site in (one.operator.source, LAST))
        wanted = np.linalg.solve(xx + one.alpha * np.eye(WIDTH), xy + one.alpha * np.eye(WIDTH))
        np.testing.assert_allclose(lens.translators[one.operator.source].weight.numpy(), wanted, atol=1e-8)
    assert lens.sites == (-1, 0, 1, 2, 3)
    x = torch.randn(3, WIDTH)
    assert lens(x, 3) is x


def test_saved_and_loaded(fitted, tmp_path):
    lens, _ = fitted
    lens.save(tmp_path)
    again = Lens.load(tmp_path)
    assert again.digest == lens.digest
    assert again.sites == lens.sites
    assert again.details["method"] == "closed form"
    x = torch.randn(4, WIDTH)
    assert torch.equal(again(x, 1), lens(x, 1))
    file = tmp_path / "lens.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(FileFormatError, match="damaged"):
        Lens.load(tmp_path)


def tuned_lens_folder(folder, seed=0, **changes):
    """A lens in the format of the tuned-lens package, with its translators as modules."""
    torch.manual_seed(seed)
    translators = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
    folder.mkdir(exist_ok=True)
    torch.save(translators.state_dict(), folder / "params.pt")
    config = {
        "base_model_name_or_path": "tiny",
        "d_model": WIDTH,
        "num_hidden_layers": BLOCKS,
        "bias": True,
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return translators


def test_lenses_of_the_tuned_lens_package(model, tmp_path):
    """Translator i acts on `hidden_states[i]`, the input of block i: an index more than the block whose output that is."""
    translators = tuned_lens_folder(tmp_path)
    lens = import_lens(tmp_path, BLOCKS, WIDTH)
    module = model._module
    ids = torch.randint(4, VOCABULARY, (1, 12))
    with torch.no_grad():
        states = module.model(input_ids=ids, output_hidden_states=True).hidden_states
        seen, _ = hook_residuals(module, ids)
        for number in range(BLOCKS):
            site = ResidualSite(number - 1) if number else ResidualSite.EMBED
            wanted = states[number] + translators[number](states[number])
            torch.testing.assert_close(lens(seen[site.key], site), wanted, atol=1e-4, rtol=1e-4)
        wrong = states[1] + translators[0](states[1])
        assert not torch.allclose(lens(seen[0], 0), wrong, atol=1e-2)
    torch.testing.assert_close(lens(seen[BLOCKS - 1], LAST), seen[BLOCKS - 1])


def test_exported_lenses_are_read_again(model, tmp_path):
    lens = random_lens()
    again = import_lens(export_lens(lens, tmp_path, model), BLOCKS, WIDTH)
    x = torch.randn(5, WIDTH)
    for site in lens.sites:
        torch.testing.assert_close(again(x, site), lens(x, site), atol=1e-4, rtol=1e-4)
    state = torch.load(tmp_path / "params.pt", weights_only=True)
    assert list(state) == [f"{number}.{part}" for number in range(BLOCKS) for part in ("weight", "bias")]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["d_model"], config["num_hidden_layers"], config["lens_type"]) == (WIDTH, BLOCKS, "linear_tuned_lens")
    partial = Lens(LAST, {site: lens.translators[site] for site in lens.sites[1:-1]})
    with pytest.raises(OperatorError, match="none for embed"):
        export_lens(partial, tmp_path, model)


def test_hostile_and_foreign_lenses_are_refused(tmp_path):
    tuned_lens_folder(tmp_path / "a")
    torch.save({"0.weight": print}, tmp_path / "a" / "params.pt")
    with pytest.raises(FileFormatError, match="holds no lens"):
        import_lens(tmp_path / "a", BLOCKS, WIDTH)
    tuned_lens_folder(tmp_path / "b", num_hidden_layers=7)
    with pytest.raises(FileFormatError, match="7 blocks"):
        import_lens(tmp_path / "b", BLOCKS, WIDTH)
    tuned_lens_folder(tmp_path / "c")
    torch.save({"0.weight": torch.zeros(2, 2)}, tmp_path / "c" / "params.pt")
    with pytest.raises(FileFormatError, match=r"0.weight is missing"):
        import_lens(tmp_path / "c", BLOCKS, WIDTH)
    with pytest.raises(FileFormatError, match="holds no lens"):
        import_lens(tmp_path / "nowhere", BLOCKS, WIDTH)


def test_head_is_what_follows_the_last_block(any_model):
    ids = torch.randint(4, VOCABULARY, (1, 9))
    seen, logits = hook_residuals(any_model._module, ids)
    torch.testing.assert_close(head(any_model, seen[BLOCKS - 1][0]), logits[0], atol=1e-5, rtol=1e-5)


def test_head_passes_gradients(model):
    rows = torch.randn(3, WIDTH, requires_grad=True)
    head(model, rows).logsumexp(-1).sum().backward()
    change = torch.zeros(3, WIDTH)
    change[1, 5] = 1e-2
    difference = (head(model, rows.detach() + change) - head(model, rows.detach() - change)).double()
    slope = ((head(model, rows.detach() + change).logsumexp(-1) - head(model, rows.detach() - change).logsumexp(-1)).sum() / 2e-2).item()
    assert rows.grad[1, 5].item() == pytest.approx(slope, rel=5e-2, abs=1e-4)
    assert difference[0].abs().max() == 0


def test_kl_is_that_of_hooks(model, corpus):
    lens = random_lens()
    blocks = corpus.tokenize(model.tokenizer)
    found = evaluate_lens(model, {"lens": lens, "logit": logit_lens(BLOCKS, WIDTH)}, blocks, sequences=3)
    totals, medians = {}, None
    for row in blocks.full_blocks("test", 3):
        tokens = blocks.batch([row])
        seen, logits = hook_residuals(model._module, tokens.ids)
        allowed = tokens.mask & ~tokens.special
        allowed[:, 0] = False
        norms = torch.stack([seen[key] for key in ("embed", *range(BLOCKS))]).norm(dim=-1)
        medians = norms[:, allowed].median(dim=1).values if medians is None else medians
        allowed &= ~(norms > 10 * medians[:, None, None]).any(0)
        clean = torch.log_softmax(logits[allowed].double(), -1)
        for site in lens.sites:
            for name, translate in (("lens", lens), ("logit", lambda x, _: x)):
                value = translate(seen[site.key], site)
                _, edited = hook_residuals(model._module, tokens.ids, {BLOCKS - 1: put(slice(None), value)}.items())
                other = torch.log_softmax(edited[allowed].double(), -1)
                totals.setdefault((name, site), []).append((clean.exp() * (clean - other)).sum(-1))
    for name, scores in found.items():
        for score in scores:
            assert score.kl.value == pytest.approx(torch.cat(totals[name, score.site]).mean().item(), rel=1e-3, abs=1e-6), (
                name,
                score.site,
            )
    assert found["lens"][-1].kl.value == pytest.approx(0, abs=1e-6)
    assert found["lens"][-1].agreement == 1


def test_closed_form_beats_the_logit_lens(model, corpus, fitted):
    lens, _ = fitted
    found = evaluate_lens(model, {"lens": lens, "logit": logit_lens(BLOCKS, WIDTH)}, corpus, sequences=8)
    for score, plain in zip(found["lens"][:-1], found["logit"][:-1], strict=True):
        assert score.kl.value < plain.kl.value, score.site


def test_training_by_kl_never_does_worse_on_validation(model, corpus, fitted):
    lens, _ = fitted
    trained = train_lens(model, lens, corpus, steps=40, tokens=32, lr=1e-2, validation=6)
    improved = trained.details["kl_improved"]
    assert improved
    scores = evaluate_lens(model, {"before": lens, "after": trained}, corpus, sequences=6, split="validation")
    for before, after in zip(scores["before"], scores["after"], strict=True):
        assert after.kl.value <= before.kl.value
        assert (after.kl.value < before.kl.value) == (before.site.key in improved)
    ruined = train_lens(model, lens, corpus, steps=3, tokens=32, lr=50.0, validation=4)
    assert ruined.details["kl_improved"] == []
    assert ruined.digest == lens.digest


def test_the_best_state_on_validation_is_kept_not_the_last(model, corpus, fitted):
    """Each site keeps its own best step, the start included; the digests say so without the trainer's own numbers."""
    lens, _ = fitted
    trained = train_lens(model, lens, corpus, steps=40, tokens=32, lr=1e-2, validation=6, checks=8)
    found = evaluate_lens(model, {"before": lens, "after": trained}, corpus, sequences=6, split="validation")
    best_steps = set()
    for before, after in zip(found["before"][:-1], found["after"][:-1], strict=True):
        steps, values = zip(*trained.details["kl_validation"][str(after.site)], strict=True)
        assert steps == tuple(range(0, 41, 5))
        assert values[0] == pytest.approx(before.kl.value)
        assert after.kl.value == pytest.approx(min(values), rel=1e-5)
        best_steps.add(steps[int(np.argmin(values))])
    assert {0, 40} <= best_steps  # otherwise this would not tell the best from the first or the last


def test_what_was_better_on_the_way_comes_back(model, corpus, fitted):
    """A good state between two bad ones is kept at its site only, and one that is not a number never is."""
    good, bad = fitted[0], logit_lens(BLOCKS, WIDTH)
    first, second = ResidualSite(0), ResidualSite(1)
    best = _Best(model, corpus.tokenize(model.tokenizer), [first, second], 4, bad)
    best.consider(5, replace(bad, translators={**bad.translators, first: good.translators[first]}))
    broken = replace(good.translators[first], weight=torch.full((WIDTH, WIDTH), torch.nan, dtype=torch.float64))
    best.consider(6, replace(bad, translators={**bad.translators, first: broken, second: good.translators[second]}))
    best.consider(7, bad)
    assert best.step == {first: 5, second: 6}
    assert [best.lens.translators[site] for site in (first, second)] == [good.translators[site] for site in (first, second)]
    assert [step for step, _ in best.history["1"]] == [0, 5, 6, 7]


def test_training_by_kl_ends_lower_from_the_closed_form_than_from_the_identity(model, corpus, fitted):
    """At equal steps and draws, on documents that neither was fitted to nor chosen by."""
    lens, _ = fitted
    starts = {"closed": lens, "identity": logit_lens(BLOCKS, WIDTH)}
    trained = {name: train_lens(model, start, corpus, steps=30, tokens=64, lr=1e-3, validation=6) for name, start in starts.items()}
    scores = evaluate_lens(model, {**trained, "untrained": lens}, corpus, sequences=8)
    for closed, other in zip(scores["closed"][:-1], scores["identity"][:-1], strict=True):
        assert closed.kl.value < other.kl.value, closed.site
    assert scores["closed"][0].kl.value < scores["untrained"][0].kl.value


def test_what_does_not_fit_is_refused(model, corpus, fitted):
    lens, _ = fitted
    with pytest.raises(OperatorError, match="nothing to train"):
        train_lens(model, lens, corpus, sites=[3])
    with pytest.raises(SiteError, match="no translator for site 2"):
        Lens(LAST, {ResidualSite(0): lens.translators[ResidualSite(0)]})(torch.zeros(1, WIDTH), 2)
    other = wrap(make_module("gemma2", seed=5), model.tokenizer)
    with pytest.raises(OperatorError, match="other weights"):
        lens.check_fits(describe(other), [ResidualSite(0)])
    moments = accumulate(model, corpus, [(0, 1)])
    with pytest.raises(OperatorError, match="no pair to the last block"):
        fit_lens(moments)


def test_divergence_is_not_negative():
    clean, other = torch.randn(2, 20, 9)
    found = divergence(clean, other)
    p, q = clean.double().softmax(-1).numpy(), other.double().softmax(-1).numpy()
    np.testing.assert_allclose(found.numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-4)
    assert (found >= 0).all()
