"""Edits as data, chains, features, controls, and positions by class and activity, against forward hooks and plain numpy."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import WIDTH, hook_residuals, make_module, make_operator, supply
from safetensors.torch import save_file

from nnato import losses
from nnato.accumulation import accumulate
from nnato.controls import controls_of, subspaces_of
from nnato.edits import INTERVENTIONS, EditRecord, Supplies, intervention, read_directions, span, truncate
from nnato.errors import FileFormatError, MomentsError, OperatorError, PositionError
from nnato.fitting import fit
from nnato.losses import replaced
from nnato.models import wrap
from nnato.perplexity import ablate
from nnato.selection import Method
from nnato.trace import ATOTrace


def sequences_of(model, corpus, count):
    blocks = corpus.tokenize(model.tokenizer)
    rows = blocks.full_blocks("test", count)
    return [blocks.batch([row]).ids for row in rows]


def losses_of(module, ids, edits):
    logits = hook_residuals(module, ids, edits.items())[1][0, :-1].double()
    return -torch.log_softmax(logits, -1)[torch.arange(len(logits)), ids[0, 1:]]


def affine(operator, x):
    return ((x.double() - operator.source_mean) @ operator.weight + operator.target_mean).float()


# ---- several sites in one pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 3)], [(0, 1), (0, 2)], [(0, 2), (1, 3)], [("embed", 0), (0, 1), (1, 2)]])
def test_a_chain_equals_hooks_at_every_site(any_model, corpus, pairs):
    operators = [make_operator(*pair) for pair in pairs]
    names = ("transport", "identity", "steer", "features", "resample", "moved_error", "zero")
    given, extra = supply(*(operator.pair for operator in operators))
    given = {name: given[name] for name in ("features", "steering")}
    result = ablate(any_model, operators[::-1], corpus, positions=3, interventions=names, sequences=2, chain=True, **given)[0]
    assert result.pair == (operators[0].source, operators[-1].target)
    assert [list(map(str, pair)) for pair in result.chain] == [list(map(str, pair)) for pair in pairs]
    projector = torch.linalg.pinv(extra["D"]) @ extra["D"]
    ids = sequences_of(any_model, corpus, 2)
    donors = [hook_residuals(any_model._module, one)[0] for one in ids[::-1]]
    for name in names:
        want = []
        for one, donor, edited in zip(ids, donors, result.edited, strict=True):
            others = [(p - 1 + 15) % 31 + 1 for p in edited]

            def edit(operator, donor=donor, edited=edited, others=others, name=name):
                def act(y, seen):
                    x = seen[operator.source.key]
                    y = y.clone()
                    predicted = affine(operator, x)
                    y[0, edited] = {
                        "transport": lambda: predicted[0, edited],
                        "identity": lambda: x[0, edited],
                        "steer": lambda: y[0, edited] + extra["vector"].float(),
                        "features": lambda: (y[0, edited].double() + (predicted - y)[0, edited].double() @ projector).float(),
                        "resample": lambda: donor[operator.target.key][0, edited],
                        "moved_error": lambda: y[0, edited] + (predicted - y)[0, others],
                        "zero": lambda: torch.zeros(len(edited), WIDTH),
                    }[name]()
                    return y

                return act

            edits = {operator.target.key: edit(operator) for operator in operators}
            delta = losses_of(any_model._module, one, edits) - losses_of(any_model._module, one, {})
            want.append((float(delta[edited[0] :].mean()), float(delta[edited].mean())))
        np.testing.assert_allclose(result.effects[name].per_sequence[:, :2], want, atol=3e-5, err_msg=name)
    assert result.effects["transport"].edit.pairs == tuple((operator.source.key, operator.target.key) for operator in operators)


def test_a_chain_edits_each_target_once(model, corpus):
    with pytest.raises(OperatorError, match="a chain edits each target once"):
        ablate(model, [make_operator(0, 2), make_operator(1, 2)], corpus, chain=True)


# ---- identity and features ---------------------------------------------------------------------------------------------


def test_an_edit_that_puts_back_what_was_there_changes_nothing(any_model, corpus):
    """Adding zero: the losses have the same bits as those of a full pass."""
    arguments = {"steering": torch.zeros(WIDTH), "interventions": ["steer"], "sequences": 3}
    for positions in (3, "all"):
        effect = ablate(any_model, [make_operator(0, 1)], corpus, positions=positions, **arguments)[0].effects["steer"]
        assert abs(effect.delta_loss.value) < 1e-6
        assert effect.agreement.value == 1
        assert effect.sign_test > 0.2
    ids = sequences_of(any_model, corpus, 2)[0]
    with ATOTrace(any_model, input_ids=ids, use_cache=False) as t:
        clean = t.logits.save()
    with ATOTrace(any_model, input_ids=ids, use_cache=False) as t:
        t.patch(1, lambda y: y + 0.0, positions=[3, 5])
        logits = t.logits.save()
    assert torch.equal(logits, clean)


def test_a_feature_edit_moves_its_directions_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    x, y = (10 * torch.randn(9, WIDTH, generator=generator) for _ in range(2))
    directions = torch.randn(3, WIDTH, generator=generator)
    operator = make_operator(0, 2)
    way = intervention("features", operator, Supplies(features=directions))
    at = [1, 4, 5]
    new = replaced(way, x, y, at, [2, 2, 2], None)
    want = affine(operator, x).double() @ directions.double().T  # activities are those of the prediction
    torch.testing.assert_close(new @ directions.double().T, want[at], atol=1e-4, rtol=1e-6)
    complement = torch.linalg.svd(directions.double())[2][3:]
    assert float(((new - y[at].double()) @ complement.T).abs().max()) < 1e-6
    assert float(((new.float().double() - y[at].double()) @ complement.T).abs().max() / y.abs().max()) < 1e-6  # as the model gets it


def test_directions_that_cannot_be_used_are_refused():
    with pytest.raises(OperatorError, match=r"directions of shape \(3, 4\): give \(directions, 16\), at most 16 of them"):
        span(torch.ones(3, 4), 16)
    with pytest.raises(OperatorError, match="2 directions span 1 dimensions only"):
        span(torch.ones(2, 16), 16)
    with pytest.raises(OperatorError, match="not finite"):
        span(torch.full((1, 16), float("nan")), 16)


def test_directions_are_read_from_safetensors(tmp_path):
    directions = torch.randn(2, WIDTH)
    save_file({"directions": directions, "other": torch.zeros(1)}, tmp_path / "two.safetensors")
    assert torch.equal(read_directions(tmp_path / "two.safetensors"), directions)
    save_file({"W_dec": directions[0].clone()}, tmp_path / "one.safetensors")
    assert torch.equal(read_directions(tmp_path / "one.safetensors"), directions[:1])
    save_file({"a": directions, "b": directions.clone()}, tmp_path / "which.safetensors")
    with pytest.raises(FileFormatError, match="call the one to use 'directions'"):
        read_directions(tmp_path / "which.safetensors")
    save_file({"a": torch.ones(2, 2, 2)}, tmp_path / "cube.safetensors")
    with pytest.raises(FileFormatError, match=r"the tensor has shape \(2, 2, 2\)"):
        read_directions(tmp_path / "cube.safetensors")
    (tmp_path / "hostile.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(FileFormatError, match="is damaged or not a safetensors file"):
        read_directions(tmp_path / "hostile.safetensors")
    with pytest.raises(FileFormatError, match="does not exist"):
        read_directions(tmp_path / "nothing")


# ---- edits are data ----------------------------------------------------------------------------------------------------


def test_edits_are_stored_with_results_and_read_back(model, corpus):
    operator = make_operator(0, 2)
    given, _ = supply(operator.pair)
    names = (*INTERVENTIONS, "rank_2")
    result = ablate(model, [operator], corpus, interventions=names, sequences=2, seeds=2, **given)[0]
    for name, effect in result.effects.items():
        record = json.loads(json.dumps(effect.to_json()["edit"]))
        assert EditRecord.from_json(record) == effect.edit
        assert (effect.edit.intervention, effect.edit.pairs, effect.edit.seeds) == (name, ((0, 2),), (0, 1))
    other = dataclasses.replace(operator, weight=operator.weight * (1 + 1e-12))
    again = ablate(model, [other], corpus, interventions=names, sequences=2, seeds=2, **given)[0]
    changed = {name for name in names if again.effects[name].edit != result.effects[name].edit}
    assert changed == {"transport", "null_input", "rotated", "moved_error", "features", "lts", "lts_complement"}
    with pytest.raises(FileFormatError, match="an edit has the entries digest, intervention"):
        EditRecord.from_json({"intervention": "zero"})


@pytest.mark.parametrize(
    "change",
    [{"pairs": [1, [2]]}, {"pairs": [[1]]}, {"pairs": [[None, 2]]}, {"digest": "ab"}, {"seeds": [0.5]}, {"rank": "1"}, {"intervention": 3}],
)
def test_edits_with_strange_entries_are_refused(change):
    record = EditRecord("transport", ((1, 2),), ("ab",), None, "5", (0,)).to_json()
    assert EditRecord.from_json(record).to_json() == record
    with pytest.raises(FileFormatError, match="an edit has an entry of another type"):
        EditRecord.from_json(record | change)


# ---- positions ---------------------------------------------------------------------------------------------------------


def test_draws_are_averaged_within_each_sequence(model, corpus):
    operator = make_operator(0, 2)
    arguments = {"sequences": 3, "interventions": ("transport", "zero"), "positions": 3}
    both = ablate(model, [operator], corpus, seeds=2, **arguments)[0]
    each = [ablate(model, [operator], corpus, seed=seed, **arguments)[0] for seed in (0, 1)]
    assert both.drawn == [one.edited for one in each]
    for name in ("transport", "zero"):
        mean = sum(one.effects[name].per_sequence for one in each) / 2
        np.testing.assert_allclose(both.effects[name].per_sequence, mean, atol=1e-7)
        assert both.effects[name].log_perplexity == pytest.approx(np.mean([one.effects[name].log_perplexity for one in each]))
    record = both.to_json()
    assert record["edited_positions"] == each[0].edited
    assert [draw["seed"] for draw in record["draws"]] == record["seeds"] == [0, 1]
    assert record["tokens"] == 3 * 32


def test_positions_by_activity_are_those_of_hooks(model, corpus):
    direction = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5))
    ids = sequences_of(model, corpus, 4)
    strength = [(hook_residuals(model._module, one)[0][2][0] @ direction[0]) for one in ids]
    threshold = float(torch.stack(strength)[:, 1:31].flatten().sort().values[-20:-18].mean())  # between two tokens
    result = ablate(model, [make_operator(0, 2)], corpus, positions=f"active>{threshold!r}", features=direction, sequences=4)[0]
    assert result.edited == [[p for p in range(1, 31) if one[p] > threshold] for one in strength]
    with pytest.raises(PositionError, match="give its directions as features"):
        ablate(model, [make_operator(0, 2)], corpus, positions="active>1", sequences=4)
    with pytest.raises(OperatorError, match="neither the intervention features nor positions active>… use them"):
        ablate(model, [make_operator(0, 2)], corpus, features=direction, sequences=4)


def test_sequences_without_such_a_token_are_counted_and_left_as_they_are(model, corpus, monkeypatch):
    """Token w7 is called a number here, all others words."""
    monkeypatch.setattr("nnato.perplexity.token_class", lambda text: "number" if text in ("w7", "w9") else "word")
    names = ("transport", "zero")
    result = ablate(model, [make_operator(0, 2)], corpus, positions="number", interventions=names, sequences=20)[0]
    wanted = []
    for ids in sequences_of(model, corpus, 20):
        tokens = model.tokenizer.convert_ids_to_tokens(ids[0].tolist())
        wanted.append([p for p in range(1, 31) if tokens[p] in ("w7", "w9")])
    assert result.edited == wanted
    assert 0 < result.unedited == sum(not edited for edited in wanted) < 18
    effect = result.effects["zero"]
    known = effect.per_sequence[~np.isnan(effect.per_sequence[:, 0])]
    assert len(known) == 20 - result.unedited
    assert effect.delta_loss.value == pytest.approx(known[:, 0].mean())
    share = [(31 - edited[0]) / 31 if edited else 0 for edited in wanted]
    total = np.nansum(effect.per_sequence[:, 0] * share) / 20
    assert effect.delta_loss_diluted.value == pytest.approx(total, abs=1e-6)
    json.dumps(result.to_json(), allow_nan=False)
    with pytest.raises(PositionError, match="only 0 of 4 sequences have positions 'punctuation'"):
        ablate(model, [make_operator(0, 2)], corpus, positions="punctuation", sequences=4)


def test_what_does_not_depend_on_the_source_is_measured_once_and_the_same(model, corpus, monkeypatch):
    """Three pairs with two targets: zero, mean, resample and steer of a target are shared, unless the means differ."""
    operators = [make_operator(0, 2), make_operator(1, 2), make_operator(1, 3)]
    names = ("mean", "transport", "zero", "resample", "steer")
    arguments = {"interventions": names, "sequences": 2, "steering": torch.ones(WIDTH), "positions": 3}
    passes = []
    resumed = losses._resumed_logits

    def counted(model, ids, *rest):
        passes.append(len(ids))
        return resumed(model, ids, *rest)

    monkeypatch.setattr(losses, "_resumed_logits", counted)
    together = ablate(model, operators, corpus, **arguments)
    assert passes == 2 * [5, 1, 5]
    for operator, result in zip(operators, together, strict=True):
        (alone,) = ablate(model, [operator], corpus, **arguments)
        for name in names:
            np.testing.assert_allclose(result.effects[name].per_sequence, alone.effects[name].per_sequence, atol=1e-6, err_msg=name)
    passes.clear()
    other = dataclasses.replace(operators[1], target_mean=operators[1].target_mean + 1)
    results = ablate(model, [operators[0], other], corpus, **arguments)
    assert passes == 2 * [5, 2]
    assert results[0].effects["mean"].delta_loss.value != results[1].effects["mean"].delta_loss.value


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_edits_of_ragged_prompts_padded_on_the_left_are_those_of_each_alone(any_model):
    """Transport, features and a vector at three sites at once; small residuals, so that 1e-6 is a strict bound."""
    prompts = ["w1 w2 w3 w4 w5 w6", "w9 w8", "w30 w31 w32 w33"]
    with torch.no_grad():
        for parameter in any_model._module.parameters():
            parameter.mul_(0.5)
    operator = make_operator(0, 2)
    small = dataclasses.replace(operator, weight=operator.weight / 10, target_mean=operator.target_mean / 10)
    left, right = span(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3)), WIDTH)

    def edit(t):
        t.transport(small, positions=slice(-2, None))
        t.patch(1, lambda y: y - (y.double() @ left @ right).to(y), positions=[-1])
        t.patch(3, lambda y: y + 0.1, positions=[-2])

    t = ATOTrace(any_model, prompts, use_cache=False)
    edit(t)
    with t:
        together = t.logits.save()
    for row, prompt in enumerate(prompts):
        t = ATOTrace(any_model, prompt, use_cache=False)
        edit(t)
        with t:
            alone = t.logits.save()
        torch.testing.assert_close(together[row, -alone.shape[1] :], alone[0], atol=1e-6, rtol=1e-6)


def test_an_edit_is_gone_after_an_exception(any_model):
    ids = torch.tensor([[1, 8, 9, 30, 5, 7]])
    with ATOTrace(any_model, input_ids=ids, use_cache=False) as t:
        clean = t.logits.save()
    t = ATOTrace(any_model)
    t.transport(make_operator(0, 2))
    with pytest.raises(ZeroDivisionError), t.persist():
        with ATOTrace(any_model, input_ids=ids, use_cache=False) as inner:
            edited = inner.logits.save()
        raise ZeroDivisionError
    assert not torch.equal(edited, clean)
    with ATOTrace(any_model, input_ids=ids, use_cache=False) as t:
        after = t.logits.save()
    assert torch.equal(after, clean)


# ---- controls ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(corpus, tokenizer):
    model = wrap(make_module("llama"), tokenizer)
    accumulated = accumulate(model, corpus, [(0, 2), (1, 3)])
    return model, accumulated, fit(accumulated)


def test_controls_are_the_baselines_of_fit_and_its_reduced_ranks(fitted):
    _, accumulated, fits = fitted
    operators = [result.operator for result in fits]
    found = controls_of(accumulated, operators, ["shuffled", "shrunk_to_identity", "rank_3"])
    assert [(one.pair, one.name) for one in found][:3] == [
        (operators[0].pair, name) for name in ("shuffled", "shrunk_to_identity", "rank_3")
    ]
    for result, three in zip(fits, (found[:3], found[3:]), strict=True):
        pair = result.operator.pair
        test = accumulated.moments.of("test", "ordinary", [pair])
        x, y = test.mean_of(pair[0]), test.mean_of(pair[1])
        for control in three[:2]:  # the R² that fit printed, from test moments by hand
            moved = x - control.source_mean, y - control.target_mean
            xx = test.scatter_of(pair[0], pair[0]) + test.n * torch.outer(moved[0], moved[0])
            xy = test.scatter_of(*pair) + test.n * torch.outer(*moved)
            yy = test.scatter_of(pair[1], pair[1]) + test.n * torch.outer(moved[1], moved[1])
            errors = torch.trace(yy - 2 * control.weight.T @ xy + control.weight.T @ xx @ control.weight)
            r2 = 1 - float(errors) / float(torch.trace(test.scatter_of(pair[1], pair[1])))
            assert r2 == pytest.approx(result.baselines[control.name]["variance_weighted"], abs=1e-9)
        again = fit(accumulated, [pair], method=Method(rank=3, kappas=(result.kappa,)))[0].operator
        torch.testing.assert_close(three[2].weight, again.weight, atol=1e-10, rtol=1e-10)
        assert three[2].details["rank"] == 3
        assert int(torch.linalg.matrix_rank(three[2].weight)) == 3


def test_controls_and_subspaces_can_be_put_in(fitted, corpus):
    model, accumulated, fits = fitted
    operators = [result.operator for result in fits]
    controls = controls_of(accumulated, operators, ["shuffled", "shrunk_to_identity", "rank_3", "rank_16"])
    subspaces = subspaces_of(accumulated, [operator.pair for operator in operators], force=True)
    for left, right in subspaces.values():
        projector = left @ right
        torch.testing.assert_close(projector @ projector, projector, atol=1e-6, rtol=1e-6)
    names = ("transport", "shuffled", "rank_3", "rank_16", "lts", "lts_complement")
    result = ablate(model, operators, corpus, interventions=names, controls=controls, subspaces=subspaces, sequences=4)[0]
    np.testing.assert_allclose(result.effects["rank_16"].per_sequence, result.effects["transport"].per_sequence, atol=1e-5)
    assert abs(result.effects["rank_3"].delta_loss.value - result.effects["transport"].delta_loss.value) > 1e-4
    assert result.effects["rank_3"].edit.rank == 3
    with pytest.raises(OperatorError, match="shuffled at 0:2 is another operator, which has to be fitted: give it among the controls"):
        ablate(model, operators, corpus, interventions=["shuffled"])
    with pytest.raises(OperatorError, match="lts needs the transport subspace of 0:2"):
        ablate(model, operators, corpus, interventions=["lts"])
    with pytest.raises(OperatorError, match="the name 'shuffled' of a control at 0:2 is taken"):
        ablate(model, operators, corpus, controls=[controls[0], controls[0]])


def test_controls_that_cannot_be_fitted_are_refused(fitted, corpus):
    model, accumulated, fits = fitted
    operator = fits[0].operator
    with pytest.raises(OperatorError, match="'mean' is not fitted; from moments come shuffled, shrunk_to_identity and rank_R"):
        controls_of(accumulated, [operator], ["mean"])
    with pytest.raises(MomentsError, match="rank 17: choose from 1 to 16"):
        controls_of(accumulated, [operator], ["rank_17"])
    with pytest.raises(OperatorError, match="has no ridge penalty, which rank_3 would take over"):
        controls_of(accumulated, [dataclasses.replace(operator, details={})], ["rank_3"])
    with pytest.raises(OperatorError, match="steer adds a vector of 16 numbers"):
        ablate(model, [operator], corpus, interventions=["steer"], steering=torch.zeros(3))
    with pytest.raises(OperatorError, match="the intervention features needs directions"):
        ablate(model, [operator], corpus, interventions=["features"])


def test_truncation_keeps_the_largest_singular_values():
    operator = make_operator(0, 2)
    u, s, v = np.linalg.svd(operator.weight.numpy())
    cut = truncate(operator, 3)
    np.testing.assert_allclose(cut.weight.numpy(), (u[:, :3] * s[:3]) @ v[:3], atol=1e-12)
    assert (cut.name, cut.details["rank"]) == ("rank_3", 3)


def test_a_way_that_lacks_something_is_refused():
    with pytest.raises(ValueError, match="a way of kind 'within' lacks what it needs"):
        replaced(("within", None, None, None), torch.zeros(2, 3), torch.zeros(2, 3), [0], [1], None)
