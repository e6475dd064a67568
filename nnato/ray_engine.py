"""Accumulation on a Ray cluster: shards of one text run by workers, lost ones redone, results merged."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnato.accumulation import FILE, Accumulated, accumulate, default_corpus, load_moments, tokenize
from nnato.corpus import Corpus, TokenBlocks
from nnato.errors import ClusterError, MissingExtraError, MomentsError, NnatoError, first_line
from nnato.merging import Job, merge_locked, merge_part
from nnato.models import describe, load_model
from nnato.shards import Shard
from nnato.sites import Pair, make_pair
from nnato.statistics import Progress
from nnato.storage import exclusive, prepare_folder

SHARDS_PER_WORKER = 4
"""A lost worker costs at most one shard of work, and workers of different speed still end together."""
ATTEMPTS = 5
"""So many workers may be lost at one shard; then the shard is at fault, not the machines."""


@dataclass(frozen=True)
class RayCluster:
    """Where to run, and how widely.

    Attributes:
        workers: Model actors at one time; each holds one copy of the weights.
        address: Of a running cluster, as `ray.init` takes it (`auto`, `ray://host:10001`); None starts one on this machine.
        threads: CPU cores of a worker. For any number of workers, results are the same to 1e-12. For another number of threads, or another
            kind of device, they are the same to the rounding of the model's own dtype, since these change what the model computes.
    """

    workers: int
    address: str | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1 or self.threads < 1:
            raise ClusterError(f"{self.workers} workers of {self.threads} threads: ask for at least one of each")


@dataclass(frozen=True)
class Task:
    """What every worker needs to know, as plain data.

    Attributes:
        model: Name, as `load_model` takes it.
        dtype: Of its weights.
        pairs: (source, target) pairs.
        batch_size: Token blocks per forward pass.
        products: As in `accumulate`.
        null: As in `accumulate`.
        folder: Where shards are kept; all workers see it.
        threads: Of a worker.
    """

    model: str
    dtype: torch.dtype
    pairs: tuple[Pair, ...]
    batch_size: int
    products: torch.dtype
    null: bool
    folder: str
    threads: int

    def place(self, shard: Shard) -> Path:
        """Where a finished shard lies."""
        return Path(self.folder) / f"{shard.number}-of-{shard.count}"


def accumulate_on_ray(
    model: str,
    corpus: Corpus | None,
    pairs: Iterable[tuple[int | str, int | str]],
    cluster: RayCluster,
    *,
    out: str | Path,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    products: torch.dtype = torch.float64,
    null: bool = True,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Accumulated:
    """As `accumulate`, by workers of a Ray cluster.

    The text is tokenised once, here, and shared out in shards (see `Shard`). A worker writes a shard into a folder of its own and renames
    that when it is complete, so that a shard is there once or not at all, however often it was begun. A call that was interrupted goes on
    with the shards that are missing.

    Args:
        model: Name, as `load_model` takes it, on every node of the cluster.
        corpus: The text; by default the embedded one.
        pairs: (source, target) pairs.
        cluster: Where.
        out: A folder that all nodes see under this path.
        dtype: Of the weights.
        batch_size: As in `accumulate`.
        products: As in `accumulate`.
        null: As in `accumulate`.
        progress: Told of batches done, in all and by each worker: a straggler is seen.
        say: Told of lost workers.

    Raises:
        MissingExtraError: Ray is not installed.
        ClusterError: The cluster is not there, is too small, or keeps losing workers at one shard.
        NnatoError: As `accumulate`.
    """
    ray = _ray()
    folder = prepare_folder(Path(out).expanduser().absolute())
    skeleton = load_model(model, remote=True)
    blocks = tokenize(skeleton, corpus or default_corpus(describe(skeleton)), progress)
    chosen = tuple(sorted({make_pair(source, target, describe(skeleton).blocks) for source, target in pairs}))
    task = Task(model, dtype, chosen, batch_size, products, null, str(folder / "shards"), cluster.threads)
    with exclusive(folder / FILE):
        if (folder / FILE).exists():
            return _check_same(load_moments(folder), blocks, task)
        shards = _shards(Path(task.folder), cluster.workers, len(blocks.plan(batch_size)))
        with _connected(ray, cluster):
            _Run(ray, cluster, task, blocks, shards, progress, say).all()
            result = merge_locked([task.place(shard) for shard in shards], folder, _on(ray), progress)
    shutil.rmtree(task.folder)
    return result


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default, of which Ray warns: leave devices alone
    try:
        import ray
    except ImportError:
        raise MissingExtraError("--engine ray needs Ray: pip install 'nnato[ray]'") from None
    return ray


def _check_same(there: Accumulated, blocks: TokenBlocks, task: Task) -> Accumulated:
    """What a finished folder holds, if it is what was asked for; weights were compared when it was made."""
    same = there.text["digest"] == blocks.fingerprint["digest"] and there.moments.pairs == task.pairs and there.model["name"] == task.model
    if not same:
        raise MomentsError(
            f"{Path(task.folder).parent} holds moments of another model, text or request; choose another --out, or delete it"
        )
    return there


def _shards(folder: Path, workers: int, batches: int) -> list[Shard]:
    """All shards: as many as an earlier call made, which some other number of workers may have begun."""
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*"):  # begun by workers that are gone
        shutil.rmtree(left)
    found = {path.name.rpartition("-of-")[2] for path in folder.iterdir()}
    count = int(found.pop()) if found else min(batches, SHARDS_PER_WORKER * workers)
    return [Shard(number, count) for number in range(1, count + 1)]


@contextlib.contextmanager
def _connected(ray: Any, cluster: RayCluster) -> Iterator[None]:
    """A connection to the cluster, ended with the block if it was made here."""
    if ray.is_initialized():
        yield
        return
    local = {"num_cpus": max(cluster.workers * cluster.threads, 1), "include_dashboard": False} if cluster.address is None else {}
    try:
        ray.init(address=cluster.address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"no Ray cluster at {cluster.address or 'this machine'}: {first_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _on(ray: Any) -> Callable[[list[Job]], Iterable[int]]:
    """Adds up parts on the cluster, side by side."""

    def run(jobs: list[Job]) -> Iterable[int]:
        remote = ray.remote(merge_part)
        references = [remote.remote(job) for job in jobs]
        return (ray.get(reference) for reference in references)

    return run


class Board:
    """Where workers say how far they are. An actor of its own, so that it answers while they compute."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, Any]] = {}

    def write(self, worker: int, **line: Any) -> None:
        """Replace the line of a worker."""
        self.lines[worker] = line

    def read(self) -> dict[int, dict[str, Any]]:
        """All lines."""
        return self.lines


class Worker:
    """A model, on the device that Ray gave it, and shards of the text run through it. An actor.

    Args:
        number: From 1.
        task: What to do.
        ids: All token ids, int32.
        text: The other attributes of the `TokenBlocks`.
        board: Where to say how far it is.
    """

    def __init__(self, number: int, task: Task, ids: np.ndarray, text: dict[str, Any], board: Any) -> None:
        self.number, self.task, self.board = number, task, board
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        ids.tofile(spool)
        spool.flush()
        self.blocks = TokenBlocks(spool, **text)
        self.model: Any = None
        torch.set_num_threads(task.threads)

    def run(self, shard: Shard) -> None:
        """Run one shard. It is there as a whole when this returns, and not at all before."""
        if self.model is None:  # not in the constructor, whose errors Ray would report as a lost worker
            self.model = load_model(self.task.model, device="cuda" if torch.cuda.is_available() else "cpu", dtype=self.task.dtype)
        said = 0.0

        def progress(stage: str, done: int, total: int | None) -> None:
            nonlocal said
            if done == total or time.monotonic() > said + 0.2:
                said = time.monotonic()
                self.board.write.remote(
                    self.number, shard=str(shard), done=done, total=total, host=socket.gethostname(), process=os.getpid()
                )

        final = self.task.place(shard)
        attempt = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
        task = self.task
        accumulate(
            self.model,
            self.blocks,
            task.pairs,
            out=attempt,
            batch_size=task.batch_size,
            checkpoint_every=len(self.blocks.index),
            products=task.products,
            null=task.null,
            shard=shard,
            progress=progress,
        )
        try:
            attempt.rename(final)
        except OSError:  # a worker that was taken for lost was only slow, and came first
            if not final.exists():
                raise
            shutil.rmtree(attempt)


@dataclass
class _Run:
    """One call: shards to do, workers that do them."""

    ray: Any
    cluster: RayCluster
    task: Task
    blocks: TokenBlocks
    shards: list[Shard]
    progress: Progress | None
    say: Callable[[str], None]
    lost: dict[Shard, int] = field(default_factory=dict)
    running: dict[Any, tuple[int, Shard]] = field(default_factory=dict)

    def all(self) -> None:
        """Do the shards that are not there yet."""
        left = [shard for shard in self.shards if not self.task.place(shard).exists()]
        if not left:
            return
        resources = self._resources()
        board = self.ray.remote(num_cpus=0)(Board).remote()
        ids = self.ray.put(np.asarray(np.memmap(self.blocks.spool, dtype=np.int32, mode="r")))
        text = {name: getattr(self.blocks, name) for name in ("index", "special", "context", "fingerprint")}
        make = self.ray.remote(**resources)(Worker)

        def start(number: int) -> Any:
            return make.remote(number, self.task, ids, text, board)

        workers = {number: start(number) for number in range(1, min(self.cluster.workers, len(left)) + 1)}
        idle = set(workers)
        try:
            while left or self.running:
                while left and idle:
                    number, shard = idle.pop(), left.pop(0)
                    self.running[workers[number].run.remote(shard)] = number, shard
                ended, _ = self.ray.wait(list(self.running), timeout=0.5)
                for reference in ended:
                    number, shard = self.running.pop(reference)
                    if not self._succeeded(reference, number, shard):
                        left.insert(0, shard)
                        self.ray.kill(workers[number])
                        workers[number] = start(number)
                    idle.add(number)
                self._show(board)
        finally:  # their cores and GPUs are needed for what comes next
            for worker in workers.values():
                self.ray.kill(worker)

    def _resources(self) -> dict[str, float]:
        """What a worker asks Ray for: one GPU each where there are any.

        Raises:
            ClusterError: The cluster has not enough of it.
        """
        there = self.ray.cluster_resources()
        workers, gpus, cpus = self.cluster.workers, int(there.get("GPU", 0)), int(there.get("CPU", 0))
        if 0 < gpus < workers:
            raise ClusterError(f"{workers} workers, but the cluster has {gpus} GPUs: ask for at most {gpus}")
        if cpus < workers * self.cluster.threads:
            raise ClusterError(f"{workers} workers of {self.cluster.threads} CPU cores, but the cluster has {cpus}: ask for fewer")
        return {"num_cpus": self.cluster.threads, "num_gpus": 1 if gpus else 0}

    def _succeeded(self, reference: Any, number: int, shard: Shard) -> bool:
        """Whether a shard was done; False if its worker was lost.

        Raises:
            ClusterError: Too many were lost at this shard.
            NnatoError: The shard cannot be done by any worker.
        """
        errors = self.ray.exceptions
        try:
            self.ray.get(reference)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, NnatoError) else error) from None
        except (errors.RayActorError, errors.RaySystemError, errors.ObjectLostError) as error:
            self.lost[shard] = self.lost.get(shard, 0) + 1
            if self.lost[shard] >= ATTEMPTS:
                raise ClusterError(
                    f"{ATTEMPTS} workers were lost at shard {shard}, the last one so: {first_line(error)}. If the model does not fit into "
                    "memory so often, ask for fewer workers"
                ) from None
            self.say(f"worker {number} was lost at shard {shard}; the shard is done again")
            return False
        return True

    def _show(self, board: Any) -> None:
        """Progress of all, and of each worker with its shard."""
        if self.progress is None:
            return
        done = sum(self.task.place(shard).exists() for shard in self.shards)
        self.progress("shards", done, len(self.shards))
        for number, line in sorted(self.ray.get(board.read.remote()).items()):
            self.progress(f"worker {number} on {line['host']}", line["done"], line["total"])
