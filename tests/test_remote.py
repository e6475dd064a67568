"""ATOTrace through the bytes of a request, in a process that has no nnato: what a server would do with it."""

from __future__ import annotations

import nnsight
import pytest
import torch
from conftest import ARCHITECTURES, BLOCKS, WIDTH, hook_generate, hook_residuals, make_module, make_operator, make_tokenizer, put
from nnsight.modeling import huggingface

from nnato.dry_run import DryRunServer
from nnato.errors import RemoteError
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
