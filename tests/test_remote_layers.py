"""Layer statistics added up on a server, through the bytes of requests executed in a process that has no nnato, against those here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import BLOCKS, make_module, make_tokenizer, random_words
from test_multilayer import random_lens, random_sae

from nnato.corpus import Corpus
from nnato.dictionaries import Dictionary
from nnato.dry_run import DryRunServer
from nnato.errors import ActivationError, MomentsError, RemoteError
from nnato.layer_stats import layer_variance
from nnato.models import load_model, wrap
from nnato.multilayer import MultiLayerSAE, layer_activity, load_layer_activity
from nnato.remote_layers import LayerSums
from nnato.shards import Shard
from nnato.sites import ResidualSite
from nnato.storage import read_artifact

SAE = random_sae()
SINK = 77


def spiked():
    """A model with a token whose residuals are far larger than all others."""
    module = make_module("gemma2")
    with torch.no_grad():
        module.model.embed_tokens.weight[SINK] *= 300
    return module


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A weightless model, its weights in a server process, and the same model here."""
    folder = tmp_path_factory.mktemp("model")
    spiked().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with DryRunServer(folder) as server:
        yield load_model(str(folder), remote=True), wrap(spiked(), make_tokenizer()), server


class Wrapped:
    """A server of which each answer goes through a function."""

    host, retries, say = "dry run", 0, staticmethod(lambda text: None)

    def __init__(self, server, change):
        self.server, self.change = server, change

    def backend(self, model):
        backend = self.server.backend(model)
        wait = backend.wait

        def changed():
            answer = wait()
            self.change(answer)
            return answer

        backend.wait = changed
        return backend


def sums(activity):
    """All sums of all folds, by name."""
    for stats, errors in zip(activity.folds, activity.reconstruction, strict=True):
        assert stats.tokens == errors.n
        yield from stats.tensors().items()
        yield from errors.tensors().items()


def assert_equal(one, two, **tolerance):
    assert [stats.tokens for stats in one.folds] == [stats.tokens for stats in two.folds]
    for (name, found), (_, wanted) in zip(sums(one), sums(two), strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def dictionary_of(kind, scaling):
    encoder, bias = SAE.dictionary.W_enc, SAE.dictionary.b_dec
    latents = torch.linspace(0.5, 2, encoder.shape[1])
    more = {"jumprelu": {"threshold": latents}, "gated": {"gain": latents, "magnitude_bias": latents - 1}, "topk": {"k": 4}}.get(kind, {})
    return Dictionary(kind, encoder, latents - 4, SAE.dictionary.W_dec, bias, 0 * bias, scaling, **more)


@pytest.mark.parametrize("per_job", [64, 2])
def test_statistics_of_a_server_equal_those_here(served, corpus, tmp_path, per_job):
    """Folds that one job can hold have the same bits; all others agree to rounding. The same tokens are sinks."""
    model, here, server = served
    there = layer_activity(model, SAE, corpus, batch_size=2, server=server, per_job=per_job, out=tmp_path / "there")
    local = layer_activity(here, SAE, corpus, batch_size=2, out=tmp_path / "here")
    assert len(local.folds) == corpus.folds
    assert_equal(there, local, **({"rtol": 0, "atol": 0} if per_job == 64 else {"rtol": 1e-9, "atol": 1e-9}))
    assert_equal(load_layer_activity(tmp_path / "there", SAE), there, rtol=0, atol=0)
    assert layer_variance(there.stats).ratio == pytest.approx(layer_variance(local.stats).ratio, rel=1e-9)
    for row, wanted in zip(there.metrics(), local.metrics(), strict=True):
        assert row["fvu"].value == pytest.approx(wanted["fvu"].value, rel=1e-9)
    kept = [read_artifact(tmp_path / place / "layers.safetensors", "layer-stats")[1] for place in ("there", "here")]
    assert kept[0]["excluded"] == kept[1]["excluded"]
    assert kept[0]["sinks"] == kept[1]["sinks"]
    assert kept[0]["excluded"]["sink"] > 0
    assert kept[0]["medians"] == kept[1]["medians"]
    assert kept[0]["provenance"]["server"] == {"host": "dry run", "dtype": "float32", "per_job": per_job}


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("scaling", ["none", "constant_norm_rescale"])
def test_every_kind_of_dictionary_travels(served, corpus, kind, scaling):
    model, here, server = served
    sae = MultiLayerSAE(dictionary_of(kind, scaling), (ResidualSite.EMBED, ResidualSite(2)))
    there, local = (layer_activity(one, sae, corpus, server=where) for one, where in ((model, server), (here, None)))
    assert float(local.stats.total.sum()) > 0
    assert_equal(there, local, rtol=1e-9, atol=1e-9)


def test_a_lens_travels(served, corpus):
    model, here, server = served
    sae = random_sae([ResidualSite.EMBED, *range(BLOCKS)], random_lens())
    there, local = (layer_activity(one, sae, corpus, server=where) for one, where in ((model, server), (here, None)))
    assert_equal(there, local, rtol=1e-6, atol=1e-6)


def test_autocast_of_a_server_changes_nothing():
    """A server of half precision runs blocks under autocast, which would encode in bfloat16."""
    x = torch.randn(BLOCKS, 3, 7, SAE.dictionary.d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    ordinary = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    translators = random_sae(lens=random_lens()).translators()
    found = []
    for on in (True, False):
        one = LayerSums(SAE.dictionary.plain("cpu"), SAE.sites, translators)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            one.add(x, ordinary, ~ordinary, torch.zeros(3))
        found.append(one.packed())
    assert found[0]["tokens"] == int(ordinary.sum())
    for part in ("stats", "errors"):
        for name, tensor in found[0][part].items():
            assert torch.equal(tensor, found[1][part][name])


@pytest.mark.parametrize("documents", [40, 160])
def test_what_travels_does_not_grow_with_tokens(served, tmp_path, documents):
    model, _, server = served
    rng = np.random.default_rng(documents)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": random_words(rng, 60)}) + "\n" for _ in range(documents)))
    sent, received, said = [], [], []

    def count(answer):
        sent.append(server.sent)
        received.append(server.received)

    wrapped = Wrapped(server, count)
    wrapped.say = said.append
    activity = layer_activity(model, SAE, Corpus(str(text), context=32, folds=2), server=wrapped)
    assert activity.stats.tokens > 2 * documents
    state = sum(tensor.nbytes for part in (activity.stats, activity.reconstruction[0]) for tensor in part.tensors().values())
    weights = sum(one.nbytes for one in vars(SAE.dictionary).values() if isinstance(one, torch.Tensor))
    assert max(received) <= state + 2e4
    assert max(sent) <= weights + 18 * 32 * documents + 2e5  # the package's source travels as well
    assert f" tokens in {len(sent)} jobs: at most " in said[0]


def test_a_failed_job_is_all_that_is_repeated(served, corpus, tmp_path):
    model, here, server = served
    jobs = []

    def failing(answer):
        jobs.append(1)
        if len(jobs) == 3:
            raise RemoteError("the server ended the job", transient=True)

    arguments = {"batch_size": 2, "per_job": 1, "out": tmp_path}
    with pytest.raises(RemoteError, match="the server ended the job"):
        layer_activity(model, SAE, corpus, server=Wrapped(server, failing), **arguments)
    resumed = layer_activity(model, SAE, corpus, server=Wrapped(server, failing), **arguments)
    assert len(jobs) == 1 + len(corpus.tokenize(here.tokenizer).only("test").plan(2))
    assert_equal(resumed, layer_activity(here, SAE, corpus, batch_size=2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sums: sums.update(label="another"), "the answer is not of this job: with --resume-job"),
        (lambda sums: sums.pop("stats"), "does not hold what was asked for"),
        (lambda sums: sums["stats"].pop("peak"), "does not hold what was asked for .*lack peak"),
        (lambda sums: sums["stats"]["total"].fill_(float("inf")), "does not hold what was asked for .*not finite"),
        (lambda sums: sums["errors"].update(mean=torch.zeros(1, 2)), "does not hold what was asked for .*lack errors.mean"),
        (lambda sums: sums.update(tokens="many"), "does not hold what was asked for"),
        (lambda sums: sums.update(tokens=1), "does not hold what was asked for .*more batches or tokens"),
        (lambda sums: sums.update(medians=torch.zeros(7)), "does not hold what was asked for"),
    ],
)
def test_answers_that_do_not_fit_are_refused(served, corpus, change, message):
    model, _, server = served
    with pytest.raises(RemoteError, match=message):
        layer_activity(model, SAE, corpus, server=Wrapped(server, lambda answer: change(answer["sums"])))


def test_what_cannot_be_done_is_refused(served, corpus, tmp_path):
    model, _, server = served
    with pytest.raises(MomentsError, match="a server's jobs are parts of the text already"):
        layer_activity(model, SAE, corpus, server=server, shard=Shard.parse("1/2"), out=tmp_path)
    with pytest.raises(MomentsError, match="0 batches in a job: at least 1 is needed"):
        layer_activity(model, SAE, corpus, server=server, per_job=0)


def test_residuals_that_are_not_finite_are_named(tmp_path, corpus):
    module = make_module("gemma2")
    with torch.no_grad():
        module.model.embed_tokens.weight[50] = float("nan")
    module.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with DryRunServer(tmp_path) as server, pytest.raises(ActivationError, match=r"the residual is nan in document .*, site 0; nothing"):
        layer_activity(load_model(str(tmp_path), remote=True), SAE, corpus, server=server)
