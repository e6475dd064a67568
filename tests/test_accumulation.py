"""The loop text × model → moments: against a hook-based reference, killed and resumed, and refusing what does not fit."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import BLOCKS, WIDTH, hook_residuals, make_module
from safetensors import safe_open

from nnato.accumulation import FILE, KIND, accumulate, accumulate_cached, default_pairs_of, load_moments
from nnato.corpus import SPLITS, TokenBatch
from nnato.errors import ActivationError, FileFormatError, MomentsError, OutputError, SiteError, TextError
from nnato.models import describe, wrap
from nnato.moments import Moments
from nnato.reduction import SINK_RATIO, TokenClasses
from nnato.sites import ResidualSite
from nnato.storage import exclusive, read_artifact, write_artifact
from nnato.transport_moments import TransportMoments

PAIRS = [("embed", 1), (0, 3)]
SITES = [ResidualSite.EMBED, ResidualSite(0), ResidualSite(1), ResidualSite(3)]


def reference_rows(model, corpus, batch_size):
    """Residual rows by split and class, sequence by sequence through forward hooks and explicit loops over tokens."""
    blocks = corpus.tokenize(model.tokenizer)
    plan = blocks.plan(batch_size)
    rows: dict[tuple[str, str], list[torch.Tensor]] = {}
    medians = None
    for numbers in plan:
        captured = []
        for number in numbers:
            batch = blocks.batch([number])
            seen, _ = hook_residuals(model._module, batch.ids)
            captured.append((batch, torch.stack([seen[site.key][0] for site in SITES]).double()))
        if medians is None:
            norms = torch.cat([residuals[:, 1:].norm(dim=-1) for _, residuals in captured], dim=1)
            medians = norms.sort(dim=1).values[:, (norms.shape[1] - 1) // 2]
        for batch, residuals in captured:
            for position in range(residuals.shape[1]):
                special = batch.ids[0, position].item() in model.tokenizer.all_special_ids
                sink = bool((residuals[:, position].norm(dim=-1) > SINK_RATIO * medians).any())
                name = "excluded" if special or position == 0 or sink else "ordinary"
                rows.setdefault((batch.split, name), []).append(residuals[:, position])
    return {key: torch.stack(value, dim=1) for key, value in rows.items()}


def test_moments_equal_a_hook_based_reference(any_model, corpus):
    result = accumulate(any_model, corpus, PAIRS, batch_size=5)
    want = reference_rows(any_model, corpus, 5)
    for (split, name), rows in want.items():
        got = result.moments.of(split, "all" if name == "excluded" else "ordinary")
        if name == "excluded":
            rows = torch.cat([want[split, "ordinary"], rows], dim=1)
        assert got.n == rows.shape[1]
        reference = Moments.of_pairs(result.moments.pairs, WIDTH)
        reference.update(rows)
        # Float32 forward passes of other batch shapes differ in the last bits; the sums themselves are exact (test_moments).
        power = float(rows.square().sum(dim=1).max())
        torch.testing.assert_close(got.scatter, reference.scatter, rtol=1e-4, atol=1e-5 * power)
        torch.testing.assert_close(got.mean, reference.mean, rtol=1e-4, atol=1e-5)
    assert result.tokens == {split: want[split, "ordinary"].shape[1] for split in ("train", "validation", "test")}
    assert sum(result.excluded.values()) == sum(rows.shape[1] for (_, name), rows in want.items() if name == "excluded")
    assert result.excluded["special"] == len(corpus.tokenize(any_model.tokenizer).index)


def test_sinks_are_found_at_any_site_and_counted():
    residuals = torch.ones(2, 1, 6, 4)
    residuals[1, 0, 4] = 100.0
    residuals[0, 0, 3] = 9.0
    tokens = TokenBatch(
        ids=torch.tensor([[1, 7, 8, 9, 10, 0]]),
        mask=torch.tensor([[True] * 5 + [False]]),
        special=torch.tensor([[True] + [False] * 5]),
        documents=torch.tensor([3]),
        split="train",
        fold=0,
    )
    classes = TokenClasses()
    assert classes.ordinary(tokens.ids, tokens.mask, tokens.special, residuals).tolist() == [[False, True, True, True, False, False]]
    assert classes.excluded == {"special": 1, "first_position": 0, "sink": 1}
    assert classes.sinks == Counter({10: 1})
    assert classes.medians is not None
    frozen = classes.medians.clone()
    classes.ordinary(tokens.ids, tokens.mask, tokens.special, residuals * 50)
    assert torch.equal(classes.medians, frozen)
    plain = TokenBatch(tokens.ids, tokens.mask, torch.zeros_like(tokens.special), tokens.documents, "train", 0)
    assert TokenClasses().ordinary(plain.ids, plain.mask, plain.special, residuals).tolist() == [[False, True, True, True, False, False]]


def test_no_activation_is_kept_on_disk(model, corpus, tmp_path):
    result = accumulate(model, corpus, PAIRS, out=tmp_path / "m")
    shapes = set()
    assert {path.name for path in (tmp_path / "m").iterdir() if path.suffix != ".safetensors"} == set()
    for path in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    blocks = len(result.moments.of("train").blocks)
    assert shapes == {(2, 4, WIDTH), (blocks, WIDTH, WIDTH), (len(PAIRS), WIDTH, WIDTH)}


def assert_same_bits(a, b):
    left, right = a.moments, b.moments
    assert (left.pairs, left.d_model, left.rows) == (right.pairs, right.d_model, right.rows)
    read = [[moments.of(split, "all") for split in SPLITS] + [moments.shuffled] for moments in (left, right)]
    read = [parts + [m.of(s, folds=[f]) for s in SPLITS for f in m.folds(s)] for parts, m in zip(read, (left, right), strict=True)]
    for one, other in zip(*read, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.scatter, other.scatter)


def test_load_returns_what_was_accumulated(model, corpus, tmp_path):
    result = accumulate(model, corpus, PAIRS, out=tmp_path)
    for path in (tmp_path, tmp_path / FILE, str(tmp_path)):
        loaded = load_moments(path)
        assert_same_bits(loaded, result)
    for name in ("model", "text", "tokens", "excluded", "sink_tokens", "medians", "provenance"):
        assert getattr(loaded, name) == getattr(result, name)
    in_memory = accumulate(model, corpus, PAIRS)
    assert_same_bits(in_memory, result)


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_an_interrupted_run_resumes_to_the_same_bits(model, corpus, tmp_path, stop):
    def progress(stage, done, total):
        if stage == "forward passes" and done == stop:
            raise StopError

    whole = accumulate(model, corpus, PAIRS, batch_size=4)
    with pytest.raises(StopError):
        accumulate(model, corpus, PAIRS, out=tmp_path, batch_size=4, checkpoint_every=2, progress=progress)
    if stop >= 2:
        with pytest.raises(MomentsError, match=f"is not finished: {stop // 2 * 2} of .* batches; the command that began it resumes it"):
            load_moments(tmp_path)
    started = []
    resumed = accumulate(
        model,
        corpus,
        PAIRS,
        out=tmp_path,
        batch_size=4,
        checkpoint_every=2,
        progress=lambda stage, done, total: started.append(done) if stage == "forward passes" else None,
    )
    assert started[0] == stop // 2 * 2
    assert_same_bits(resumed, whole)
    assert (resumed.excluded, resumed.sink_tokens, resumed.medians) == (whole.excluded, whole.sink_tokens, whole.medians)
    before = (tmp_path / FILE).read_bytes()
    assert_same_bits(accumulate(model, corpus, PAIRS, out=tmp_path, batch_size=4), whole)
    assert (tmp_path / FILE).read_bytes() == before


def stopped_after(model, corpus, out, batches):
    def progress(stage, done, total):
        if stage == "forward passes" and done == batches:
            raise StopError

    with pytest.raises(StopError):
        accumulate(model, corpus, PAIRS, out=out, batch_size=4, checkpoint_every=1, progress=progress)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(model, corpus, tmp_path, damage):
    whole = accumulate(model, corpus, PAIRS, out=tmp_path / "whole", batch_size=4)
    out = tmp_path / "damaged"
    stopped_after(model, corpus, out, 5)
    file, started = out / FILE, []
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:  # as when a process is killed between the two renames of a checkpoint
        file.unlink()

    def progress(stage, done, total):
        if stage == "forward passes":
            started.append(done)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = accumulate(model, corpus, PAIRS, out=out, batch_size=4, progress=progress)
    said = [str(warning.message) for warning in caught if "checkpoint before it" in str(warning.message)]
    assert len(said) == (1 if damage == "truncated" else 0)
    assert all("moments.safetensors is damaged" in message for message in said)
    assert started[0] == 4
    assert_same_bits(resumed, whole)
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


def test_without_a_readable_checkpoint_nothing_is_overwritten(model, corpus, tmp_path):
    stopped_after(model, corpus, tmp_path, 5)
    for file in (tmp_path / FILE, tmp_path / "moments.previous.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises(FileFormatError, match=r"moments.previous.safetensors is damaged"):
        accumulate(model, corpus, PAIRS, out=tmp_path, batch_size=4)
    assert (tmp_path / FILE).read_bytes() == b"damaged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cursor": 10**6}, "its cursor lies outside of the text"),
        ({"cursor": -1}, "its cursor lies outside of the text"),
        ({"medians": {}}, "is inconsistent"),
        ({"medians": []}, "medians is not a dict"),
        ({"sinks": [[1, 2]]}, "is inconsistent"),
        ({"excluded": {"sink": "many"}}, "excluded holds something else than counts"),
        ({"rows": None}, "lack some of their tensors"),
    ],
    ids=str,
)
def test_checkpoints_whose_contents_do_not_fit_are_refused(model, corpus, tmp_path, change, message):
    """Of the same request, so that they would be resumed."""
    stopped_after(model, corpus, tmp_path, 3)
    tensors, metadata = read_artifact(tmp_path / FILE, "moments")
    own = {key: entry for key, entry in metadata.items() if key not in ("schema", "kind")}
    write_artifact(tmp_path / FILE, "moments", tensors, {**own, **change})
    with pytest.raises((FileFormatError, MomentsError), match=message):
        accumulate(model, corpus, PAIRS, out=tmp_path, batch_size=4)


def test_a_second_process_on_the_same_folder_is_refused(model, corpus, tmp_path):
    """A real second process begins while this one is half way, and again when it has ended."""
    other = (
        "import sys; from pathlib import Path; from nnato.storage import exclusive; from nnato.errors import OutputError\n"
        "try:\n    with exclusive(Path(sys.argv[1])): print('mine')\n"
        "except OutputError as error: print(error)\n"
    )
    said = []

    def progress(stage, done, total):
        if stage == "forward passes" and done == 3:
            said.append(subprocess.run([sys.executable, "-c", other, str(tmp_path / FILE)], capture_output=True, text=True).stdout)
            with pytest.raises(OutputError, match="another process is working on"):
                accumulate(model, corpus, PAIRS, out=tmp_path, batch_size=4)

    result = accumulate(model, corpus, PAIRS, out=tmp_path, batch_size=4, checkpoint_every=1, progress=progress)
    assert "another process is working on" in said[0]
    assert "choose another folder with --out" in said[0]
    assert_same_bits(result, accumulate(model, corpus, PAIRS, batch_size=4))
    assert subprocess.run([sys.executable, "-c", other, str(tmp_path / FILE)], capture_output=True, text=True).stdout == "mine\n"
    with exclusive(tmp_path / FILE):  # whoever only reads what is finished needs no lock
        assert_same_bits(accumulate(model, corpus, PAIRS, out=tmp_path, batch_size=4), result)


@pytest.mark.slow
def test_killed_at_random_times_and_resumed_to_the_same_bits(saved_model, text, tmp_path):
    """SIGKILL over and over, at times drawn over the whole life of the process; the survivor's moments equal an undisturbed run's."""
    script = (
        "import sys, nnato\n"
        "model = nnato.load_model(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "corpus = nnato.Corpus(sys.argv[2], context=32, per_document=None)\n"
        "pairs = [(0, 1), (0, 3), ('embed', 2)]\n"
        "nnato.accumulate(model, corpus, pairs, out=sys.argv[3], batch_size=1, checkpoint_every=1)\n"
    )

    def run(out, seconds=None):
        process = subprocess.Popen([sys.executable, "-c", script, str(saved_model), str(text), str(out)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        process.stdout.close()
        return code, time.monotonic() - started

    code, duration = run(tmp_path / "whole")
    assert code == 0
    rng = random.Random(0)
    kills, cursors = 0, []
    for _ in range(12):
        if run(tmp_path / "killed", rng.uniform(0, duration / 3))[0] == 0:
            break
        kills += 1
        file = tmp_path / "killed" / FILE
        if file.exists():
            with safe_open(file, "pt") as opened:
                cursors.append(json.loads(opened.metadata()["nnato"])["cursor"])
    assert kills >= 3
    assert cursors == sorted(cursors)
    assert cursors
    assert cursors[-1] > 0
    code, _ = run(tmp_path / "killed")
    assert code == 0
    assert_same_bits(load_moments(tmp_path / "killed"), load_moments(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))


def test_files_of_another_request_are_refused(model, corpus, tokenizer, tmp_path):
    accumulate(model, corpus, PAIRS, out=tmp_path)
    other_model = wrap(make_module("gemma2", seed=1), tokenizer)
    other_text = type(corpus)(corpus.source, context=31, per_document=None)
    for arguments in ((other_model, corpus, PAIRS), (model, other_text, PAIRS), (model, corpus, PAIRS[:1])):
        with pytest.raises(MomentsError, match="holds moments of another model, text or request; choose another --out, or delete it"):
            accumulate(*arguments, out=tmp_path)
    (tmp_path / FILE).write_bytes(b"something else")
    with pytest.raises(FileFormatError, match="is damaged"):
        accumulate(model, corpus, PAIRS, out=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_are_named_and_leave_the_checkpoint(model, corpus, tmp_path, value):
    blocks = corpus.tokenize(model.tokenizer)
    plan = blocks.plan(4)
    victim = blocks.batch(plan[3])
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        if len(calls) == 4:
            output = output.clone()
            output[0, 5, 7] = value
        return output

    # Inside the block: nnsight reads a block's output before that block's own forward hooks.
    handle = model._module.model.layers[1].post_feedforward_layernorm.register_forward_hook(spoil)
    message = rf"the residual is {value} in document {int(victim.documents[0]):016x} \(block starting 'w.*'\), position 5, site 1; nothing"
    with pytest.raises(ActivationError, match=message):
        accumulate(model, corpus, [(0, 1), (0, 3)], out=tmp_path, batch_size=4, checkpoint_every=1)
    handle.remove()
    resumed = accumulate(model, corpus, [(0, 1), (0, 3)], out=tmp_path, batch_size=4, checkpoint_every=1)
    assert_same_bits(resumed, accumulate(model, corpus, [(0, 1), (0, 3)], batch_size=4))


def test_bad_requests_are_refused_before_work(model, corpus, tmp_path):
    with pytest.raises(SiteError, match="site 4 does not exist"):
        accumulate(model, corpus, [(0, BLOCKS)])
    with pytest.raises(SiteError, match="source must come before the target"):
        accumulate(model, corpus, [(2, 1)])
    with pytest.raises(SiteError, match="no pairs"):
        accumulate(model, corpus, [])
    with pytest.raises(MomentsError, match="must be at least 1"):
        accumulate(model, corpus, batch_size=0)
    with pytest.raises(TextError, match="no text"):
        accumulate(model, type(corpus)("nowhere"), out=tmp_path)
    with pytest.raises(FileFormatError, match="no moments in .*: give the --out folder"):
        load_moments(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": 5},
        {"pairs": [[0, 9, 1]]},
        {"pairs": [[2, 1]]},
        {"d_model": 10**6},
        {"rows": None},
        {"files": None},
        {"files": {"../x": 1}},
        {"sinks": [[1]]},
        {"excluded": None, "sinks": 3},
        {"provenance": None},
    ],
)
def test_moments_whose_metadata_do_not_fit_are_refused(model, corpus, tmp_path, change):
    accumulate(model, corpus, PAIRS, out=tmp_path)
    tensors, metadata = read_artifact(tmp_path / FILE, KIND)
    metadata |= change
    metadata = {key: value for key, value in metadata.items() if value is not None}
    write_artifact(tmp_path / FILE, KIND, tensors, metadata)
    with pytest.raises((FileFormatError, MomentsError)):
        load_moments(tmp_path)


def test_moments_that_do_not_fit_into_memory_are_refused_first(model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(TransportMoments, "bytes_for", staticmethod(lambda pairs, d_model, folds, null: (10**15, 10**14)))
    with pytest.raises(MomentsError, match=r"take 1000000.0 GB of memory, and cpu has .* GB: ask for fewer sites or pairs"):
        accumulate(model, corpus, PAIRS)
    with pytest.raises(MomentsError, match=r"take 100000.0 GB of memory"):
        accumulate(model, corpus, PAIRS, out=tmp_path)
    monkeypatch.setattr(TransportMoments, "bytes_for", staticmethod(lambda pairs, d_model, folds, null: (10**15, 1)))
    with pytest.raises(OutputError, match=r"GB left, and 1000000.0 GB will be written: ask for fewer sites, pairs or folds"):
        accumulate(model, corpus, PAIRS, out=tmp_path)


def test_the_size_that_is_announced_is_the_size(model, corpus, tmp_path):
    largest = 0

    def watch(stage, done, total):
        nonlocal largest
        if stage == "forward passes" and (tmp_path / FILE).exists():
            largest = max(largest, scatters(tmp_path / FILE))

    def scatters(path):
        with safe_open(path, "pt") as file:
            return sum(8 * math.prod(file.get_slice(name).get_shape()) for name in file.keys() if name.endswith("scatter"))  # noqa: SIM118

    moments = accumulate(model, corpus, PAIRS, out=tmp_path, checkpoint_every=1, progress=watch).moments
    written = sum(scatters(path) for path in (tmp_path / FILE, *moments.files))
    assert TransportMoments.bytes_for(moments.pairs, WIDTH, corpus.folds) == (written, largest)


def test_folds_are_disjoint_sets_of_documents(model, corpus):
    """Each fold holds the rows of its own documents, found here by their hash alone."""
    moments = accumulate(model, corpus, PAIRS, batch_size=5).moments
    blocks = corpus.tokenize(model.tokenizer)
    for split in ("train", "test"):
        of_split = blocks.index[blocks.index[:, 2] == SPLITS.index(split)]
        assert moments.folds(split) == tuple(sorted({int(document) % corpus.folds for document in of_split[:, 3]}))
        for fold in moments.folds(split):
            lengths = of_split[of_split[:, 3] % corpus.folds == fold, 1]
            assert 0.9 * (lengths - 1).sum() <= moments.of(split, folds=[fold]).n <= (lengths - 1).sum()
    assert moments.folds("validation") == (0,)
    whole = moments.of("train")
    joined = moments.of("train", folds=moments.folds("train")[1:]).merge(moments.of("train", folds=moments.folds("train")[:1]))
    torch.testing.assert_close(joined.scatter, whole.scatter, rtol=1e-12, atol=1e-12)


def test_missing_and_foreign_parts_are_refused(model, corpus, tmp_path):
    accumulate(model, corpus, PAIRS, out=tmp_path / "a")
    moments = load_moments(tmp_path / "a").moments
    with pytest.raises(MomentsError, match="the train split has no fold 9; it has 0, 1, 2, 3, 4"):
        moments.of("train", folds=[0, 9])
    with pytest.raises(MomentsError, match="folds are kept of ordinary tokens only"):
        moments.of("train", "all", folds=[0])
    part = tmp_path / "a" / "train.ordinary.1.safetensors"
    other = (tmp_path / "a" / "train.ordinary.2.safetensors").read_bytes()
    mine = part.read_bytes()
    part.write_bytes(other)
    with pytest.raises(MomentsError, match=r"train.ordinary.1.safetensors belongs to other moments"):
        load_moments(tmp_path / "a")
    with pytest.raises(MomentsError, match=r"train.ordinary.1.safetensors belongs to other moments"):
        moments.of("train")
    part.write_bytes(mine[:-8])
    with pytest.raises(FileFormatError, match=r"train.ordinary.1.safetensors is damaged"):
        moments.of("train")
    part.unlink()
    with pytest.raises(FileFormatError, match=r"train.ordinary.1.safetensors does not exist"):
        load_moments(tmp_path / "a")


def test_a_first_batch_of_special_tokens_is_refused():
    tokens = TokenBatch(torch.ones(1, 3, dtype=torch.int64), *(torch.ones(1, 3, dtype=torch.bool),) * 2, torch.tensor([1]), "train", 0)
    with pytest.raises(TextError, match="holds special tokens and first positions only"):
        TokenClasses().ordinary(tokens.ids, tokens.mask, tokens.special, torch.ones(1, 1, 3, 4))


def test_the_cache_is_keyed_by_contents(model, corpus, tokenizer, monkeypatch):
    passes = []

    def run(model, corpus, pairs):
        passes.clear()
        accumulate_cached(model, corpus, pairs, progress=lambda stage, done, total: passes.append(stage))
        return passes.count("forward passes") > 1

    info = describe(model)
    assert run(model, corpus, default_pairs_of(info)[:1])
    assert not run(model, corpus, default_pairs_of(info))  # shares the entry of all default pairs
    assert not run(wrap(make_module("gemma2"), tokenizer), corpus, None)  # the same weights, loaded anew
    assert run(wrap(make_module("gemma2", seed=1), tokenizer), corpus, None)
    assert run(model, type(corpus)(corpus.source, context=31), None)
    assert run(model, corpus, [("embed", 1)])


def test_moments_on_a_batch_boundary_do_not_depend_on_checkpoints(model, corpus, tmp_path):
    often = accumulate(model, corpus, PAIRS, out=tmp_path / "a", checkpoint_every=1)
    assert_same_bits(often, accumulate(model, corpus, PAIRS, out=tmp_path / "b", checkpoint_every=1000))


def test_default_corpus_depends_on_the_width(model):
    with pytest.raises(TextError, match="leave nothing for"):  # 80 tokens a dimension of a width-16 model are next to nothing
        accumulate(model)


def test_batches_of_other_sizes_agree_to_rounding(model, corpus):
    a, b = (accumulate(model, corpus, PAIRS, batch_size=size).moments.of("train") for size in (3, 8))
    assert a.n == b.n
    np.testing.assert_allclose(a.scatter.numpy(), b.scatter.numpy(), rtol=1e-4, atol=1e-3)
