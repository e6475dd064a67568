"""Two threads at once, each with a model of its own; and a model after a trace that raised."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import hook_residuals, make_module

from nnato.accumulation import accumulate
from nnato.models import wrap
from nnato.trace import ATOTrace, save

ROUNDS = 25


def trace_again_and_again(model, ids, scale, found, errors):
    try:
        for _ in range(ROUNDS):
            with ATOTrace(model, input_ids=ids, use_cache=False) as t:
                before = save(t.residual(1))
                t.patch(2, t.residual(0) * scale, positions=[3])
                after = save(t.residual(2))
                logits = save(t.logits)
            found.append((before, after, logits))
    except Exception as error:  # noqa: BLE001 - the main thread looks at it
        errors.append(error)


def test_two_threads_trace_two_models(tokenizer):
    """Reads, edits and logits of each are those of a run on its own, in every round."""
    models = [wrap(make_module(name, seed=seed), tokenizer) for name, seed in (("gemma2", 0), ("llama", 1))]
    ids = [torch.randint(5, 40, (1, length), generator=torch.Generator().manual_seed(length)) for length in (9, 14)]
    alone: list[list[tuple[torch.Tensor, ...]]] = [[], []]
    together: list[list[tuple[torch.Tensor, ...]]] = [[], []]
    errors: list[Exception] = []
    for number in range(2):
        trace_again_and_again(models[number], ids[number], number + 2.0, alone[number], errors)
    threads = [
        threading.Thread(target=trace_again_and_again, args=(models[number], ids[number], number + 2.0, together[number], errors))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(2):
        assert len(together[number]) == ROUNDS
        for one in together[number]:
            assert all(torch.equal(got, want) for got, want in zip(one, alone[number][0], strict=True))
        residuals, _ = hook_residuals(models[number]._module, ids[number])
        torch.testing.assert_close(together[number][0][0], residuals[1], atol=1e-6, rtol=0)


def test_two_threads_accumulate_two_models(tokenizer, corpus):
    pairs = [(0, 1), (0, 3)]
    models = [wrap(make_module(name, seed=seed), tokenizer) for name, seed in (("gemma2", 0), ("llama", 1))]
    alone = [accumulate(model, corpus, pairs).moments.of("train") for model in models]
    found: dict[int, torch.Tensor] = {}

    def run(number):
        found[number] = accumulate(models[number], corpus, pairs).moments.of("train").scatter

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number].scatter) for number in range(2))


@pytest.mark.parametrize("where", ["before", "between", "within an edit"])
def test_a_trace_that_raises_leaves_the_model_as_it_was(tokenizer, where):
    model = wrap(make_module("gemma2"), tokenizer)
    ids = torch.randint(5, 40, (1, 8), generator=torch.Generator().manual_seed(0))
    _, want = hook_residuals(model._module, ids)

    def fail(residual):
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"), ATOTrace(model, input_ids=ids, use_cache=False) as t:
        if where == "before":
            fail(None)
        t.zero(1)
        if where == "within an edit":
            t.patch(2, fail)
        save(torch.clone(t.residual(2)))
        fail(None)
    with ATOTrace(model, input_ids=ids, use_cache=False) as t:
        logits = save(t.logits)
    assert torch.equal(logits, want)
    assert torch.equal(model._module(input_ids=ids, use_cache=False).logits, want)
