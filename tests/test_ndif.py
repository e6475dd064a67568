"""ATOTrace on a real NDIF server (see `make ndif`), trusted and sandboxed, against plain forward hooks here."""

from __future__ import annotations

import json

import nnsight
import pytest
import torch
from click.testing import CliRunner
from conftest import BLOCKS, WIDTH, hook_generate, hook_residuals, make_operator, make_tokenizer, put, supply
from test_multilayer import random_lens, random_sae

from nnato.accumulation import accumulate, load_moments
from nnato.cli import main
from nnato.corpus import SPLITS, Corpus
from nnato.edits import INTERVENTIONS
from nnato.errors import RemoteError
from nnato.fitting import fit
from nnato.models import load_model, wrap
from nnato.multilayer import layer_activity
from nnato.perplexity import ablate
from nnato.remote import NdifServer
from nnato.sites import ResidualSite
from nnato.trace import ATOTrace

IDS = torch.tensor([[1, 8, 9, 30, 5, 7], [1, 40, 41, 6, 90, 11]])
LENGTH = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
CLOSE = {"atol": 1e-5, "rtol": 0}

pytestmark = [pytest.mark.ndif, pytest.mark.slow, pytest.mark.usefixtures("either_way")]
CASES = [("gemma2", "trusted"), ("gemma2", "sandboxed"), ("gpt2", "trusted"), ("gpt2", "sandboxed")]
everywhere = pytest.mark.parametrize(("on_ndif", "either_way"), CASES, indirect=True)
mostly = pytest.mark.parametrize(("on_ndif", "either_way"), CASES[:3], indirect=True)  # a sandbox takes seconds to start


@everywhere
def test_reads_are_bit_equal(on_ndif, either_way):
    model, module, _ = on_ndif
    seen, want = hook_residuals(module, IDS)
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        late = t.residual(BLOCKS - 1).save()
        embed = t.residual("embed").save()
        blocks = nnsight.save([t.residual(0), t.residual(2)])
        kind = nnsight.save([type(t.envoy.interleaver).__name__])
        logits = t.logits.save()
    assert kind == ["IPCInterleaver" if either_way == "sandboxed" else "Interleaver"]
    for got, reference in ((late, seen[3]), (embed, seen["embed"]), (blocks[0], seen[0]), (blocks[1], seen[2]), (logits, want)):
        assert type(got) is torch.Tensor
        assert torch.equal(got, reference)


@mostly
def test_reads_and_patches_in_any_order(on_ndif):
    model, module, _ = on_ndif
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / 4
    seen, want = hook_residuals(module, IDS, {1: put([4], 0.0), 2: put([2], lambda seen: seen[0] @ matrix)}.items())
    clean, _ = hook_residuals(module, IDS, {1: put([4], 0.0)}.items())
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        late = t.residual(BLOCKS - 1).save()
        before = t.residual(2).save()
        t.zero(1, [4])
        t.patch(2, t.residual(0) @ matrix, positions=[2])
        after = t.residual(2).save()
        logits = t.logits.save()
    for got, reference in ((late, seen[3]), (before, clean[2]), (after, seen[2]), (logits, want)):
        torch.testing.assert_close(got, reference, **CLOSE)


@mostly
def test_operators_and_named_interventions(on_ndif):
    model, module, _ = on_ndif
    operator = make_operator(0, 2)
    edits = {1: put([4], operator.source_mean), 2: put([2, 3], lambda seen: operator(seen[0])), 3: put([5], lambda seen: seen["embed"])}
    _, want = hook_residuals(module, IDS, {**edits, 0: put([1], 0.0)}.items())
    asked = ATOTrace(model, input_ids=IDS, use_cache=False, remote=True)
    asked.zero(0, [1])
    with asked as t:
        t.identity("embed", 3, [-1])
        t.mean(1, operator.source_mean, [4])
        t.transport(operator, positions=[2, 3])
        logits = t.logits.save()
    torch.testing.assert_close(logits, want, **CLOSE)
    _, want = hook_residuals(module, IDS, {2: put([4], operator.target_mean)}.items())
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        t.mean(2, operator, [4])
        logits = t.logits.save()
    torch.testing.assert_close(logits, want, **CLOSE)


@mostly
def test_values_may_be_used_between_calls(on_ndif):
    model, module, _ = on_ndif
    seen, _ = hook_residuals(module, IDS)
    clean, want = hook_residuals(module, IDS, {1: put([3], 0.5), 2: put([0], 2.0)}.items())
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        norm = nnsight.save(t.residual(0).norm())
        t.patch(1, 0.5, [3])
        x = (t.residual(1) + 0).save()
        t.patch(2, t.residual(2) * 0 + 2, [0])
        logits = t.logits.save()
    torch.testing.assert_close(norm, seen[0].norm(), **CLOSE)
    torch.testing.assert_close(x, clean[1], **CLOSE)
    torch.testing.assert_close(logits, want, **CLOSE)


@mostly
def test_runs_invokes_and_resumption(on_ndif):
    model, module, _ = on_ndif
    seen, logits = hook_residuals(module, IDS)
    with ATOTrace(model, remote=True) as t:
        t.identity(1, 1)
        results = nnsight.save([t.run(input_ids=IDS[:1], read=[1]), t.run(input_ids=IDS[1:], read=[1])])
    for row, result in enumerate(results):
        torch.testing.assert_close(result["logits"][0], logits[row], **CLOSE)
        torch.testing.assert_close(result["residuals"][1][0], seen[1][row], **CLOSE)
    with ATOTrace(model, remote=True) as t:
        with t.invoke(input_ids=IDS[:1]):
            t.zero(1, [2])
            edited = t.logits.save()
        with t.invoke(input_ids=IDS[1:]):
            x = t.residual(3).save()
    torch.testing.assert_close(edited, hook_residuals(module, IDS[:1], {1: put([2], 0.0)}.items())[1], **CLOSE)
    torch.testing.assert_close(x, seen[3][1:], **CLOSE)
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        t.resume(1, seen[1])
        resumed = t.logits.save()
    torch.testing.assert_close(resumed, logits, **CLOSE)


@everywhere
def test_generation_is_edited_at_every_step(on_ndif):
    model, module, _ = on_ndif
    operator = make_operator(0, 2)
    edits = {1: put([7], 0.0), 2: put(slice(5, None), lambda seen: operator(seen[0]))}
    want = hook_generate(module, IDS, edits.items(), 4)
    with ATOTrace(model, input_ids=IDS, remote=True, **LENGTH) as t:
        t.zero(1, [7])
        t.transport(operator, positions=slice(-1, None))
        first = t.residual(3).save()
        ids = t.result.save()
    assert torch.equal(ids, want)
    torch.testing.assert_close(first, hook_residuals(module, want[:, :6], edits.items())[0][3], **CLOSE)
    with ATOTrace(model, input_ids=IDS, remote=True, **LENGTH) as t:
        steps = nnsight.save([])
        for step in t.iter[:3]:
            if step == 2:
                t.zero(1, [0])
            steps.append(t.residual(2))
    seen, _ = hook_residuals(module, hook_generate(module, IDS, (), 2), {1: put([7], 0.0)}.items())
    torch.testing.assert_close(torch.cat(list(steps), dim=1), seen[2], **CLOSE)


@mostly
def test_persistent_edits_travel_with_the_model(on_ndif):
    model, module, _ = on_ndif
    asked = ATOTrace(model)
    asked.transport(make_operator(0, 2), positions=[2, 3])
    with asked.persist(), ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        logits = t.logits.save()
    _, want = hook_residuals(module, IDS, {2: put([2, 3], lambda seen: make_operator(0, 2)(seen[0]))}.items())
    torch.testing.assert_close(logits, want, **CLOSE)
    with ATOTrace(model, input_ids=IDS, use_cache=False, remote=True) as t:
        logits = t.logits.save()
    assert torch.equal(logits, hook_residuals(module, IDS)[1])


@mostly
def test_ragged_prompts(on_ndif):
    model, module, _ = on_ndif
    prompts = ["w1 w2 w3 w4 w5 w6", "w9 w8"]
    with ATOTrace(model, prompts, remote=True) as t:
        t.zero(1, [-1])
        logits = t.logits.save()
    for row, prompt in enumerate(prompts):
        ids = make_tokenizer()(prompt, return_tensors="pt").input_ids
        _, want = hook_residuals(module, ids, {1: put([ids.shape[1] - 1], 0.0)}.items())
        torch.testing.assert_close(logits[row, -ids.shape[1] :], want[0], atol=1e-4, rtol=0)


@mostly
def test_errors_in_the_block_say_what_they_are(on_ndif):
    model, _, _ = on_ndif
    with pytest.raises(RemoteError, match="PositionError: position 99 lies outside the sequence of 6 tokens"):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS, remote=True) as t:
            t.zero(1, positions=[99])
            t.logits.save()


@mostly
def test_whole_runs_equal_those_here(on_ndif, text, tmp_path):
    """The same moments, bit for bit, and the same losses; what goes there and comes back is said before and after."""
    model, module, host = on_ndif
    here, corpus, said = wrap(module, make_tokenizer()), Corpus(str(text), context=32, per_document=None, folds=2), []
    server = NdifServer(host, timeout=120, say=said.append)
    assert any("nnsight" in difference for difference in server.check())
    pairs = [(0, 2), ("embed", BLOCKS - 1)]
    there = accumulate(model, corpus, pairs, out=tmp_path, server=server, keep_excluded=True)
    local = accumulate(here, corpus, pairs)
    for split in SPLITS:
        parts = [(moments.of(split, "all"), moments.shuffled) for moments in (there.moments, local.moments)]
        for one, two in zip(*parts, strict=True):
            assert one.n == two.n
            assert all(torch.equal(one.scatter_of(*block), two.scatter_of(*block)) for block in one.blocks)
            assert torch.equal(one.mean, two.mean)
    assert (there.tokens, there.excluded, there.medians) == (local.tokens, local.excluded, local.medians)
    assert load_moments(tmp_path).provenance["server"] == {"host": host, "dtype": "float32", "per_job": 64}
    assert " tokens in 5 jobs: " in said[1]
    assert server.received < 3 * len(pairs) * (WIDTH + 1) ** 2 * 8 + 1e6
    operators = [result.operator for result in fit(local)]
    arguments = {"positions": 3, "interventions": (*INTERVENTIONS, "rank_2"), "sequences": 5}
    arguments |= supply(*(operator.pair for operator in operators))[0]
    results = ablate(model, operators, corpus, server=server, per_job=3, **arguments)
    for result, want in zip(results, ablate(here, operators, corpus, **arguments), strict=True):
        assert result.to_json() == want.to_json()


@mostly
def test_layers_of_a_multi_layer_sae_equal_those_here(on_ndif, text):
    """Layer statistics and reconstruction, with and without a lens; what travels is weights and sums."""
    model, module, host = on_ndif
    here, corpus = wrap(module, make_tokenizer()), Corpus(str(text), context=32, per_document=None, folds=2)
    server = NdifServer(host, timeout=120)
    for sae in (random_sae(), random_sae([ResidualSite.EMBED, 2, 3], random_lens())):
        there = layer_activity(model, sae, corpus, server=server)
        local = layer_activity(here, sae, corpus)
        state = 0
        for found, wanted in zip((*there.folds, *there.reconstruction), (*local.folds, *local.reconstruction), strict=True):
            for name, tensor in wanted.tensors().items():
                torch.testing.assert_close(found.tensors()[name], tensor, rtol=1e-6, atol=1e-6)
                state += tensor.nbytes
        assert there.stats.tokens == local.stats.tokens > 0
        assert server.received < state / len(local.folds) + 2e4


@pytest.mark.parametrize(("on_ndif", "either_way"), CASES[:1], indirect=True)
def test_the_command_prints_the_same_table(on_ndif, text):
    model, _, host = on_ndif
    command = ["ablate", "--model", model.repo_id, "--text", str(text), "--context", "32", "--per-document", "0", "--tokens", "4000"]
    command += ["--pairs", "0:2", "--positions", "5", "--sequences", "6"]
    here = CliRunner().invoke(main, command)
    there = CliRunner().invoke(main, [*command, "--remote", "--host", host])
    assert (here.exit_code, there.exit_code) == (0, 0), here.output + there.output
    assert there.stdout == here.stdout
    assert "transport" in there.stdout
    both = [json.loads(CliRunner().invoke(main, [*command, *more, "--json"]).stdout) for more in ([], ["--remote", "--host", host])]
    assert both[0]["results"] == both[1]["results"]


@pytest.mark.parametrize(("on_ndif", "either_way"), CASES[:1], indirect=True)
def test_a_job_is_attached_to_after_a_time_out(on_ndif, text, tmp_path):
    model, _, host = on_ndif
    corpus = Corpus(str(text), context=32, per_document=None, folds=2)
    with pytest.raises(RemoteError, match="is not done after 0 s .*--resume-job") as caught:
        accumulate(model, corpus, [(0, 2)], out=tmp_path, server=NdifServer(host, timeout=0))
    said = []
    resumed = accumulate(model, corpus, [(0, 2)], out=tmp_path, server=NdifServer(host, resume=caught.value.job, say=said.append))
    assert f"job {caught.value.job}: attached" in said
    assert sum("sent" in one for one in said) == 4
    whole = accumulate(model, corpus, [(0, 2)], server=NdifServer(host))
    assert torch.equal(resumed.moments.of("train").scatter, whole.moments.of("train").scatter)
    with pytest.raises(RemoteError, match="the answer is not of this job: with --resume-job, repeat exactly the call that sent it"):
        accumulate(model, corpus, [(0, 2)], server=NdifServer(host, resume=caught.value.job), per_job=2)


def test_models_that_the_server_does_not_have(ndif_host, tmp_path, tokenizer):
    from conftest import make_module

    folder = tmp_path / "model"
    make_module("gemma2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load_model(str(folder), remote=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RemoteError, match="the server cannot run this model|the block failed|the server failed"):
        accumulate(model, Corpus("python-docs", context=32, tokens=3000), [(0, 2)], server=NdifServer(ndif_host, timeout=120, retries=0))
