"""ATOTrace through the bytes of a request, in a process that has no nnato: what a server would do with it."""

from __future__ import annotations

import json

import nnsight
import numpy as np
import pytest
import torch
from conftest import (
    ARCHITECTURES,
    BLOCKS,
    WIDTH,
    hook_generate,
    hook_residuals,
    make_module,
    make_operator,
    make_tokenizer,
    put,
    random_words,
    supply,
)
from nnsight.modeling import huggingface

from nnato.accumulation import accumulate, load_moments
from nnato.corpus import SPLITS, Corpus
from nnato.dry_run import DryRunServer
from nnato.edits import INTERVENTIONS
from nnato.errors import ActivationError, ModelError, MomentsError, RemoteError
from nnato.fitting import fit
from nnato.models import describe, load_model, wrap
from nnato.perplexity import ablate, check_operator
from nnato.remote import NdifServer
from nnato.trace import ATOTrace, TransformersModel

IDS = torch.tensor([[1, 8, 9, 30, 5, 7], [1, 40, 41, 6, 90, 11]])


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def served(request, tmp_path_factory):
    """A weightless model here, its weights in a server process, and the same module here for the reference."""
    folder = str(tmp_path_factory.mktemp(request.param))
    module = make_module(request.param)
    module.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    server = DryRunServer(folder)
    patch = pytest.MonkeyPatch()
    patch.setitem(huggingface._ID_CACHE, folder, folder)
    patch.setattr(TransformersModel, "_remote_backend", lambda self, *arguments: server.backend(self))
    model = TransformersModel(folder, task="text-generation", tokenizer=make_tokenizer())
    assert next(model._module.parameters()).device.type == "meta"
    yield model, module, server
    patch.undo()
    server.close()


def test_reads_and_patches_in_any_order(served):
    model, module, _ = served
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / 4

    def move(value, seen):
        value = value.clone()
        value[:, 2] = (seen[0] @ matrix)[:, 2]
        return value

    seen, want = hook_residuals(module, IDS, {2: move}.items())
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        late = t.residual(BLOCKS - 1).save()
        embed = t.residual("embed").save()
        t.patch(2, t.residual(0) @ matrix, positions=[2])
        logits = t.logits.save()
    for got, reference in ((late, seen[BLOCKS - 1]), (embed, seen["embed"]), (logits, want)):
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, reference, atol=1e-5, rtol=0)


def test_an_operator_travels_without_its_package(served):
    model, module, server = served
    operator = make_operator(0, 2)

    def move(value, seen):
        value = value.clone()
        value[:, [2, 3]] = operator(seen[0])[:, [2, 3]]
        return value

    _, want = hook_residuals(module, IDS, {2: move}.items())
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        t.transport(operator, 0, 2, positions=[2, 3])
        first = t.logits.save()
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        t.patch(2, operator(t.residual(0)), positions=[2, 3])
        second = t.logits.save()
    torch.testing.assert_close(first, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(second, want, atol=1e-5, rtol=0)
    assert server.sent < 50_000


def test_named_interventions_and_the_operators_own_sites(served):
    model, module, _ = served
    operator = make_operator(0, 2)
    edits = {
        1: put([4], operator.source_mean),
        2: put([2, 3], lambda seen: operator(seen[0])),
        3: put([-1 % 6], lambda seen: seen["embed"]),
    }
    _, want = hook_residuals(module, IDS, {**edits, 0: put([1], 0.0)}.items())
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        t.zero(0, [1])
        t.identity("embed", 3, [-1])
        t.mean(1, operator.source_mean, [4])
        t.transport(operator, positions=[2, 3])
        logits = t.logits.save()
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
    _, want = hook_residuals(module, IDS, {2: put([4], operator.target_mean)}.items())
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        t.mean(2, operator, [4])
        logits = t.logits.save()
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)


def test_generation_is_edited_at_every_step(served):
    model, module, _ = served
    operator = make_operator(0, 2)
    edits = {1: put([7], 0.0), 2: put(slice(5, None), lambda seen: operator(seen[0]))}
    want = hook_generate(module, IDS, edits.items(), 4)
    with ATOTrace(model, input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, remote=True) as t:
        t.zero(1, [7])
        t.transport(operator, positions=slice(-1, None))
        first = t.residual(3).save()
        ids = t.result.save()
    assert torch.equal(ids, want)
    torch.testing.assert_close(first, hook_residuals(module, want[:, :6], edits.items())[0][3], atol=1e-5, rtol=0)
    with ATOTrace(model, input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, remote=True) as t:
        steps = nnsight.save([])
        for step in t.iter[:3]:
            if step == 2:
                t.zero(1, [0])
            steps.append(t.residual(2))
    seen, _ = hook_residuals(module, hook_generate(module, IDS, (), 2), {1: put([7], 0.0)}.items())
    torch.testing.assert_close(torch.cat(list(steps), dim=1), seen[2], atol=1e-5, rtol=0)


def test_persistent_edits_travel_with_the_model(served):
    model, module, _ = served
    asked = ATOTrace(model)
    asked.transport(make_operator(0, 2), positions=[2, 3])
    with asked.persist(), ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        logits = t.logits.save()
    _, want = hook_residuals(module, IDS, {2: put([2, 3], lambda seen: make_operator(0, 2)(seen[0]))}.items())
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        logits = t.logits.save()
    torch.testing.assert_close(logits, hook_residuals(module, IDS)[1], atol=1e-5, rtol=0)


def test_ragged_prompts(served):
    model, module, _ = served
    prompts = ["w1 w2 w3 w4 w5 w6", "w9 w8"]
    with ATOTrace(model, prompts, remote=True) as t:
        t.zero(1, [-1])
        logits = t.logits.save()
    for row, prompt in enumerate(prompts):
        ids = make_tokenizer()(prompt, return_tensors="pt").input_ids
        _, want = hook_residuals(module, ids, {1: put([ids.shape[1] - 1], 0.0)}.items())
        torch.testing.assert_close(logits[row, -ids.shape[1] :], want[0], atol=1e-4, rtol=0)


def test_runs_and_resumption(served):
    model, module, _ = served
    seen, logits = hook_residuals(module, IDS)
    with ATOTrace(model, remote=True) as t:
        t.transport(None, 1, 1)
        results = nnsight.save([t.run(input_ids=IDS[:1], read=[1]), t.run(input_ids=IDS[1:], read=[1])])
    for row, result in enumerate(results):
        torch.testing.assert_close(result["logits"][0], logits[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(result["residuals"][1][0], seen[1][row], atol=1e-5, rtol=0)
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        t.resume(1, seen[1])
        resumed = t.logits.save()
    torch.testing.assert_close(resumed, logits, atol=1e-5, rtol=0)


def test_errors_in_the_block_say_what_they_are(served):
    model, _, _ = served
    with pytest.raises(RemoteError, match="PositionError: position 99 lies outside the sequence of 6 tokens"):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS, remote=True) as t:
            t.patch(1, 0.0, positions=[99])
            t.logits.save()


# ---- whole runs --------------------------------------------------------------------------------------------------------


def same_sums(moments, other, tokens="ordinary"):
    """The parts of two runs, as solvers read them."""
    assert moments.rows == other.rows
    for split in SPLITS:
        for one, two in ((moments.of(split, tokens), other.of(split, tokens)), (moments.shuffled, other.shuffled)):
            for source, target in one.blocks:
                yield one.scatter_of(source, target), two.scatter_of(source, target)
            for site in one.sites:
                yield one.mean_of(site), two.mean_of(site)


def test_accumulation_and_ablation_on_a_server_equal_those_here(served, corpus):
    """In each fold the server adds up the same batches in the same order, so the sums have the same bits."""
    model, module, server = served
    here = wrap(module, make_tokenizer())
    there = accumulate(model, corpus, [(0, 2), ("embed", BLOCKS - 1)], server=server, batch_size=4, keep_excluded=True)
    local = accumulate(here, corpus, [(0, 2), ("embed", BLOCKS - 1)], batch_size=4)
    assert all(torch.equal(one, two) for one, two in same_sums(there.moments, local.moments, "all"))
    for name in ("text", "tokens", "excluded", "sink_tokens", "medians"):
        assert getattr(there, name) == getattr(local, name)
    assert there.provenance["server"] == {"host": "dry run", "dtype": "float32", "per_job": 64}
    fits, local_fits = fit(there), fit(local)
    operators, local_operators = ([result.operator for result in results] for results in (fits, local_fits))
    assert all(torch.equal(one.weight, two.weight) for one, two in zip(operators, local_operators, strict=True))
    arguments = {"positions": 3, "interventions": (*INTERVENTIONS, "rank_2"), "sequences": 5}
    arguments |= supply(*(operator.pair for operator in operators))[0]
    results = ablate(model, operators, corpus, server=server, per_job=2, **arguments)
    for result, want in zip(results, ablate(here, local_operators, corpus, **arguments), strict=True):
        assert result.to_json() == want.to_json()
    assert here is not model
    check_operator(operators[0], describe(here))  # operators of a server's model may be used on weights here


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """As `served`, of one architecture."""
    folder = tmp_path_factory.mktemp("gemma")
    make_module("gemma2").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with DryRunServer(folder) as server:
        yield load_model(str(folder), remote=True), folder, server


@pytest.mark.parametrize("positions", ["active>0.5", "every:7", "word:2"])
def test_chains_at_chosen_positions_on_a_server_equal_those_here(gemma, corpus, positions):
    model, _, server = gemma
    here = wrap(make_module("gemma2"), make_tokenizer())
    operators = [make_operator(0, 1), make_operator(1, 3)]
    arguments = {"positions": positions, "interventions": ("transport", "resample", "features", "zero"), "sequences": 4, "chain": True}
    arguments |= {"features": supply(operators[0].pair)[0]["features"], "seeds": 2 if positions == "word:2" else 1}
    (there,) = ablate(model, operators, corpus, server=server, per_job=3, **arguments)
    (local,) = ablate(here, operators, corpus, **arguments)
    assert there.to_json() == local.to_json()
    assert any(there.edited)


def test_jobs_are_cut_merged_and_bounded(gemma, corpus, tmp_path):
    model, _, server = gemma
    said = []
    server.say = said.append
    pairs = [(0, 2), (0, 3)]
    whole = accumulate(model, corpus, pairs, server=server, batch_size=4, keep_excluded=True)
    cut = accumulate(model, corpus, pairs, server=server, batch_size=4, per_job=2, out=tmp_path)
    server.say = lambda text: None
    for one, two in same_ordinary(cut.moments, whole.moments):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    plan = corpus.tokenize(model.tokenizer).plan(4)
    announced = [int(text.split(" in ")[1].split()[0]) for text in said if " jobs: " in text]
    assert len(announced) == 2
    assert len(plan) / 2 <= announced[1] < len(plan)
    sent = sum("sent" in text and "came back" in text for text in said)
    assert sent == sum(announced)
    assert not cut.moments.has_excluded
    with pytest.raises(MomentsError, match="these moments hold ordinary tokens only"):
        cut.moments.of("train", "all")
    assert all(result.r2_all_tokens == {} for result in fit(cut))
    assert load_moments(tmp_path).tokens == whole.tokens


def same_ordinary(moments, other):
    for split in SPLITS:
        one, two = moments.of(split), other.of(split)
        assert one.n == two.n
        yield one.mean, two.mean
        for source, target in one.blocks:
            yield one.scatter_of(source, target), two.scatter_of(source, target)


@pytest.mark.parametrize("documents", [20, 80])
def test_what_comes_back_does_not_grow_with_tokens(gemma, tmp_path, documents):
    model, _, server = gemma
    rng = np.random.default_rng(documents)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": random_words(rng, 60)}) + "\n" for _ in range(documents)))
    largest = []

    class Counted:
        host, retries, say = server.host, 0, staticmethod(lambda text: None)

        def backend(self, model):
            backend = server.backend(model)
            wait = backend.wait

            def counted():
                largest.append(server.received)
                return wait()

            backend.wait = counted
            return backend

    accumulate(model, Corpus(str(text), context=32, folds=2), [(0, 2)], server=Counted())
    assert 8 * 3 * WIDTH**2 * 0.5 < max(largest) <= 3 * (WIDTH + 1) ** 2 * 8 + 1e6


def test_a_failed_job_loses_nothing_and_is_all_that_is_repeated(gemma, corpus, tmp_path):
    model, _, server = gemma
    sent = []

    class Failing:
        host, retries = server.host, 0
        broken = True

        def say(self, text):
            pass

        def backend(self, model):
            sent.append(1)
            if self.broken and len(sent) == 4:
                raise RemoteError("the server ended the job", transient=True)
            return server.backend(model)

    failing = Failing()
    arguments = {"pairs": [(0, 2)], "batch_size": 4, "per_job": 2}
    with pytest.raises(RemoteError, match="the server ended the job"):
        accumulate(model, corpus, out=tmp_path, server=failing, **arguments)
    failing.broken = False
    resumed = accumulate(model, corpus, out=tmp_path, server=failing, **arguments)
    total = len(sent)
    sent.clear()
    failing.retries, failing.broken = 1, True  # this time the failure is met by another try
    again = accumulate(model, corpus, server=failing, **arguments)
    assert total == len(sent)
    assert all(torch.equal(one, two) for one, two in same_sums(resumed.moments, again.moments))


def test_residuals_that_are_not_finite_on_the_server_are_named(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("spoilt")
    module = make_module("gemma2")
    with torch.no_grad():
        module.model.embed_tokens.weight[50] = float("nan")
    module.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with (
        DryRunServer(folder) as server,
        pytest.raises(ActivationError, match=r"the residual is nan in document [0-9a-f]{16} \(block .*, site 0; nothing"),
    ):
        accumulate(load_model(str(folder), remote=True), corpus, [(0, 2)], server=server)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sums: sums.update(label="another"), "the answer is not of this job: with --resume-job"),
        (lambda sums: sums.pop("ordinary"), "does not hold what was asked for"),
        (lambda sums: sums["ordinary"].update(own=torch.zeros(1, 3)), "does not hold what was asked for"),
        (lambda sums: sums["ordinary"]["cross"].fill_(float("nan")), "does not hold what was asked for .*not finite"),
        (lambda sums: sums["ordinary"].update(n=-3), "does not hold what was asked for"),
        (lambda sums: sums["ordinary"].update(mean=sums["ordinary"]["mean"].float()), "does not hold what was asked for"),
        (lambda sums: sums.update(medians=torch.zeros(7)), "does not hold what was asked for"),
        (lambda sums: sums.update(counts={}), "does not hold what was asked for"),
    ],
)
def test_answers_that_do_not_fit_are_refused(gemma, corpus, change, message):
    model, _, server = gemma

    class Lying:
        host, retries, say = server.host, 0, staticmethod(lambda text: None)

        def backend(self, model):
            backend = server.backend(model)
            wait = backend.wait

            def lie():
                answer = wait()
                change(answer["sums"])
                return answer

            backend.wait = lie
            return backend

    with pytest.raises(RemoteError, match=message):
        accumulate(model, corpus, [(0, 2)], server=Lying())


def test_models_without_weights(gemma, tmp_path):
    model, folder, _ = gemma
    info = describe(model)
    assert (info.d_model, info.blocks, info.dtype) == (WIDTH, BLOCKS, "on a server")
    assert str(folder) in info.digest
    assert not info.fits({"d_model": WIDTH + 1})
    with pytest.raises(ModelError, match="'nowhere' is no name that a server could know"):
        load_model("nowhere", remote=True)
    with pytest.raises(ModelError, match="cannot load 'no/where' from the hub"):
        load_model("no/where", remote=True)
    loaded = wrap(make_module("gemma2"), make_tokenizer())
    with pytest.raises(ModelError, match=r"has no name that a server could know .*load it with load_model\(…, remote=True\)"):
        NdifServer("http://127.0.0.1:9").backend(loaded)
