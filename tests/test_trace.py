"""ATOTrace against plain forward hooks, on five architectures. Also holds the private names of nnsight that it uses."""

from __future__ import annotations

import nnsight
import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH, hook_residuals
from nnsight.intervention.interleaver import OutOfOrderError

from nnato.accumulation import capture
from nnato.errors import PositionError, SiteError
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
