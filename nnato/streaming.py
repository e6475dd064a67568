"""The loop text × model → statistic: one forward pass per batch, checkpoints, resumption."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnato.checkpoints import Checkpoints
from nnato.corpus import TokenBatch, TokenBlocks
from nnato.errors import FileFormatError, MomentsError
from nnato.reduction import TokenClasses, capture, classify, located
from nnato.remote_jobs import RemoteJobs
from nnato.shards import Shard
from nnato.statistics import NonFinite, Progress, ResidualBatch, Statistic
from nnato.storage import Metadata, provenance, read_metadata, require, require_entries

if TYPE_CHECKING:
    from nnato.nnsight_setup import TransformersModel


def stream(
    model: TransformersModel,
    blocks: TokenBlocks,
    statistic: Statistic,
    request: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    file: Path | None = None,
    kind: str = "moments",
    batch_size: int = 8,
    checkpoint_every: int = 20,
    remote: RemoteJobs | None = None,
    medians: torch.Tensor | None = None,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Feed every batch's residuals to a statistic, once; with a file, from its last checkpoint on.

    Checkpoints lie on batch boundaries and hold state, cursor, frozen medians and request in one file, so a run that was killed ends in
    the same bits as one that was not. The last but one is kept beside it until the end: if the last one cannot be read, a warning says so
    and the run goes on from there.

    Args:
        model: The model.
        blocks: The text.
        statistic: What to feed. Restored from the file if there is one.
        request: Identifies the run, in JSON; a file of another request is refused.
        about: More for the file's metadata.
        file: Where to keep checkpoints and the result.
        kind: What the file holds.
        batch_size: Token blocks per forward pass.
        checkpoint_every: Batches between checkpoints.
        remote: Runs batches on a server, several in one job, instead of here; a checkpoint follows each job.
        medians: Median norms of the statistic's sites from an earlier run, float64 (sites,), so that the same tokens are sinks; by default
            those of the first batch.
        shard: Feed this part of the batches only. Medians are still those of the whole text's first batch, so all shards share them.
        progress: Told of each batch.

    Returns:
        The file's metadata.

    Raises:
        MomentsError: The file holds another request.
        FileFormatError: No checkpoint can be read.
        ActivationError: A residual is not finite; the last checkpoint stays as it is.
        OutputError: The file cannot be written, or another process is writing it.
    """
    checkpoints = None if file is None else Checkpoints(file, kind)
    with contextlib.nullcontext() if checkpoints is None or _finished(checkpoints.file) else checkpoints.held():
        plan = blocks.plan(batch_size)
        mine = range(len(plan)) if shard is None else shard.batches(blocks.work(plan))
        classes, cursor = TokenClasses(medians), mine.start
        part = {} if shard is None else {"shard": [shard.number, shard.count]}
        if checkpoints is not None and (found := checkpoints.read()):
            if (found[1].get("request"), found[1].get("shard")) != (dict(request), part.get("shard")):
                raise MomentsError(f"{file} holds {kind} of another model, text or request; choose another --out, or delete it")
            cursor = _restore(checkpoints.file, *found, statistic, classes, mine)
        elif mine.start > 0 and medians is None:
            first = blocks.batch(plan[0])
            classes.medians = classify(capture(model, first.ids, statistic.sites), first.mask, first.special, None)[2]

        def snapshot(cursor: int) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
            tensors, own = statistic.state()
            frozen = [] if classes.medians is None else classes.medians.tolist()
            sinks = [[token, count, model.tokenizer.decode([token])] for token, count in classes.sinks.most_common()]
            return tensors, own | dict(about) | part | {
                "request": dict(request),
                "cursor": cursor,
                "batches": mine.stop,
                "medians": {str(site): median for site, median in zip(statistic.sites, frozen, strict=True)},
                "excluded": dict(classes.excluded),
                "sinks": sinks,
                "provenance": provenance() | ({} if remote is None else {"server": remote.about()}),
            }

        while cursor < mine.stop:
            if progress is not None:
                progress("forward passes", cursor - mine.start, len(mine))
            if remote is None:
                _add_batch(model, blocks.batch(plan[cursor]), statistic, classes)
                cursor += 1
            else:
                cursor = remote.add(model, blocks, plan, cursor, classes)
            if checkpoints is not None and (cursor == mine.stop or remote is not None or cursor % checkpoint_every == 0):
                checkpoints.write(*snapshot(cursor))
        if checkpoints is not None:
            checkpoints.finish()
        if progress is not None:
            progress("forward passes", len(mine), len(mine))
        return snapshot(mine.stop)[1]


def _finished(file: Path) -> bool:
    try:
        metadata = read_metadata(file)
    except FileFormatError:
        return False
    return "cursor" in metadata and metadata["cursor"] == metadata.get("batches")


def _restore(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Metadata, statistic: Statistic, classes: TokenClasses, mine: range
) -> int:
    """Take over a checkpoint of the same request; the batch to go on with."""
    require_entries(metadata, file, cursor=int, medians=dict, excluded=dict, sinks=list)
    require(mine.start <= metadata["cursor"] <= mine.stop, file, "its cursor lies outside of the text")
    require(all(type(count) is int for count in metadata["excluded"].values()), file, "excluded holds something else than counts")
    try:
        classes.medians = torch.tensor([metadata["medians"][str(site)] for site in statistic.sites], dtype=torch.float64)
        classes.excluded.update(metadata["excluded"])
        classes.sinks.update({token: count for token, count, _ in metadata["sinks"]})
        statistic.restore(tensors, metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{file} is inconsistent ({type(error).__name__}: {error}); delete it to begin again") from None
    return int(metadata["cursor"])


def _add_batch(model: TransformersModel, tokens: TokenBatch, statistic: Statistic, classes: TokenClasses) -> None:
    residuals = capture(model, tokens.ids, statistic.sites)
    ordinary = classes.ordinary(tokens.ids, tokens.mask, tokens.special, residuals)
    excluded = tokens.mask.to(ordinary.device) & ~ordinary
    documents = tokens.documents.to(ordinary.device)
    try:
        statistic.update(ResidualBatch(residuals, statistic.sites, ordinary, excluded, documents, tokens.split, tokens.fold, tokens.ids))
    except NonFinite as error:
        raise located(error, model, tokens) from None
