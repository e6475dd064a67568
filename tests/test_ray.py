"""Accumulation on a real local Ray cluster: equal to one process, whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading

import psutil
import pytest
import torch
from click.testing import CliRunner
from test_shards import HOW, PAIRS, assert_same

from nnato.accumulation import FILE, accumulate, load_moments
from nnato.cli import main
from nnato.corpus import Corpus
from nnato.errors import ClusterError, MomentsError, TextError
from nnato.models import load_model
from nnato.shards import Shard

ray = pytest.importorskip("ray", reason="the extra nnato[ray] is not installed")

from nnato.ray_engine import RayCluster, Worker, accumulate_on_ray  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """One cluster of two cores for all tests of this file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield RayCluster(2)
    ray.shutdown()


@pytest.fixture
def long_text(tmp_path):
    """Documents enough that a run takes a few seconds."""
    rng = random.Random(0)
    file = tmp_path / "text.jsonl"
    with file.open("w") as lines:
        for _ in range(1200):
            lines.write(json.dumps({"text": " ".join(f"w{rng.randrange(93)}" for _ in range(60))}) + "\n")
    return Corpus(str(file), context=32, per_document=None)


def test_workers_killed_at_random_change_nothing(cluster, saved_model, long_text, tmp_path):
    """SIGKILL to whichever worker is at work, three times; every shard is in the result once and only once."""
    whole = accumulate(load_model(str(saved_model)), long_text, PAIRS, **HOW)
    rng, said, killed, seen = random.Random(1), [], [], set()

    def progress(stage, done, total):
        seen.add(stage)
        if stage == "shards" and 0 < done < total and len(killed) < 3 and rng.random() < 0.5:
            alive = []
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                    alive += [process.pid] * (process.cmdline()[:1] == ["ray::Worker.run"])
            if alive:
                killed.append(rng.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)

    result = accumulate_on_ray(str(saved_model), long_text, PAIRS, cluster, out=tmp_path / "m", progress=progress, say=said.append, **HOW)
    assert killed
    assert 1 <= len(said) <= len(killed)  # one that had just ended its shard is not missed at all
    assert all("was lost at shard" in line for line in said)
    assert any(stage.startswith("worker 1 on ") for stage in seen)
    assert any(stage.startswith("worker 2 on ") for stage in seen)
    assert_same(result, whole)
    assert not (tmp_path / "m" / "shards").exists()
    assert_same(accumulate_on_ray(str(saved_model), long_text, PAIRS, cluster, out=tmp_path / "m", **HOW), whole)
    with pytest.raises(MomentsError, match="holds moments of another model, text or request"):
        accumulate_on_ray(str(saved_model), long_text, [(0, 1)], cluster, out=tmp_path / "m", **HOW)


def test_an_interrupted_call_goes_on_with_any_number_of_workers(cluster, saved_model, corpus, tmp_path):
    whole = accumulate(load_model(str(saved_model)), corpus, PAIRS, **HOW)

    class StopError(Exception):
        pass

    def progress(stage, done, total):
        if stage == "shards" and done >= 2:
            raise StopError

    with pytest.raises(StopError):
        accumulate_on_ray(str(saved_model), corpus, PAIRS, RayCluster(1), out=tmp_path / "m", progress=progress, **HOW)
    done = {path.name: path.stat().st_ino for path in (tmp_path / "m" / "shards").glob("*-of-4")}
    assert len(done) >= 2
    kept = {}

    def note(stage, number, total):
        if stage == "shards" and number == total:
            kept.update({path.name: path.stat().st_ino for path in (tmp_path / "m" / "shards").glob("*-of-4")})

    result = accumulate_on_ray(str(saved_model), corpus, PAIRS, cluster, out=tmp_path / "m", progress=note, **HOW)
    assert len(kept) == 4
    assert done.items() <= kept.items()  # what was done was not done again
    assert_same(result, whole)


def test_errors_of_a_worker_are_those_of_a_run_here(cluster, saved_model, corpus, tmp_path):
    with pytest.raises(ClusterError, match="8 workers of 1 CPU cores, but the cluster has 2: ask for fewer"):
        accumulate_on_ray(str(saved_model), corpus, PAIRS, RayCluster(8), out=tmp_path / "a", **HOW)
    with pytest.raises(TextError, match="no text 'nowhere'"):
        accumulate_on_ray(str(saved_model), Corpus("nowhere"), PAIRS, cluster, out=tmp_path / "b", **HOW)
    with pytest.raises(ClusterError, match="ask for at least one of each"):
        RayCluster(0)


def test_a_shard_that_kills_every_worker_is_given_up(cluster, saved_model, corpus, tmp_path, monkeypatch):
    def die(self, shard):
        os._exit(1)

    monkeypatch.setattr(Worker, "run", die)
    monkeypatch.setattr("nnato.ray_engine.ATTEMPTS", 2)
    with pytest.raises(ClusterError, match="2 workers were lost at shard .*: ask for fewer workers|2 workers were lost at shard"):
        accumulate_on_ray(str(saved_model), corpus, PAIRS, RayCluster(1), out=tmp_path / "m", **HOW)
    assert not (tmp_path / "m" / FILE).exists()


def test_two_attempts_at_a_shard_leave_one(saved_model, corpus, tmp_path):
    """A worker that was taken for lost ends after its successor: its result is dropped. No cluster needed."""
    from nnato.accumulation import tokenize
    from nnato.ray_engine import Task
    from nnato.sites import make_pair

    model = load_model(str(saved_model))
    blocks = tokenize(model, corpus)
    task = Task(str(saved_model), torch.float32, tuple(make_pair(*pair) for pair in PAIRS), 4, torch.float64, True, str(tmp_path / "s"), 1)
    (tmp_path / "s").mkdir()
    written = threading.Event()

    class Silent:
        class write:
            remote = staticmethod(lambda *args, **line: written.set())

    import numpy as np

    ids = np.asarray(np.memmap(blocks.spool, dtype=np.int32, mode="r"))
    text = {name: getattr(blocks, name) for name in ("index", "special", "context", "fingerprint")}
    for number in (1, 2):
        Worker(number, task, ids, text, Silent).run(Shard(1, 2))
        if number == 1:
            first = {path.name: path.stat().st_ino for path in (tmp_path / "s" / "1-of-2").iterdir()}
    assert written.is_set()
    assert {path.name: path.stat().st_ino for path in (tmp_path / "s" / "1-of-2").iterdir()} == first
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["1-of-2"]


def test_the_command(cluster, saved_model, text, tmp_path):
    how = [str(saved_model), "--pairs", "embed:1,0:3", "--text", str(text), "--context", "32", "--per-document", "0", "--tokens", "100000"]
    runner = CliRunner()
    for arguments in (["--out", str(tmp_path / "here")], ["--out", str(tmp_path / "ray"), "--engine", "ray", "--json"]):
        result = runner.invoke(main, ["accumulate", *how, *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["results"]["pairs"] == [["embed", 1], [0, 3]]
    assert_same(load_moments(tmp_path / "ray"), load_moments(tmp_path / "here"))
