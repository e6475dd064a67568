"""Training through sae_lens: what goes in, what comes out, and resumption to the same bits."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import BLOCKS, WIDTH, hook_residuals, make_module
from scipy.optimize import minimize

from nnato.cli import main
from nnato.coding import standardise
from nnato.corpus import Corpus
from nnato.dictionaries import load_dictionary
from nnato.errors import DictionaryError, FileFormatError, OperatorError
from nnato.models import wrap
from nnato.sae_training import Recipe, _Rows, default_corpus, geometric_median, train_sae
from nnato.storage import read_artifact, read_metadata, write_artifact

SMALL = Recipe(expansion=8, k=4, tokens=1500, rows=128, buffer=512, lr=3e-3)


@pytest.fixture
def blocks(model, corpus):
    return corpus.tokenize(model.tokenizer).only("train")


def test_rows_are_all_layers_of_ordinary_tokens_standardised(any_model, corpus):
    """Against forward hooks; special tokens, first positions and sinks are not among them."""
    blocks = corpus.tokenize(any_model.tokenizer).only("train")
    sites = tuple(range(BLOCKS))
    rows = _Rows(any_model, blocks, sites, Recipe(rows=1, buffer=1), None, 2)
    x = rows._pass()
    tokens = blocks.batch(rows.plan[0])
    seen, _ = hook_residuals(any_model._module, tokens.ids)
    residuals = torch.stack([seen[site] for site in sites])
    norms = residuals.norm(dim=-1)
    allowed = tokens.mask & ~tokens.special
    allowed[:, 0] = False
    medians = norms[:, allowed].median(dim=1).values
    allowed &= ~(norms > 10 * medians[:, None, None]).any(0)
    wanted = residuals[:, allowed].double().numpy()
    wanted = (wanted - wanted.mean(-1, keepdims=True)) / (wanted.std(-1, keepdims=True, ddof=1) + 1e-5)
    np.testing.assert_allclose(x.numpy(), wanted, atol=2e-5)


def test_buffers_hold_every_row_once(model, blocks):
    rows = _Rows(model, blocks, (0, 2), Recipe(rows=64, buffer=300), None, 4)
    buffers = [rows.fill() for _ in range(3)]
    assert all(len(buffer) >= 256 and len(buffer) % 64 == 0 for buffer in buffers)
    again = _Rows(model, blocks, (0, 2), Recipe(rows=64, buffer=300), None, 4)
    parts = [again._pass().flatten(0, 1) for _ in range(rows.cursor)]
    everything = torch.cat([*buffers, rows.rest])
    wanted = torch.cat(parts)
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, wanted.tolist()))
    assert not torch.equal(everything, wanted)


def test_training_reduces_the_error_at_every_layer(model, corpus, tmp_path):
    recipe = Recipe(expansion=16, k=8, tokens=400 * 256 // BLOCKS, rows=256, buffer=1024, lr=3e-3)
    trained = train_sae(model, None, recipe, out=tmp_path / "sae", corpus=corpus)
    last = trained.history[-1]["fvu"]
    assert list(last) == [str(site) for site in range(BLOCKS)]
    assert np.mean(list(last.values())) < 0.3
    losses = np.array([entry["loss"] for entry in trained.history])
    smooth = losses[: len(losses) // 5 * 5].reshape(5, -1).mean(1)
    assert (np.diff(smooth) < 0).all()


def test_resumption_gives_the_same_bits(model, corpus, tmp_path, monkeypatch):
    whole = train_sae(model, None, SMALL, out=tmp_path / "whole", corpus=corpus, checkpoint_every=1)
    fill, calls = _Rows.fill, []

    def failing(self):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fill(self)

    monkeypatch.setattr(_Rows, "fill", failing)
    with pytest.raises(KeyboardInterrupt):
        train_sae(model, None, SMALL, out=tmp_path / "parts", corpus=corpus, checkpoint_every=1)
    parts = train_sae(model, None, SMALL, out=tmp_path / "parts", corpus=corpus, checkpoint_every=1)
    assert len(calls) > 6
    assert parts.history == whole.history
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    again = train_sae(model, None, SMALL, out=tmp_path / "parts", corpus=corpus, checkpoint_every=1)
    assert again.history == whole.history
    with pytest.raises(DictionaryError, match="checkpoint of another training"):
        train_sae(model, None, Recipe(expansion=8), out=tmp_path / "parts", corpus=corpus)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("scale", ["token", "mean", "none"])
def test_sae_lens_reads_it_and_encodes_raw_residuals(model, corpus, tmp_path, kind, scale):
    recipe = Recipe(kind=kind, scale=scale, expansion=4, k=4, tokens=600, rows=64, buffer=256, lr=3e-3)
    trained = train_sae(model, [2], recipe, out=tmp_path, corpus=corpus)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

        sae = SAE.load_from_disk(tmp_path)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(WIDTH * 4), atol=1e-5) or kind == "batchtopk"
    x = torch.randn(50, WIDTH) * 3
    dictionary = load_dictionary(trained.path)
    with torch.no_grad():
        theirs = sae.encode(x)
        assert torch.allclose(dictionary.encode(x), theirs, atol=1e-5)
        assert torch.allclose(dictionary.decode(dictionary.encode(x), x), sae.decode(theirs), atol=1e-4)
    assert sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert dictionary.sites == (2,)
    assert sae.cfg.metadata.nnato_recipe["k"] == 4
    if scale != "none":  # the units of the input are undone
        residuals = hook_residuals(model._module, torch.randint(4, 90, (4, 30)))[0][2].flatten(0, 1)
        error = dictionary.decode(dictionary.encode(residuals), residuals) - residuals
        assert error.square().sum() / (residuals - residuals.mean(0)).square().sum() < 1


def test_weights_start_tied_with_unit_rows(model, corpus):
    from nnato.sae_training import _Training

    sae = _Training(SMALL, WIDTH, (0, 1), torch.device("cpu")).sae
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(8 * WIDTH), atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec)
    assert torch.allclose(cosines, torch.ones(8 * WIDTH), atol=1e-6)


def test_geometric_median_minimises_the_sum_of_distances():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double() ** 3
    found = geometric_median(rows).numpy()
    best = minimize(lambda point: np.linalg.norm(rows.numpy() - point, axis=1).sum(), np.zeros(5), tol=1e-12)
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    repeated = torch.cat([rows[:1]] * 100 + [rows])
    assert torch.allclose(geometric_median(repeated), rows[0], atol=1e-6)


def test_the_bias_starts_at_the_geometric_median_of_standardised_rows(model, blocks):
    """There the gradient of the sum of distances to the rows is zero: as many unit vectors point one way as the other."""
    from nnato.sae_training import _Training

    recipe = dataclasses.replace(SMALL, lr=1e-12)
    rows, training = _Rows(model, blocks, (0, 2), recipe, None, 4), _Training(recipe, WIDTH, (0, 2), torch.device("cpu"))
    buffer = rows.fill()
    training.learn(buffer, rows.fresh)
    apart = (buffer[: 2 * recipe.rows] - training.sae.b_dec.detach()).double()
    assert (apart / apart.norm(dim=1, keepdim=True)).mean(0).norm() < 1e-3


def test_a_vector_of_zeros_stays_finite():
    assert torch.equal(standardise(torch.zeros(3, 7))[0], torch.zeros(3, 7))


def test_no_dead_latent_no_auxiliary_loss(model, corpus):
    """And with dead ones, the loss is in the units of what is trained on."""
    from sae_lens.saes.sae import TrainStepInput

    from nnato.sae_training import _Training

    training = _Training(SMALL, WIDTH, (0,), torch.device("cpu"))
    raw = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))

    def losses(dead, scale=1):
        x = standardise(scale * raw)[0]
        step = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
        return training.sae.training_forward_pass(step).losses

    def gradients(dead, names):
        return torch.autograd.grad(sum(losses(dead)[name] for name in names), list(training.sae.parameters()))

    none, some = torch.zeros(8 * WIDTH, dtype=torch.bool), torch.arange(8 * WIDTH) % 3 == 0
    name = "auxiliary_reconstruction_loss"
    assert losses(none)[name] == 0
    assert losses(some)[name] > 0
    torch.testing.assert_close(losses(some, 100)[name], losses(some)[name], rtol=1e-3, atol=0)  # standardising adds 1e-5 to σ
    for dead, same in ((none, True), (some, False)):
        pairs = zip(gradients(dead, ("mse_loss", name)), gradients(dead, ("mse_loss",)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs) is same


def test_dead_is_counted_in_tokens(model, corpus):
    """One that is silent for more than the window is dead, whatever the batches."""
    from nnato.sae_training import _Training

    for rows in (32, 64):
        training = _Training(
            Recipe(expansion=8, k=4, tokens=10_000, rows=rows, buffer=512, dead_tokens=256), WIDTH, (0, 1), torch.device("cpu")
        )
        with torch.no_grad():
            training.sae.W_enc[:, 0] = 0
            training.sae.b_enc[0] = -100
        batch = standardise(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
        window = 256 * 2 // rows
        for number in range(window + 1):
            assert not training.trainer.dead_neurons[0], number
            training.trainer.step(batch)
            training.trainer.n_training_steps += 1
        silent = training.trainer.n_forward_passes_since_fired.clone()
        training._fvu(torch.stack([batch, batch]))  # judging is no use of a latent
        assert torch.equal(training.trainer.n_forward_passes_since_fired, silent)
        assert training.trainer.dead_neurons[0]


def test_without_an_auxiliary_loss(model, corpus, tmp_path):
    trained = train_sae(model, None, dataclasses.replace(SMALL, aux=0.0), out=tmp_path, corpus=corpus)
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kind": "relu"}, "known are topk"),
        ({"scale": "layer"}, "known are topk"),
        ({"k": 0}, "k 0: give at least 1"),
        ({"lr": 2.0}, "learning rate"),
        ({"buffer": 10}, "smaller than a step"),
    ],
)
def test_bad_recipes_are_refused(bad, message):
    with pytest.raises(DictionaryError, match=message):
        Recipe(**bad)


def stopped_after(model, corpus, out, buffers):
    def progress(stage, done, total):
        if stage == "training" and done >= buffers * 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(model, [1], SMALL, out=out, corpus=corpus, checkpoint_every=1, progress=progress)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(model, corpus, tmp_path, damage):
    """One warning, and the same bits in the end."""
    train_sae(model, [1], SMALL, out=tmp_path / "whole", corpus=corpus)
    out = tmp_path / "damaged"
    stopped_after(model, corpus, out, 2)
    file, previous = out / "checkpoint.safetensors", out / "checkpoint.previous.safetensors"
    assert read_metadata(previous)["fills"] + 1 == read_metadata(file)["fills"]
    file.write_bytes(file.read_bytes()[:-100]) if damage == "truncated" else file.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_sae(model, [1], SMALL, out=out, corpus=corpus)
    said = [str(warning.message) for warning in caught if "Going on from the checkpoint before it" in str(warning.message)]
    assert len(said) == (damage == "truncated")
    assert not previous.exists()
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "damaged")]
    assert weights[0] == weights[1]


def test_without_a_readable_checkpoint_nothing_is_overwritten(model, corpus, tmp_path):
    stopped_after(model, corpus, tmp_path, 2)
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(FileFormatError, match=r"checkpoint.previous.safetensors is damaged"):
        train_sae(model, [1], SMALL, out=tmp_path, corpus=corpus)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == b"damaged"


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 10**12, "samples": 128 * 10**12},
        {"steps": 1},
        {"cursor": -1},
        {"factor": float("nan")},
        {"history": [{}]},
        {"fills": None},
        {"rest": torch.zeros(3, WIDTH + 1)},
        {"medians": torch.zeros(2, dtype=torch.float64)},
        {"sae.b_enc": torch.full((8 * WIDTH,), float("nan"))},
        {"act_freq_scores": torch.zeros(8 * WIDTH, dtype=torch.float64)},
    ],
)
def test_checkpoints_whose_contents_do_not_fit_are_refused(model, corpus, tmp_path, change):
    stopped_after(model, corpus, tmp_path, 2)
    file = tmp_path / "checkpoint.safetensors"
    tensors, metadata = read_artifact(file, "sae-training")
    name, value = next(iter(change.items()))
    own = {key: entry for key, entry in metadata.items() if key not in ("schema", "kind")}
    write_artifact(
        file, "sae-training", {**tensors, name: value} if name in tensors else tensors, own if name in tensors else {**own, **change}
    )
    with pytest.raises(FileFormatError, match="is inconsistent"):
        train_sae(model, [1], SMALL, out=tmp_path, corpus=corpus)


def test_a_second_process_in_the_same_folder_is_refused(model, corpus, tmp_path):
    """A real second process begins while this one is half way."""
    other = (
        "import sys; from pathlib import Path; from nnato.storage import exclusive; from nnato.errors import OutputError\n"
        "try:\n    with exclusive(Path(sys.argv[1])): print('mine')\n"
        "except OutputError as error: print(error)"
    )
    command, said = [sys.executable, "-c", other, str(tmp_path / "checkpoint.safetensors")], []

    def progress(stage, done, total):
        if stage == "training" and done and not said:
            said.append(subprocess.run(command, capture_output=True, text=True).stdout)

    train_sae(model, [1], SMALL, out=tmp_path, corpus=corpus, progress=progress)
    assert "another process is working on" in said[0]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "mine\n"


def test_nothing_to_train_on_is_refused(model, corpus, tmp_path):
    with pytest.raises(DictionaryError, match="no sites"):
        train_sae(model, [], SMALL, out=tmp_path, corpus=corpus)
    with pytest.raises(DictionaryError, match="k 200 is more than"):
        train_sae(model, [1], Recipe(k=200, expansion=8), out=tmp_path, corpus=corpus)


def test_a_lens_of_another_model_is_refused(tokenizer, model, corpus, tmp_path):
    from nnato.lens import logit_lens

    with pytest.raises(OperatorError, match="the lens is of a model of 7 blocks"):
        train_sae(model, None, SMALL, out=tmp_path, corpus=corpus, lens=logit_lens(7, WIDTH))
    other = wrap(make_module("gemma2", 1), tokenizer)
    assert train_sae(other, None, SMALL, out=tmp_path, corpus=corpus, lens=logit_lens(BLOCKS, WIDTH)).path == tmp_path


def test_command(saved_model, text, tmp_path):
    arguments = ["sae", "train", str(saved_model), "--site", "2", "--text", str(text), "--context", "32", "--tokens", "600"]
    arguments += ["--expansion", "4", "-k", "4", "--rows", "64", "--buffer", "256", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["results"]
    assert record["sites"] == [2]
    assert record["latents"] == 64
    assert load_dictionary(tmp_path / "out").latents == 64
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "64 latents" in result.stdout
    assert f"nnato features evaluate MOMENTS --target 2 --sae {tmp_path / 'out'}, MOMENTS of this model with pairs to 2" in result.stdout
    assert "without, those of the embedded model" not in result.stdout  # they would be of another model
    result = CliRunner().invoke(main, [*arguments, "-k", "0"])
    assert result.exit_code == 2
    assert "give at least 1" in result.stderr


def test_default_text_is_what_the_recipe_asks_for(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Corpus, "documents", lambda self: asked.append(self) or iter(()))
    with pytest.raises(Exception, match="too short"):
        train_sae(model, [1], Recipe(tokens=60_000), out=tmp_path)
    assert asked[0].tokens == 100_000
    assert asked[0].per_document == 8
    assert default_corpus(Recipe(tokens=600)).tokens == 40_000
