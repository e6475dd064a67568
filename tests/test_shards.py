"""Shards of a text: together they read each batch once; merged they are the whole run; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nnato.accumulation import FILE, KIND, accumulate, load_moments
from nnato.cli import main
from nnato.corpus import SPLITS
from nnato.errors import FileFormatError, MomentsError
from nnato.merging import merge_shards
from nnato.models import wrap
from nnato.shards import Shard
from nnato.storage import read_artifact, write_artifact
from nnato.transport_moments import TransportMoments

PAIRS = [("embed", 1), (0, 3)]
HOW = {"batch_size": 4}


def assert_same(got, want, tolerance=1e-12):
    """Every sum of two runs, relative to the largest entry of its kind."""
    assert (got.tokens, got.excluded, got.sink_tokens, got.medians) == (want.tokens, want.excluded, want.sink_tokens, want.medians)
    assert (got.model, got.text, got.moments.pairs) == (want.model, want.text, want.moments.pairs)
    for one, other in zip(everything(got.moments), everything(want.moments), strict=True):
        assert one.n == other.n
        for a, b in [(one.mean, other.mean), *((one._read_block(k), other._read_block(k)) for k in range(len(one.blocks)))]:
            assert float((a - b).abs().max()) <= tolerance * float(other.scatter.abs().max() if a.dim() == 2 else b.abs().max())


def everything(moments):
    """All that can be read of moments."""
    found = [moments.of(split, kind) for split in SPLITS for kind in ("ordinary", "all")]
    return [*found, *(moments.of(split, folds=[fold]) for split in SPLITS for fold in moments.folds(split)), moments.shuffled]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.data())
def test_shards_read_each_batch_once_and_are_balanced(work, data):
    count = data.draw(st.integers(1, len(work)))
    shares = [Shard(number, count).batches(work) for number in range(1, count + 1)]
    assert [batch for share in shares for batch in share] == list(range(len(work)))
    assert all(shares)
    if count == 1 or max(work) <= sum(work) / count / 2:  # no batch is a large part of a share
        assert max(sum(work[batch] for batch in share) for share in shares) <= 2 * sum(work) / count


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/2/3", "-1/2", "١/٢", "1/0"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(MomentsError, match=r"shard .*: give for example 1/4, 2/4, 3/4 and 4/4"):
        Shard.parse(text)
    with pytest.raises(MomentsError, match="3 shards of 2 batches: ask for at most 2, or give more text"):
        Shard(1, 3).batches([1, 1])


@pytest.fixture
def run(model, corpus, tmp_path):
    """Runs some shards; the folder of each."""

    def shards(count, numbers=None, **how):
        folders = [tmp_path / f"{number}-of-{count}" for number in numbers or range(1, count + 1)]
        for folder in folders:
            shard = Shard.parse(folder.name.replace("-of-", "/"))
            accumulate(model, corpus, PAIRS, out=folder, shard=shard, **(HOW | how))
        return folders

    return shards


@pytest.mark.parametrize("count", [1, 2, 7])
def test_merged_shards_equal_one_run(model, corpus, tmp_path, run, count):
    whole = accumulate(model, corpus, PAIRS, **HOW)
    folders = run(count)
    merged = merge_shards(folders[::-1], tmp_path / "all")
    assert_same(merged, whole)
    assert_same(load_moments(tmp_path / "all"), whole)
    before = (tmp_path / "all" / FILE).read_bytes()
    assert_same(merge_shards(folders, tmp_path / "all"), whole)  # it is there already
    assert (tmp_path / "all" / FILE).read_bytes() == before
    # The command that makes the whole finds it made.
    assert_same(accumulate(model, corpus, PAIRS, out=tmp_path / "all", **HOW), whole)


def test_a_shard_is_resumed_to_the_same_bits(model, corpus, tmp_path, run):
    class StopError(Exception):
        pass

    def progress(stage, done, total):
        if (stage, done) == ("forward passes", 4):
            raise StopError

    with pytest.raises(StopError):
        accumulate(model, corpus, PAIRS, out=tmp_path / "2-of-3", shard=Shard(2, 3), checkpoint_every=1, progress=progress, **HOW)
    with pytest.raises(MomentsError, match="is not finished"):
        merge_shards([tmp_path / "2-of-3"], tmp_path / "all")
    resumed = [part.read_bytes() for part in sorted(run(3, [2])[0].glob("*.ordinary.*"))]
    shutil.rmtree(tmp_path / "2-of-3")
    assert [part.read_bytes() for part in sorted(run(3, [2])[0].glob("*.ordinary.*"))] == resumed


def test_shards_that_are_no_whole_are_refused(model, corpus, tmp_path, run):
    one, two, three = run(3)
    out = tmp_path / "all"
    with pytest.raises(MomentsError, match="1 of 3 shards are missing: 2/3"):
        merge_shards([three, one], out)
    shutil.copytree(two, tmp_path / "copy")
    with pytest.raises(MomentsError, match=r"shard 2/3 is there twice, in .*2-of-3 and .*copy"):
        merge_shards([one, two, three, tmp_path / "copy"], out)
    with pytest.raises(MomentsError, match=r"shard 1/2, .* is shard 1/3: they share out a text differently"):
        merge_shards([one, run(2, [1])[0]], out)
    with pytest.raises(MomentsError, match="no shards to merge"):
        merge_shards([], out)
    with pytest.raises(MomentsError, match="holds one of the shards: choose another --out"):
        merge_shards([one, two, three], two)
    accumulate(model, corpus, PAIRS, out=tmp_path / "whole", **HOW)
    with pytest.raises(MomentsError, match="holds a whole text, not a shard of one"):
        merge_shards([one, tmp_path / "whole"], out)
    with pytest.raises(MomentsError, match="holds one shard of a text only: nnato merge puts all its shards together"):
        load_moments(one)
    with pytest.raises(MomentsError, match="another model, text or request; choose another --out"):
        accumulate(model, corpus, PAIRS, out=one, shard=Shard(2, 3), **HOW)
    with pytest.raises(MomentsError, match="another model, text or request; choose another --out"):
        accumulate(model, corpus, PAIRS, out=one, **HOW)
    with pytest.raises(MomentsError, match="a shard needs a folder to keep it in"):
        accumulate(model, corpus, PAIRS, shard=Shard(1, 3), **HOW)
    assert not out.exists()


def test_shards_of_other_runs_are_refused(model, corpus, tmp_path, run, tokenizer):
    from conftest import make_module

    one, two = run(2)
    accumulate(wrap(make_module("gemma2", seed=1), tokenizer), corpus, PAIRS, out=tmp_path / "model", shard=Shard(2, 2), **HOW)
    with pytest.raises(MomentsError, match=r"is a shard of another run than .*: the request differs \(model: "):
        merge_shards([one, tmp_path / "model"], tmp_path / "all")
    accumulate(model, corpus, PAIRS, out=tmp_path / "half", shard=Shard(2, 2), products=torch.float32, **HOW)
    with pytest.raises(MomentsError, match=r"the request differs \(products: float32, not None\)"):
        merge_shards([one, tmp_path / "half"], tmp_path / "all")
    tensors, metadata = read_artifact(two / FILE, KIND)
    for change, error, message in [
        ({"medians": {site: 1.01 * value for site, value in metadata["medians"].items()}}, MomentsError, "measured other norms"),
        ({"shard": [2]}, FileFormatError, "shard is not two numbers"),
        ({"shard": [3, 2]}, MomentsError, "shard 3/2"),
        ({"files": {"../x": 1}}, MomentsError, "do not say which of their parts lie in files"),
    ]:
        write_artifact(two / FILE, KIND, tensors, metadata | change)
        with pytest.raises(error, match=message):
            merge_shards([one, two], tmp_path / "all")
    write_artifact(two / FILE, KIND, tensors, metadata)
    part = next(two.glob("*.ordinary.*"))
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(FileFormatError, match="is damaged"):
        merge_shards([one, two], tmp_path / "all")
    assert not (tmp_path / "all" / FILE).exists()


def test_without_null_nothing_else_changes(model, corpus, tmp_path, run):
    whole = accumulate(model, corpus, PAIRS, **HOW)
    bare = accumulate(model, corpus, PAIRS, out=tmp_path / "bare", null=False, **HOW)
    assert bare.moments.shuffled.n == 0
    assert bare.moments.of("train", "all").scatter.equal(whole.moments.of("train", "all").scatter)
    merged = merge_shards(run(3, null=False), tmp_path / "all")
    assert_same(merged, load_moments(tmp_path / "bare"))
    sizes = [TransportMoments.bytes_for(whole.moments.pairs, 16, 5, null) for null in (True, False)]
    assert sizes[0][0] - sizes[1][0] == 8 * 16**2 * len(PAIRS)


def test_products_in_float32_are_near_and_stay_apart(model, corpus, tmp_path):
    exact = accumulate(model, corpus, PAIRS, **HOW)
    half = accumulate(model, corpus, PAIRS, out=tmp_path / "m", products=torch.float32, **HOW)
    for split in SPLITS:
        one, other = half.moments.of(split), exact.moments.of(split)
        size = other.scatter.diagonal(dim1=1, dim2=2).abs().max()
        assert not torch.equal(one.scatter, other.scatter)
        assert float((one.scatter - other.scatter).abs().max() / size) < 2e-6
    # What may be huge is always multiplied in float64.
    excluded = [m.moments.of("train", "all").subtract(m.moments.of("train")).n for m in (half, exact)]
    assert excluded[0] == excluded[1] > 0
    with pytest.raises(MomentsError, match="holds moments of another"):
        accumulate(model, corpus, PAIRS, out=tmp_path / "m", **HOW)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(MomentsError, match="products in float32 need"):
            accumulate(model, corpus, PAIRS, products=torch.float32, **HOW)
    finally:
        torch.set_float32_matmul_precision("highest")


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_commands(saved_model, text, tmp_path):
    how = [saved_model, "--pairs", "0:2,1:3", "--text", text, "--context", "32", "--per-document", "0", "--tokens", "100000"]
    whole = json.loads(cli("accumulate", *how, "--out", tmp_path / "whole", "--json").stdout)["results"]
    for number in (1, 2):
        shown = cli("accumulate", *how, "--shard", f"{number}/2", "--out", tmp_path / f"{number}").stdout
        assert f"Shard {number}/2 of 2 pairs" in shown
    cli("merge", tmp_path / "1", "--out", tmp_path / "all", code=2)
    merged = json.loads(cli("merge", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "all", "--json").stdout)["results"]
    assert {key: merged[key] for key in ("pairs", "tokens", "excluded", "sink_tokens")} == {
        key: whole[key] for key in ("pairs", "tokens", "excluded", "sink_tokens")
    }
    assert_same(load_moments(tmp_path / "all"), load_moments(tmp_path / "whole"))
    cli("fit", tmp_path / "all")
    for wrong, message in [
        (["--shard", "1/2", "--remote"], "give one of --shard, --engine and --remote"),
        (["--shard", "3/2"], "shard 3/2: give for example"),
        (["--workers", "2"], "--workers belongs to --engine ray"),
    ]:
        assert message in cli("accumulate", *how, *wrong, "--out", tmp_path / "x", code=2).output


def test_ray_is_optional(saved_model, text, tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None\nfrom nnato.cli import main\n"
        f"main(['accumulate', {str(saved_model)!r}, '--engine', 'ray', '--text', {str(text)!r}, '--out', {str(tmp_path / 'm')!r}])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--engine ray needs Ray: pip install 'nnato[ray]'" in ended.stderr
