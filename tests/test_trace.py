"""ATOTrace against plain forward hooks, on five architectures. Also holds the private names of nnsight that it uses."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import warnings

import nnsight
import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH, hook_generate, hook_residuals, make_operator, put
from IPython.core.interactiveshell import InteractiveShell
from nnsight.intervention.interleaver import OutOfOrderError

from nnato.errors import ActivationError, OperatorError, PositionError, SiteError
from nnato.reduction import capture
from nnato.sites import ResidualSite
from nnato.trace import ATOTrace

IDS = torch.tensor([[1, 8, 9, 30, 5, 7], [1, 40, 41, 6, 90, 11]])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def matrix():
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / 4


def test_every_site_equals_a_forward_hook(any_model):
    seen, logits = hook_residuals(any_model._module, IDS)
    with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
        embed = t.residual("embed").save()
        blocks = nnsight.save([t.residual(block) for block in range(BLOCKS)])
        got = t.logits.save()
    assert type(embed) is torch.Tensor
    torch.testing.assert_close(embed, seen["embed"], atol=1e-6, rtol=0)
    for block, value in enumerate(blocks):
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value, seen[block], atol=1e-6, rtol=0)
    torch.testing.assert_close(got, logits, atol=1e-6, rtol=0)


def test_capture_stops_early_and_equals_a_forward_hook(any_model):
    seen, _ = hook_residuals(any_model._module, IDS)
    ran = []
    blocks = next(m for m in any_model._module.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == BLOCKS)
    inside = next(child for child in blocks[-1].modules() if not list(child.children()))
    handle = inside.register_forward_hook(lambda *_: ran.append(True))
    got = capture(any_model, IDS, [ResidualSite.EMBED, ResidualSite(0), ResidualSite(2)])
    assert not ran
    handle.remove()
    torch.testing.assert_close(got, torch.stack([seen["embed"], seen[0], seen[2]]), atol=1e-6, rtol=0)


def test_padding_on_the_right_touches_no_real_token(any_model):
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    sites = [ResidualSite(block) for block in range(BLOCKS)]
    torch.testing.assert_close(capture(any_model, padded, sites)[:, :, :6], capture(any_model, IDS, sites), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_an_identity_edit_leaves_logits_bit_equal(any_model, block):
    with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
        clean = t.logits.save()
    with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
        t.transport(None, block, block)
        t.patch(block, t.residual(block), positions=[2])
        logits = t.logits.save()
    assert torch.equal(clean, logits)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_an_edit_equals_a_hook_and_changes_nothing_before_it(any_model, block):
    def zero(value, _):
        value = value.clone()
        value[:, [3, 4]] = 0
        return value

    _, clean = hook_residuals(any_model._module, IDS)
    seen, want = hook_residuals(any_model._module, IDS, {block: zero}.items())
    with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
        before = t.residual(block).save()
        t.patch(block, 0.0, positions=[3, 4])
        after = t.residual(block).save()
        logits = t.logits.save()
    assert not torch.equal(before, after)
    assert torch.equal(after, seen[block])
    assert torch.equal(logits, want)
    assert torch.equal(logits[:, :3], clean[:, :3])
    assert (logits[:, 3:] - clean[:, 3:]).abs().amax() > 1e-3


def test_transport_equals_a_hook(any_model, matrix):
    def move(value, seen):
        value = value.clone()
        value[:, [2, 5]] = (seen[0] @ matrix)[:, [2, 5]]
        return value

    _, want = hook_residuals(any_model._module, IDS, {2: move}.items())
    with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
        t.transport(lambda x: x @ matrix, 0, 2, positions=[2, -1])
        logits = t.logits.save()
    assert torch.equal(logits, want)
    with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
        t.patch(2, t.residual(0) @ matrix, positions=torch.tensor([2, 5]))
        patched = t.logits.save()
    assert torch.equal(patched, want)


def test_resume_equals_a_full_pass_with_that_residual(any_model):
    for block in range(BLOCKS):
        residual = capture(any_model, IDS, [ResidualSite(block)])[0]
        residual[:, 3] = 0.5
        with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
            t.patch(block, 0.5, positions=3)
            want = t.logits.save()
        with ATOTrace(any_model, input_ids=IDS, use_cache=False, logits_to_keep=torch.tensor([2, 3, 5])) as t:
            t.resume(block, residual)
            got = t.logits.save()
        torch.testing.assert_close(got, want[:, [2, 3, 5]], atol=1e-5, rtol=0)


def test_embed_can_be_patched(any_model):
    with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
        t.patch("embed", 0.0, positions=[4])
        embed, logits = t.residual("embed").save(), t.logits.save()
    _, clean = hook_residuals(any_model._module, IDS)
    assert torch.equal(embed[:, 4], torch.zeros(2, WIDTH))
    assert torch.equal(logits[:, :4], clean[:, :4])
    assert not torch.equal(logits[:, 4:], clean[:, 4:])


def test_sites_may_be_named_in_any_order(model):
    seen, _ = hook_residuals(model._module, IDS)
    with ATOTrace(model, input_ids=IDS, use_cache=False) as t:
        late = t.residual(3).save()
        t.patch(1, 0.0, positions=[2])
        early = t.residual(0).save()
        doubled = nnsight.save(t.residual(2) * 2)
    assert torch.equal(early, seen[0])
    assert not torch.equal(late, seen[3])
    assert torch.equal(late[:, :2], seen[3][:, :2])
    assert doubled.shape == late.shape


def test_editing_behind_a_used_value_is_refused(model):
    with pytest.raises(OutOfOrderError, match="site 1 has already passed"):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS) as t:
            norm = t.residual(3).norm()
            t.patch(1, norm)


def test_without_a_prompt_runs_share_queued_interventions(model):
    prompts = ["w1 w2 w3 w4", "w9 w8"]
    with ATOTrace(model) as t:
        t.transport(None, 0, 2, positions=[1])
        results = nnsight.save([t.run(prompt, read=[0, 2]) for prompt in prompts])
    for prompt, result in zip(prompts, results, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids

        def move(value, seen):
            value = value.clone()
            value[:, 1] = seen[0][:, 1]
            return value

        seen, want = hook_residuals(model._module, ids, {2: move}.items())
        torch.testing.assert_close(result["logits"], want, atol=1e-6, rtol=0)
        torch.testing.assert_close(result["residuals"][2], seen[2], atol=1e-6, rtol=0)


def test_without_a_prompt_invokes_make_one_batch(model):
    with ATOTrace(model) as t:
        with t.invoke("w1 w2 w3"):
            t.patch(1, 0.0, positions=[-1])
            first = t.logits.save()
        with t.invoke("w5 w6 w7 w8"):
            last = t.residual(3).save()
    ids = model.tokenizer("w5 w6 w7 w8", return_tensors="pt").input_ids
    seen, _ = hook_residuals(model._module, ids)
    torch.testing.assert_close(last, seen[3], atol=1e-5, rtol=0)
    assert first.shape[0] == 1


def test_a_prompt_of_text_works_and_the_model_stays_unedited(model):
    with ATOTrace(model, "w1 w2 w3") as t:
        clean = t.logits.save()
    with ATOTrace(model, "w1 w2 w3") as t:
        t.patch(0, 0.0)
        edited = t.logits.save()
    with ATOTrace(model, "w1 w2 w3") as t:
        again = t.logits.save()
    assert torch.equal(clean, again)
    assert not torch.equal(clean, edited)


def test_an_error_in_the_block_leaves_the_model_usable(model):
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS) as t:
            t.patch(0, 0.0)
            print(t.residual(1).norm() / 0, 1 // 0)
    _, clean = hook_residuals(model._module, IDS)
    with ATOTrace(model, input_ids=IDS, use_cache=False) as t:
        logits = t.logits.save()
    assert torch.equal(logits, clean)


@pytest.mark.parametrize("site", [4, "block", -1])
def test_unknown_sites_are_refused(model, site):
    with pytest.raises(SiteError):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS) as t:
            t.patch(0, 0.0)
            t.residual(site).save()


def test_transport_backwards_is_refused(model):
    with pytest.raises(SiteError, match="the source must not lie behind the target"):
        ATOTrace(model, input_ids=IDS).transport(None, 2, 1)


def test_reading_outside_a_pass_is_refused(model):
    with pytest.raises(SiteError, match="give ATOTrace a prompt"):
        ATOTrace(model, input_ids=IDS).residual(1)


@pytest.mark.parametrize("positions", [3, [3], np.int64(3), torch.tensor(3), torch.tensor([3]), slice(3, 4), range(3, 4), (-3,)])
def test_positions_may_be_given_in_many_ways(model, positions):
    with ATOTrace(model, input_ids=IDS) as t:
        before = t.residual(1).save()
        t.patch(1, 0.0, positions=positions)
        after = t.residual(1).save()
    assert torch.nonzero((before != after).any(dim=2).any(dim=0)).flatten().tolist() == [3]


@pytest.mark.parametrize("positions", [torch.tensor([False] * 5 + [True]), [], slice(50, 60), torch.zeros(2, 2, dtype=torch.int64)])
def test_masks_and_empty_positions_are_refused(model, positions):
    with pytest.raises(PositionError, match="give indices, not a mask|name none of the 6 tokens"):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS) as t:
            t.patch(1, 0.0, positions=positions)
            t.logits.save()


def test_the_serverless_dry_run_of_nnsight_gives_the_same(model):
    """`remote="local"` serialises the block and runs it with this package hidden, as nnsight ships it to a server."""
    model.to_model_key = lambda: "in-memory"
    results = []
    for remote in (False, "local"):
        with ATOTrace(model, input_ids=IDS, remote=remote) as t:
            late = t.residual(3).save()
            t.transport(None, 0, 2, positions=[3])
            logits = t.logits.save()
        results.append((late, logits))
    assert all(torch.equal(here, there) for here, there in zip(*results, strict=True))
    assert type(results[1][0]) is torch.Tensor


@pytest.mark.parametrize("position", [6, -7])
def test_positions_outside_are_refused(model, position):
    with pytest.raises(PositionError, match=f"position {position} lies outside the sequence of 6 tokens"):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS) as t:
            t.patch(1, 0.0, positions=[position])
            t.logits.save()


def test_without_prompt_or_run_says_what_is_missing(model):
    with pytest.raises(ValueError, match=r"needs t\.run"):  # noqa: SIM117
        with ATOTrace(model) as t:
            t.patch(1, 0.0)


def test_resume_from_embed_is_refused(model):
    with pytest.raises(SiteError, match="resume from 'embed'"):
        ATOTrace(model, input_ids=IDS).resume("embed", torch.zeros(2, 6, WIDTH))


# ---- named interventions ---------------------------------------------------------------------------------------------------------------


def test_named_interventions_equal_hooks(any_model):
    operator, mean = make_operator(0, 2), torch.linspace(-1, 1, WIDTH)
    named = {
        "mean of a tensor": (lambda t: t.mean(2, mean, [2, 3]), put([2, 3], mean)),
        "mean of an operator": (lambda t: t.mean(2, operator, [2, 3]), put([2, 3], operator.target_mean)),
        "mean at its source": (lambda t: t.mean(0, operator, [2, 3]), put([2, 3], operator.source_mean)),
        "zero": (lambda t: t.zero(2, slice(1, None)), put(slice(1, None), 0.0)),
        "identity": (lambda t: t.identity(0, 2, [-1]), put([5], lambda seen: seen[0])),
        "transport": (lambda t: t.transport(operator, positions=[1, 4]), put([1, 4], lambda seen: operator(seen[0]))),
        "transport to elsewhere": (
            lambda t: t.transport(operator, target=2, source="embed"),
            put(slice(None), lambda seen: operator(seen["embed"])),
        ),
    }
    for name, (ask, edit) in named.items():
        _, want = hook_residuals(any_model._module, IDS, {0 if name == "mean at its source" else 2: edit}.items())
        with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
            ask(t)
            logits = t.logits.save()
        torch.testing.assert_close(logits, want, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_a_mean_of_another_site_is_refused(model):
    for mean in (make_operator(0, 3), None, "mean"):
        with pytest.raises(OperatorError, match="no mean of site 2: give a tensor"):
            ATOTrace(model, input_ids=IDS).mean(2, mean)


def test_a_map_without_sites_needs_them(model):
    with pytest.raises(SiteError, match="transport needs a source and a target"):
        ATOTrace(model, input_ids=IDS).transport(torch.relu, target=2)


@pytest.mark.parametrize("shape", [(WIDTH + 1,), (3, WIDTH), (5, 2, WIDTH), (1, 2, 2, WIDTH)])
def test_values_that_do_not_fit_are_refused(model, shape):
    with pytest.raises(ActivationError, match=r"a value of shape .* does not fit \(2, 2, 16\) at site 1$"):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS) as t:
            t.patch(1, torch.zeros(shape), positions=[1, 2])
            t.logits.save()


# ---- generation ------------------------------------------------------------------------------------------------------------------------

STEPS = 4
LENGTH = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
VECTORS = torch.randn(3, 1, 1, WIDTH, generator=torch.Generator().manual_seed(9))


def vectors(x, _):
    return torch.cat([x[:, :2], *VECTORS[:1].expand(-1, 2, -1, -1), x[:, 3:7], *VECTORS[1:].expand(-1, 2, -1, -1)], dim=1)[:, : x.shape[1]]


def nothing_yet(x, seen):
    return put(slice(6, None), 0.0)(x, seen) if x.shape[1] > 6 else x


ASKED = {
    "nothing": (lambda t, operator: None, lambda operator: {}),
    "transport everywhere": (
        lambda t, operator: t.transport(operator),
        lambda operator: {2: put(slice(None), lambda seen: operator(seen[0]))},
    ),
    "zero in the prompt": (lambda t, operator: t.zero(1, [1, -2]), lambda operator: {1: put([1, 4], 0.0)}),
    "identity from the prompt's end on": (
        lambda t, operator: t.identity(0, 2, slice(-1, None)),
        lambda operator: {2: put(slice(5, None), lambda seen: seen[0])},
    ),
    "vectors in prompt and answer": (lambda t, operator: t.patch(1, VECTORS[:, 0, 0], [2, 7, 8]), lambda operator: {1: vectors}),
    "a function everywhere": (lambda t, operator: t.patch(3, torch.neg), lambda operator: {3: lambda x, _: -x}),
    "embeddings of the answer": (lambda t, operator: t.zero("embed", slice(6, None)), lambda operator: {"embed": nothing_yet}),
    "two edits": (
        lambda t, operator: (t.mean(1, operator.target_mean, [7]), t.transport(operator, positions=slice(5, 8))),
        lambda operator: {1: put([7], operator.target_mean), 2: put(slice(5, 8), lambda seen: operator(seen[0]))},
    ),
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", list(ASKED))
def test_edits_act_at_every_step_of_a_generation(any_model, name, cache):
    operator = make_operator(0, 2)
    ask, edits = ASKED[name]
    want = hook_generate(any_model._module, IDS, edits(operator).items(), STEPS)
    with ATOTrace(any_model, input_ids=IDS, use_cache=cache, **LENGTH) as t:
        ask(t, operator)
        ids = t.result.save()
    assert torch.equal(ids, want)
    assert name == "nothing" or not torch.equal(ids, hook_generate(any_model._module, IDS, (), STEPS))


def test_a_generation_ends_without_warnings_and_leaves_the_model_as_it_was(model):
    with ATOTrace(model, input_ids=IDS) as t:
        clean = t.logits.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ATOTrace(model, input_ids=IDS, **LENGTH) as t:
            t.zero(2)
            t.identity(0, 1)
    with ATOTrace(model, input_ids=IDS) as t:
        assert torch.equal(t.logits, clean)
        again = t.logits.save()
    assert torch.equal(again, clean)


def test_reads_of_a_generation_are_those_of_its_first_step_or_of_the_step_of_a_loop(any_model):
    ids = hook_generate(any_model._module, IDS, {2: put(slice(None), 0.5)}.items(), STEPS)
    seen, logits = hook_residuals(any_model._module, ids[:, :-1], {2: put(slice(None), 0.5)}.items())
    with ATOTrace(any_model, input_ids=IDS, **LENGTH) as t:
        t.patch(2, 0.5)
        first = t.residual(3).save()
        last = t.logits[:, -1].save()
    torch.testing.assert_close(first, seen[3][:, :6], atol=1e-5, rtol=0)
    torch.testing.assert_close(last, logits[:, 5], atol=1e-5, rtol=0)
    with ATOTrace(any_model, input_ids=IDS, **LENGTH) as t:
        t.patch(2, 0.5)
        steps = nnsight.save([])
        for _ in t.iter[:STEPS]:
            early = t.residual(1) + 0
            steps.append((early, t.residual(3), t.logits[:, -1]))
    for number, (early, late, last) in enumerate(steps):
        here = slice(0, 6) if number == 0 else slice(5 + number, 6 + number)
        torch.testing.assert_close(early, seen[1][:, here], atol=1e-5, rtol=0)
        torch.testing.assert_close(late, seen[3][:, here], atol=1e-5, rtol=0)
        torch.testing.assert_close(last, logits[:, 5 + number], atol=1e-5, rtol=0)
        assert type(late) is torch.Tensor


def test_edits_in_a_loop_act_in_their_step(model):
    want = hook_generate(model._module, IDS, {1: put([7], 0.0), 2: put([0], 1.0)}.items(), STEPS)
    with ATOTrace(model, input_ids=IDS, **LENGTH) as t:
        for step in t.iter[:STEPS]:
            if step == 2:
                t.zero(1, [0])  # the second new token
            if step == 0:
                t.patch(2, t.residual(2) * 0 + 1, [0])
        ids = t.result.save()
    assert torch.equal(ids, want)


def test_an_open_loop_ends_with_the_generation(model):
    want = hook_generate(model._module, IDS, {1: put(slice(None), 0.0)}.items(), STEPS)
    with pytest.warns(UserWarning, match="was never reached"):  # noqa: PT031, SIM117
        with ATOTrace(model, **LENGTH) as t:
            with t.invoke(input_ids=IDS):
                steps = nnsight.save([])
                for step in t.iter[:]:
                    t.zero(1)
                    steps.append(step)
            with t.invoke():
                ids = t.result.save()
    assert steps[:STEPS] == list(range(STEPS))
    assert torch.equal(ids, want)


@pytest.mark.parametrize("how", [{"num_beams": 2, "do_sample": False}, {"do_sample": True}])
def test_beams_and_samples_are_edited_as_by_hooks_on_generate(any_model, how):
    blocks = next(m for m in any_model._module.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == BLOCKS)
    passed = 0

    def negate(_, __, output):  # from the prompt's last token on
        nonlocal passed
        value = output[0] if isinstance(output, tuple) else output
        value = value.clone()
        value[:, max(0, 5 - passed) :] *= -1
        passed += value.shape[1]
        return (value, *output[1:]) if isinstance(output, tuple) else value

    options = {**LENGTH, **how}
    handle = blocks[1].register_forward_hook(negate)
    torch.manual_seed(0)
    want = any_model._module.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    handle.remove()
    torch.manual_seed(0)
    with ATOTrace(any_model, input_ids=IDS, **options) as t:
        t.patch(1, torch.neg, slice(-1, None))
        ids = t.result.save()
    torch.manual_seed(0)
    clean = any_model._module.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(ids, want)
    assert not torch.equal(ids, clean)


def test_runs_generate_too(model):
    want = hook_generate(model._module, IDS, {1: put(slice(None), 0.0)}.items(), STEPS)
    with ATOTrace(model, max_new_tokens=STEPS) as t:
        t.zero(1)
        results = nnsight.save([t.run(input_ids=IDS, min_new_tokens=STEPS, do_sample=False, read=[0])])
    assert torch.equal(results[0]["ids"], want)
    assert results[0]["residuals"][0].shape == (2, 6, WIDTH)
    with ATOTrace(model) as t:
        t.zero(1)
        results = nnsight.save([t.run(input_ids=IDS, **LENGTH), t.run(input_ids=IDS, use_cache=False)])
    assert torch.equal(results[0]["ids"], want)
    assert torch.equal(results[1]["logits"], hook_residuals(model._module, IDS, {1: put(slice(None), 0.0)}.items())[1])


def test_invokes_of_a_generation_are_edited_apart(model):
    ids = model.tokenizer("w3 w4 w5 w6 w7", return_tensors="pt").input_ids
    want = [hook_generate(model._module, ids, edits, STEPS) for edits in ((), {1: put(slice(None), 0.0)}.items())]
    with ATOTrace(model, **LENGTH) as t:
        with t.invoke("w3 w4 w5 w6 w7"):
            x = t.residual(1).save()
        with t.invoke("w3 w4 w5 w6 w7"):
            t.zero(1)
            y = t.residual(1).save()
        with t.invoke():
            both = t.result.save()
    assert x.any()
    assert not y.any()
    assert torch.equal(both, torch.cat(want))


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda t: t.zero(1, [6 + STEPS - 1]), PositionError, "position 9 lies outside the sequence of 9 tokens"),
        (lambda t: t.zero(1, [-7]), PositionError, "position -7 lies outside the sequence of 9 tokens"),
        (lambda t: t.zero(1, slice(9, None)), PositionError, "name none of the 9 tokens"),
        (lambda t: t.patch(2, t.residual(0)), ActivationError, "does not fit .* at step 1; transport reads anew at every step"),
        (lambda t: (t.residual(2).sum(), t.zero(3)), OutOfOrderError, "ask for edits before a value is used"),
        (lambda t: t.resume(1, torch.zeros(2, 6, WIDTH)), ValueError, "cannot be used in generation"),
    ],
)
def test_what_a_generation_cannot_do_is_refused(model, ask, error, message):
    with pytest.raises(error, match=message):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS, **LENGTH) as t:
            ask(t)


# ---- persistent edits ------------------------------------------------------------------------------------------------------------------


def test_persistent_edits_act_until_removed_and_leave_no_trace(any_model):
    operator, module = make_operator(0, 2), any_model._module

    def logits():
        with ATOTrace(any_model, input_ids=IDS, use_cache=False) as t:
            found = t.logits.save()
        return found

    clean = logits()
    asked = ATOTrace(any_model)
    asked.transport(operator, positions=[2, -1])
    edit = asked.persist()
    _, want = hook_residuals(module, IDS, {2: put([2, 5], lambda seen: operator(seen[0]))}.items())
    torch.testing.assert_close(logits(), want, atol=1e-6, rtol=0)
    with any_model.trace(input_ids=IDS, use_cache=False):
        plain = any_model.output.logits.save()
    torch.testing.assert_close(plain, want, atol=1e-6, rtol=0)

    more = ATOTrace(any_model)
    more.zero(1)
    with more.persist():
        edits = {1: put(slice(None), 0.0), 2: put([2, 5], lambda seen: operator(seen[0]))}
        torch.testing.assert_close(logits(), hook_residuals(module, IDS, edits.items())[1], atol=1e-6, rtol=0)
        ids = any_model.generate(input_ids=IDS, **LENGTH)
        assert torch.equal(ids, hook_generate(module, IDS, edits.items(), STEPS))
    torch.testing.assert_close(logits(), want, atol=1e-6, rtol=0)
    edit.remove()
    edit.remove()
    assert torch.equal(logits(), clean)
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with edit_of_everything(any_model):
            assert not torch.equal(logits(), clean)
            print(1 // 0)
    assert torch.equal(logits(), clean)
    assert not any_model._edits


def edit_of_everything(model):
    asked = ATOTrace(model)
    asked.zero(0)
    return asked.persist()


def test_a_persistent_edit_at_positions_acts_on_prompts_of_any_length(model):
    asked = ATOTrace(model)
    asked.zero(1, slice(3, None))
    with asked.persist():
        for ids in (IDS[:, :2], IDS):
            _, want = hook_residuals(model._module, ids, {1: put(slice(3, None), 0.0)}.items())
            with ATOTrace(model, input_ids=ids, use_cache=False) as t:
                logits = t.logits.save()
            torch.testing.assert_close(logits, want, atol=1e-6, rtol=0)
        ids = model.generate(input_ids=IDS[:, :2], **LENGTH)
        assert torch.equal(ids, hook_generate(model._module, IDS[:, :2], {1: put(slice(3, None), 0.0)}.items(), STEPS))


def test_a_pass_that_stops_before_a_persistent_edit_is_no_error(model):
    asked = ATOTrace(model)
    asked.zero(1)
    asked.zero(3)
    with asked.persist():
        got = capture(model, IDS, [ResidualSite(0), ResidualSite(2)])
    seen, _ = hook_residuals(model._module, IDS, {1: put(slice(None), 0.0)}.items())
    torch.testing.assert_close(got, torch.stack([seen[0], seen[2]]), atol=1e-6, rtol=0)


def test_an_error_of_a_persistent_edit_is_raised_where_it_acts(model):
    asked = ATOTrace(model)
    asked.zero(1, [4])
    with asked.persist(), pytest.raises(PositionError, match="position 4 lies outside the sequence of 2 tokens"):  # noqa: SIM117
        with ATOTrace(model, input_ids=IDS[:, :2]) as t:
            t.logits.save()
    with ATOTrace(model, input_ids=IDS[:, :2], use_cache=False) as t:
        logits = t.logits.save()
    assert torch.equal(logits, hook_residuals(model._module, IDS[:, :2])[1])


def test_nothing_to_persist_is_refused(model):
    with pytest.raises(ValueError, match="persist keeps what was asked for"):
        ATOTrace(model).persist()
    t = ATOTrace(model)
    t.resume(1, torch.zeros(2, 6, WIDTH))
    with pytest.raises(ValueError, match="it cannot persist"):
        t.persist()
    t = ATOTrace(model, input_ids=IDS)
    t.zero(1)
    with t:
        t.logits.save()
    with pytest.raises(ValueError, match="on a trace that has not run"):
        t.persist()


# ---- prompts, and where a block may stand ----------------------------------------------------------------------------------------------


def test_ragged_prompts_are_padded_on_the_left_and_masked(any_model):
    prompts = ["w1 w2 w3 w4 w5 w6", "w9 w8", "w30 w31 w32 w33"]
    batch = any_model.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    mask = batch.attention_mask
    seen, want = hook_residuals(
        any_model._module,
        batch.input_ids,
        {1: put([-1 % 7], 0.0)}.items(),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
    )
    with ATOTrace(any_model, prompts, use_cache=False) as t:
        t.zero(1, -1)
        x, logits = t.residual(2).save(), t.logits.save()
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(x[mask.bool()], seen[2][mask.bool()], atol=1e-5, rtol=0)
    for row, prompt in enumerate(prompts):  # padding changes nothing that is no padding
        with ATOTrace(any_model, prompt) as t:
            t.zero(1, -1)
            alone = t.logits.save()
        torch.testing.assert_close(logits[row : row + 1][:, mask[row].bool()], alone, atol=1e-4, rtol=0)


def test_ragged_prompts_generate_what_they_do_alone(any_model):
    prompts, operator = ["w1 w2 w3 w4 w5 w6", "w9 w8"], make_operator(0, 2)
    with ATOTrace(any_model, prompts, **LENGTH) as t:
        t.transport(operator, positions=slice(-1, None))
        ids = t.result.save()
    for row, prompt in enumerate(prompts):
        alone = any_model.tokenizer(prompt, return_tensors="pt").input_ids
        edits = {2: put(slice(alone.shape[1] - 1, None), lambda seen: operator(seen[0]))}
        assert torch.equal(ids[row, -STEPS:], hook_generate(any_model._module, alone, edits.items(), STEPS)[0, -STEPS:])


def read_in_a_function(model, site, ids):
    with ATOTrace(model, input_ids=ids, use_cache=False) as t:
        t.zero(1, [2])
        value = t.residual(site).save()
    return value


def test_functions_loops_and_coroutines(model):
    seen, _ = hook_residuals(model._module, IDS, {1: put([2], 0.0)}.items())
    for site in range(BLOCKS):
        torch.testing.assert_close(read_in_a_function(model, site, IDS), seen[site], atol=1e-6, rtol=0)

    async def wait_and_read(site):
        await asyncio.sleep(0)
        with ATOTrace(model, input_ids=IDS, use_cache=False) as t:
            t.zero(1, [2])
            value = t.residual(site).save()
        await asyncio.sleep(0)
        return value

    async def both():
        return await asyncio.gather(wait_and_read(3), wait_and_read(0))

    late, early = asyncio.run(both())
    torch.testing.assert_close(late, seen[3], atol=1e-6, rtol=0)
    torch.testing.assert_close(early, seen[0], atol=1e-6, rtol=0)


def test_cells_of_a_notebook(model):
    shell = InteractiveShell.instance()
    shell.user_ns.update(model=model, ids=IDS)
    cells = (
        "from nnato import ATOTrace",
        "with ATOTrace(model, input_ids=ids, use_cache=False) as t:\n    t.zero(1, [2])\n    x = t.residual(3).save()",
        "%time None\nfor site in (0, 2):\n    with ATOTrace(model, input_ids=ids) as t:\n        y = t.residual(site).save()",
    )
    for cell in cells:
        shell.run_cell(cell).raise_error()
    seen, _ = hook_residuals(model._module, IDS, {1: put([2], 0.0)}.items())
    torch.testing.assert_close(shell.user_ns["x"], seen[3], atol=1e-6, rtol=0)
    torch.testing.assert_close(shell.user_ns["y"], hook_residuals(model._module, IDS)[0][2], atol=1e-6, rtol=0)
    InteractiveShell.clear_instance()


def test_capture_runs_the_named_blocks_only_and_no_head(any_model, monkeypatch):
    """What computes is counted: blocks up to the last site, and no product with the weights of the head."""
    module, ids = any_model._module, torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]])
    blocks = next(m for m in module.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == BLOCKS)
    ran, heads = [], []
    for number, block in enumerate(blocks):
        inner = next(part for part in block.modules() if "Linear" in type(part).__name__ or "Conv1D" in type(part).__name__)
        inner.register_forward_hook(lambda *_, number=number: ran.append(number))
    linear, head = torch.nn.functional.linear, module.get_output_embeddings().weight

    def counted(x, weight, bias=None):
        heads.extend([1] * (weight is head))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    for last in (0, BLOCKS - 2, BLOCKS - 1):
        ran.clear()
        got = capture(any_model, ids, [ResidualSite.EMBED, ResidualSite(last)])
        assert ran == list(range(last + 1))
        assert not heads
        seen, _ = hook_residuals(module, ids)
        assert heads.pop()  # the reference runs it
        assert torch.equal(got, torch.stack([seen["embed"], seen[last]]))


@pytest.mark.parametrize("said", ["GreenletExit", "ValueError"])
def test_a_stopped_pass_does_not_warn_of_its_end_and_other_warnings_show(saved_model, said):
    """In a process of its own, since pytest has filters of its own."""
    script = (
        "import sys, warnings\n"
        "from nnato import ATOTrace, load_model\n"
        "model, said = load_model(sys.argv[1]), sys.argv[2]\n"
        "def stop(*_):\n"
        "    raise KeyboardInterrupt\n"
        "model._module.model.layers[2].register_forward_hook(stop)\n"
        "try:\n"
        "    with ATOTrace(model, 'w1 w2 w3') as trace:\n"
        "        trace.residual(3).clone().save()\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped')\n"
        "if said != 'GreenletExit':\n"
        "    warnings.warn(f'An intervention block raised {said}() while it was being unwound')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(saved_model), said], capture_output=True, text=True, check=True)
    assert done.stdout == "stopped\n"
    assert ("UserWarning" in done.stderr) == (said == "ValueError")
